"""Computation in parts of a sequence, to save memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from cap_pretrain.models.layers import constrain


def in_chunks(fn: Callable[..., Any], chunks: int, params: Any, *arrays: jax.Array) -> Any:
    """Compute `fn(params, *arrays)` sequentially for chunks of the second axis.

    Intermediate results of `fn` live only during their chunk, and the backward pass recomputes
    them. Chunks of the second axis leave examples on their devices, unlike chunks of the first.

    Args:
        fn: Function of `params` and arrays [B, L, ...], for any L, that returns a tree of arrays
            [B, L, ...].
        chunks: Number of chunks; the last may be shorter.
        params: Parameters that every chunk reads. They are gathered over the fsdp axis once, not
            for each chunk. The last axis of a matrix stays sharded over the tensor axis.
        *arrays: [B, T, ...] each.

    Returns:
        The tree of arrays [B, T, ...].
    """
    total = arrays[0].shape[1]
    length = -(-total // chunks)
    if length == total:
        return fn(params, *arrays)
    if not jax.sharding.get_abstract_mesh().empty:
        params = jax.lax.with_sharding_constraint(params, P(None, P.UNCONSTRAINED))
    count = -(-total // length)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * length - total), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(len(x), count, length, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(parts):
        return fn(params, *map(constrain, parts))

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * length, *x.shape[3:])[:, :total]

    return jax.tree.map(join, jax.lax.map(one, tuple(map(split, arrays))))
