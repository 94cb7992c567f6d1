"""Trackers: experiment trackers that receive the figures of a run besides TensorBoard.

A tracker is a class with the methods of `base.Tracker`; `Tracker(run, identity)` opens it. To add
one, write a module and register its class and its package below. `config.log.trackers` then accepts
its name. `guard.Guarded` opens and calls it in a separate thread, so that it can neither end nor
delay a run.
"""

import functools
import importlib
import importlib.util
import json
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from cap_pretrain import files
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.telemetry.trackers.base import Run, Tracker
from cap_pretrain.telemetry.trackers.guard import Guarded
from cap_pretrain.untrusted import checked

TENSORBOARD = "tensorboard"  # always written, by `MetricsWriter`
IDENTITIES = "trackers.json"  # in the workdir: the run's id by name of the tracker


class Entry(NamedTuple):
    """A tracker that can be named; the package that it needs has its name, and so has its extra."""

    path: str  # MODULE:CLASS
    silence: (
        str  # variable that, if unset, is set so that the package reports no usage to its makers
    )
    value: str  # of that variable


_HERE = "cap_pretrain.telemetry.trackers"
REGISTRY = {
    "wandb": Entry(f"{_HERE}.wandb:Wandb", "WANDB_ERROR_REPORTING", "false"),
    "mlflow": Entry(f"{_HERE}.mlflow:Mlflow", "MLFLOW_DISABLE_TELEMETRY", "true"),
}


def parse(names: str) -> tuple[str, ...]:
    """Return the trackers in "tensorboard+wandb+…" besides TensorBoard, which is always written.

    Raises UserError for an unknown name.
    """
    known = {TENSORBOARD, *REGISTRY}
    found = dict.fromkeys(filter(None, (name.strip() for name in names.split("+"))))
    for name in found:
        if name not in known:
            raise UserError(f"log.trackers: no tracker {name!r}.{did_you_mean(name, known)}")
    return tuple(name for name in found if name != TENSORBOARD)


def check(names: str) -> None:
    """Raise UserError if a tracker is unknown or its package is not installed."""
    for name in parse(names):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin:  # none, or a mere folder of that name, as wandb leaves
            raise UserError(
                f"log.trackers: the package of {name} is not installed; run "
                f"pip install 'cap_pretrain[{name}]', or leave {name} out."
            )


def start(names: str, run: Run, say: Callable[[str], None]) -> list[Guarded]:
    """Begin to open the trackers of a run, each continuing its own run of an earlier start.

    One that cannot be opened is left out, and `say` gets a line about it.
    """
    for name in parse(names):
        os.environ.setdefault(REGISTRY[name].silence, REGISTRY[name].value)
    opening = {name: functools.partial(_open, name, run) for name in parse(names)}
    return [Guarded(name, opening[name], run, say) for name in opening]


def _open(name: str, run: Run) -> tuple[Tracker, bool]:
    """Return a tracker and whether it continues its run of an earlier start."""
    module, _, cls = REGISTRY[name].path.partition(":")
    earlier = checked(_identities(run).get(name), name, (str, type(None)), run.workdir / IDENTITIES)
    tracker = getattr(importlib.import_module(module), cls)(run, earlier)
    with _writing:
        identities = _identities(run) | {name: tracker.identity}
        files.write_text(run.workdir / IDENTITIES, json.dumps(identities) + "\n")
    return tracker, tracker.identity == earlier


def _identities(run: Run) -> dict[str, Any]:
    path = run.workdir / IDENTITIES
    return checked(files.read_json(path), "content", dict, path) if path.exists() else {}


_writing = threading.Lock()  # of the identities, which several trackers add at a time
