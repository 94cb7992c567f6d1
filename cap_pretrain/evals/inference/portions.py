"""A learner's outputs for every image of a source, bit-identical on any mesh and batch size.

The order in which a matrix product is summed depends on its shape. So the last bits of an output,
and now and then a metric, depend on how many images a device computes at once and on how parameters
are sharded. Here every device holds all parameters and computes PORTION images at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cap_pretrain.data.sources.base import Source
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, data_parallel, round_up

PORTION = 32
"""Images per device at a time, enough to keep it busy: a B/16 has matrices of 6272 rows."""

Arrays = tuple[np.ndarray, ...]


class EveryImage:
    """Computes `fn(learner, images, labels)` for all images of a source.

    `fn` maps images uint8 [b, H, W, 3] and labels int32 [b] to a tuple of arrays [b, …], each image
    independently of the others. `batch_size`, of the global batch, affects only memory and speed.
    """

    def __init__(
        self,
        context: Context,
        fn: Callable[[nnx.Module, jax.Array, jax.Array], tuple[jax.Array, ...]],
        batch_size: int,
    ):
        self._context = context
        self._batch_size = round_up(batch_size, data_parallel(context.mesh) * PORTION)

        def compute(learner, images, labels):
            graphdef, state = nnx.split(learner)
            state = jax.lax.with_sharding_constraint(state, sharding.replicated(context.mesh))
            whole = nnx.merge(graphdef, state)
            return in_portions(lambda batch: fn(whole, *batch), (images, labels), context.mesh)

        self._compute = context.jit(compute)
        self._whole = context.jit(lambda _, arrays: arrays)

    def __call__(self, variables: Any, source: Source) -> Arrays:
        """Return the arrays [N, …] of the images that can be decoded, in order, on every host.

        Raises UserError if no image can be decoded, and Interrupted if the run is stopping.
        """
        parts = [arrays for _, arrays in self.batches(variables, source)]
        arrays = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        if not len(arrays[0]):
            raise UserError(f"evals: {source} has no image that can be decoded.")
        return arrays

    def batches(self, variables: Any, source: Source) -> Iterator[tuple[np.ndarray, Arrays]]:
        """Yield the same in batches: indices [n] in the source, and the arrays [n, …] of these."""
        previous = None
        for batch, _ in self._context.batches(source, self._batch_size):
            computing = (
                self._compute(variables, batch["image"], batch["label"]),
                self._whole(variables, (batch["index"], batch["mask"])),
            )
            if previous:  # fetched while the next one is computed
                yield _fetch(*previous)
            previous = computing
        if previous:
            yield _fetch(*previous)


def in_portions(fn: Callable[[Any], Any], batch: Any, mesh: Mesh) -> Any:
    """Return `fn(batch)`, computed portion by portion; for use under `jax.jit`.

    `fn` maps arrays [b, …] to arrays [b, …], each example independently of the others. The arrays
    [B, …] of `batch` are sharded as by `sharding.put_batch`, with a multiple of PORTION examples on
    each device of the mesh.
    """
    ways = data_parallel(mesh)
    spread = NamedSharding(mesh, P(None, sharding.BATCH_AXES))

    def split(x):  # each device keeps its examples, so nothing is communicated
        x = x.reshape(ways, -1, PORTION, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(-1, ways * PORTION, *x.shape[3:])
        return jax.lax.with_sharding_constraint(x, spread)

    def join(y):
        y = y.reshape(-1, ways, PORTION, *y.shape[2:]).swapaxes(0, 1)
        return y.reshape(-1, *y.shape[3:])

    return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(split, batch)))


def _fetch(
    arrays: tuple[jax.Array, ...], where: tuple[jax.Array, jax.Array]
) -> tuple[np.ndarray, Arrays]:
    """Bring a batch to the host; return its indices and arrays without the masked examples."""
    on_host, (index, mask) = jax.device_get((arrays, where))
    return index[mask], tuple(array[mask] for array in on_host)
