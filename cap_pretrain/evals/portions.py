"""Batches computed in equal portions, so that a result has the same bits whatever the batch size.

A matrix product adds up in an order that depends on its shape. So the last bits of what an encoder
says of an image depend on how many images a device was given with it, and with them, now and then,
a figure. Here every device computes the same program on PORTION examples at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cap_pretrain.partition import BATCH_AXES

PORTION = 32
"""Examples a device at a time: a B/16 has matrices of 6272 rows then, enough to be busy."""


def whole_batch(batch_size: int, mesh: Mesh) -> int:
    """Returns `batch_size`, rounded up to full portions on every device of a mesh."""
    once = _ways(mesh) * PORTION
    return -(-batch_size // once) * once


def in_portions(fn: Callable[[Any], Any], batch: Any, mesh: Mesh) -> Any:
    """Returns `fn(batch)`, computed portion by portion, to be used under `jax.jit`.

    Args:
      fn: treats each example for itself; arrays [b, …] in, arrays [b, …] out.
      batch: arrays [B, …] that lie as `partition.put_batch` puts them; B as of `whole_batch`.
      mesh: where they lie.
    """
    ways = _ways(mesh)
    spread = NamedSharding(mesh, P(None, BATCH_AXES))

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
