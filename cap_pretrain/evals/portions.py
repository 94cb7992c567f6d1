"""What a learner says of every image of a source, the same bits on any mesh in any batch size.

A matrix product adds up in an order that depends on its shape. So the last bits of what a learner
says of an image depend on how many others a device was given with it, and on how parameters are
split; and with them, now and then, a figure. Here every device has the parameters in whole and
computes the same program on PORTION images at a time.
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
from cap_pretrain.evals.base import Context

PORTION = 32
"""Images a device at a time: a B/16 has matrices of 6272 rows then, enough to be busy."""

Arrays = tuple[np.ndarray, ...]


class EveryImage:
    """Computes `fn(learner, images, labels)` for all images of a source.

    Args:
      context: what evaluators work with.
      fn: images uint8 [b, H, W, 3] and labels int32 [b] -> a tuple of arrays [b, …]; treats each
        image for itself.
      batch_size: images a batch, in all; a matter of memory and speed alone.
    """

    def __init__(
        self,
        context: Context,
        fn: Callable[[nnx.Module, jax.Array, jax.Array], tuple[jax.Array, ...]],
        batch_size: int,
    ):
        self._context = context
        once = _ways(context.mesh) * PORTION
        self._batch_size = -(-batch_size // once) * once

        def compute(learner, images, labels):
            graphdef, state = nnx.split(learner)
            state = jax.lax.with_sharding_constraint(state, sharding.replicated(context.mesh))
            whole = nnx.merge(graphdef, state)
            return in_portions(lambda batch: fn(whole, *batch), (images, labels), context.mesh)

        self._compute = context.jit(compute)
        self._whole = context.jit(lambda _, arrays: arrays)

    def __call__(self, variables: Any, source: Source) -> Arrays:
        """Returns the arrays [N, …] on every host, in the order of the source.

        Images that do not decode are left out.

        Raises:
          UserError: none is left.
          evals.Interrupted: the run is to stop.
        """
        parts = [arrays for _, arrays in self.batches(variables, source)]
        arrays = tuple(map(np.concatenate, zip(*parts, strict=True)))
        if not len(arrays[0]):
            raise UserError(f"evals: {source} has no image that can be decoded.")
        return arrays

    def batches(self, variables: Any, source: Source) -> Iterator[tuple[np.ndarray, Arrays]]:
        """Yields the same bit by bit: indices [n] in the source, and the arrays [n, …] of these."""
        ahead = None
        for batch, _ in self._context.batches(source, self._batch_size):
            computing = (
                self._compute(variables, batch["image"], batch["label"]),
                self._whole(variables, (batch["index"], batch["mask"])),
            )
            if ahead:  # is fetched while the next one is computed
                yield _fetched(*ahead)
            ahead = computing
        yield _fetched(*ahead)


def in_portions(fn: Callable[[Any], Any], batch: Any, mesh: Mesh) -> Any:
    """Returns `fn(batch)`, computed portion by portion; to be used under `jax.jit`.

    Args:
      fn: arrays [b, …] in, arrays [b, …] out; treats each example for itself.
      batch: arrays [B, …] that lie as `partition.put_batch` puts them, B a multiple of PORTION on
        each device.
      mesh: where they lie.
    """
    ways = _ways(mesh)
    spread = NamedSharding(mesh, P(None, sharding.BATCH_AXES))

    def split(x):  # each device keeps what it has, so nothing is sent
        x = x.reshape(ways, -1, PORTION, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(-1, ways * PORTION, *x.shape[3:])
        return jax.lax.with_sharding_constraint(x, spread)

    def join(y):
        y = y.reshape(-1, ways, PORTION, *y.shape[2:]).swapaxes(0, 1)
        return y.reshape(-1, *y.shape[3:])

    return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(split, batch)))


def _ways(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _fetched(
    arrays: tuple[jax.Array, ...], where: tuple[jax.Array, jax.Array]
) -> tuple[np.ndarray, Arrays]:
    arrays, (index, mask) = jax.device_get((arrays, where))
    return index[mask], tuple(array[mask] for array in arrays)
