"""Operations on rows of logits [R, V] that are computed where each row is sharded.

The compiler, left to itself, would gather the rows of all devices in each step of decoding.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from cap_pretrain.distributed.sharding import BATCH_AXES


def sharded_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return `jax.lax.top_k` of x [R, V]."""
    return _by_rows(lambda x: tuple(jax.lax.top_k(x, k)), x)


def at_tokens(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the values of x [R, V] at tokens int32 [R, n]: [R, n]."""
    return _by_rows(lambda x, tokens: jnp.take_along_axis(x, tokens, axis=1), x, tokens)


def mark(tokens: jax.Array, where: jax.Array, size: int) -> jax.Array:
    """Return bool [R, size], True at those tokens int32 [R, n] that bool `where` [R, n] names."""
    return count(tokens, where, size) > 0


def count(tokens: jax.Array, where: jax.Array, size: int) -> jax.Array:
    """Return float32 [R, size], how often each of tokens int32 [R, n] occurs `where` [R, n]."""

    def local(tokens: jax.Array, where: jax.Array) -> jax.Array:
        rows = jnp.arange(len(tokens))[:, None]
        return jnp.zeros((len(tokens), size)).at[rows, tokens].add(where.astype(jnp.float32))

    return _by_rows(local, tokens, where)


def _by_rows(compute: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Return `compute(*arrays)`, which treats each row alone, computed where the row is."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) if not mesh.empty else 1
    if mesh.empty or len(arrays[0]) % parts:
        return compute(*arrays)
    rows = P(BATCH_AXES)
    return jax.shard_map(compute, in_specs=rows, out_specs=rows)(*arrays)
