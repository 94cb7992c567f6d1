"""Process-wide Orbax settings, applied when the first checkpoint directory is opened."""

import contextlib
import functools
import logging
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cap_pretrain.checkpoints import replicas


@functools.cache
def configure_orbax() -> None:
    """Apply the process-wide settings this package needs from Orbax; later calls do nothing.

    One replica saves a whole array. By default each replica saves a slice, and the first save would
    stall while hundreds of slicing programs compile. One replica also reads, see `replicas`.

    Orbax logs each failure many times, with tracebacks and from several threads. It is raised here,
    so those records are dropped, like the notice about the array handler registered here.

    Orbax asks, before it lists or removes checkpoints in a bucket, whether that has a hierarchical
    namespace, which takes the permission storage.buckets.get and a second client. Objects are
    listed and removed in the same way in either, so the answer here is no.

    TensorStore threads may report to an event loop that Orbax has already closed, which Python
    would print as an unraisable exception; those are ignored.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_worth_logging)
    for kind, handler in (
        (jax.Array, replicas.ArrayHandler(use_replica_parallel=False)),
        (np.ndarray, replicas.HostArrayHandler()),
    ):
        ocp.type_handlers.register_type_handler(kind, handler, override=True)
    with contextlib.suppress(ImportError):  # it has no public name
        from orbax.checkpoint._src.path import gcs_utils

        gcs_utils.is_hierarchical_namespace_enabled = lambda path: False  # noqa: ARG005
    previous_hook = sys.unraisablehook

    def ignore_late_callbacks(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous_hook(unraisable)

    sys.unraisablehook = ignore_late_callbacks


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Return False for Orbax's failure records and its notice about the array handler."""
    is_failure = record.levelno >= logging.ERROR and record.exc_info
    return not (is_failure or record.getMessage().startswith("Type handler registry"))
