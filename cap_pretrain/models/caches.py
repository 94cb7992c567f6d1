"""Keys and values that decoding keeps, and layers in the form in which its steps use them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models.layers import Attention


def for_queries(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Transpose [B, S, heads, D / heads] to [B, heads, D / heads, S] and [B, heads, S, D / heads].

    These are the layouts of the two products of attention, so decoding does not transpose the cache
    at every position.
    """
    return keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)


def padded(
    keys: jax.Array, values: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """Append zeros to keys and values of `for_queries`; return them and a mask bool [..., S].

    XLA's GPU compiler pads the operands of products in half precision to multiples of 8, here at
    every position. In float32 nothing is appended, and no mask is returned unless one is given.
    """
    length = keys.shape[-1]
    more = -length % 8 if keys.dtype.itemsize == 2 else 0
    if not more:
        return (keys, values) if mask is None else (keys, values, mask)
    keys = jnp.pad(keys, [(0, 0)] * 3 + [(0, more)])
    values = jnp.pad(values, [(0, 0)] * 2 + [(0, more), (0, 0)])
    mask = jnp.ones(length, bool) if mask is None else mask
    return keys, values, jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, more)])


def of_image(attention: Attention, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """Return keys and values of an encoder's tokens, of `for_queries`, for `attend_cached`.

    If padding among the tokens is marked (`models.native`), they come with a mask.
    """
    tokens, mask = attention.seen(tokens)
    found = for_queries(*attention.keys_values(tokens))
    return found if mask is None else (*found, mask)


def attend_cached(
    attention: Attention,
    x: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Apply `attention` to x [B, C, D] with keys and values of `for_queries`: [B, C, D]."""
    query = attention.query(x).reshape(*x.shape[:2], attention.heads, -1)
    weights = jnp.einsum("bchd,bhds->bhcs", query, keys, preferred_element_type=jnp.float32)
    weights = weights * query.shape[-1] ** -0.5
    if mask is not None:
        weights = jnp.where(mask, weights, -jnp.inf)
    weights = jax.nn.softmax(weights, axis=-1).astype(values.dtype)
    return attention.out(jnp.einsum("bhcs,bhsd->bchd", weights, values).reshape(x.shape))


def written(writers: jax.Array, position: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """Note that each row writes its own token at `position`; see `Decoder.init_cache`.

    Returns the table of writers int32 [B * C, T], and a mask bool [B, 1, C, T * C]: which of the
    keys of the tokens each caption attends to.
    """
    beams = len(writers) // batch
    row = jnp.arange(beams, dtype=jnp.int32)
    writers = writers.at[:, position].set(jnp.tile(row, batch))
    # -1 (future positions) matches no row
    mask = writers.reshape(batch, 1, beams, -1, 1) == row
    return writers, mask.reshape(batch, 1, beams, -1)


def separated(layers: nnx.Module, depth: int) -> list[Any]:
    """Return layers of `stack_layers` in order, each with its own parameters."""
    if isinstance(layers, nnx.List):  # see `models.decoding.for_decoding`
        return [*layers]
    graphdef, params = nnx.split(layers)
    parts = [jax.tree.map(lambda p, n=n: p[n], params) for n in range(depth)]
    return [nnx.merge(graphdef, part) for part in parts]
