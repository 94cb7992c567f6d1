"""Reading a stored checkpoint without its model: its arrays, and what its manifest says."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from cap_pretrain import files, rules, untrusted
from cap_pretrain.checkpoints.folders import checkpoints_folder
from cap_pretrain.checkpoints.manifest import (
    CorruptCheckpointError,
    compare,
    describe,
    read_manifest,
)
from cap_pretrain.checkpoints.orbax_setup import configure_orbax
from cap_pretrain.checkpoints.reading import read_on_all_hosts
from cap_pretrain.fingerprint import fingerprints

ITEMS = ("learner", "optimizer")


def load_arrays(
    workdir: str | Path, step: int, items: Sequence[str] = ITEMS
) -> dict[str, np.ndarray]:
    """Return the arrays of the checkpoint of `step`, by paths such as "learner/params/encoder/…".

    Reads only the given `items`, without the model or its config. Raises CorruptCheckpointError if
    an array or the manifest has changed, UserError if the disk does not permit reading, OSError if
    the bucket is out of reach.
    """
    configure_orbax()
    folder = checkpoints_folder(workdir) / str(step)
    manifest = read_on_all_hosts(folder, lambda: read_manifest(folder))
    reader = ocp.PyTreeCheckpointHandler()

    def read(item: str) -> Any:
        path = epath.Path(folder / item)
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        stored = reader.metadata(path).tree
        _check_sizes(folder, stored)
        args = jax.tree.map(lambda _: as_numpy, stored)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))

    tree = read_on_all_hosts(folder, lambda: {item: read(item) for item in items})
    saved = {k: leaf for k, leaf in manifest["leaves"].items() if k.split("/")[0] in items}
    compare(folder, describe(tree, jax.jit(fingerprints)(tree)), saved)
    return rules.flatten(tree)


def _check_sizes(folder: Path, arrays: Any) -> None:
    """Raise ValueError if the metadata of `arrays` claim more than their files may decompress to.

    A stranger may have written both; reading would fill the memory.
    """
    held = files.total_size(folder)
    claimed = sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(arrays)
    )
    if claimed > untrusted.FREE_BYTES + untrusted.MAX_RATIO * held:
        raise ValueError(f"its arrays claim {claimed:,} bytes in files of {held:,}")


def saved_identity(workdir: str | Path, step: int) -> dict[str, str]:
    """Return the `identity` saved with `step`; raise CorruptCheckpointError as `load_arrays`."""
    return read_manifest(checkpoints_folder(workdir) / str(step))["identity"]


def saved_batches(workdir: str | Path, step: int) -> tuple[tuple[int, int], ...]:
    """Return the `BatchSizes.sizes` saved with `step`, empty before 0.2; raise as `load_arrays`."""
    folder = checkpoints_folder(workdir) / str(step)
    sizes = read_manifest(folder).get("batches", [])
    try:
        steps, batches = zip(*sizes, strict=True) if sizes else ((0,), (1,))
        valid = steps[0] == 0 and list(steps) == sorted(set(steps)) and min(batches) >= 1
        if not valid or not all(type(n) is int for n in (*steps, *batches)):
            raise ValueError
    except (TypeError, ValueError) as e:
        raise CorruptCheckpointError(f"{folder}: is corrupt (its batch sizes are not valid)") from e
    return tuple(map(tuple, sizes))
