"""Turning a captioner's step into captions: batched, jitted, with the key-value cache.

The interface is one function, `step(tokens [B], position, cache) -> (logits [B, V], cache)`, so any
decoder that has one (transformer or recurrent) is served alike.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def greedy(
    step: Step, cache: Any, *, batch: int, length: int, start: int, eos: int, pad: int = 0
) -> jax.Array:
    """The most likely token at every position, until all captions have ended.

    Args:
      step: one decoding step.
      cache: what `step` needs at position 0.
      batch: B.
      length: the most tokens a caption may have.
      start: the token read at position 0.
      eos: the token that ends a caption; it is kept in the result.
      pad: what follows the end.

    Returns:
      int32 [B, length].
    """

    def unfinished(carry):
        position, _, _, done, _ = carry
        return (position < length) & ~jnp.all(done)

    def body(carry):
        position, last, tokens, done, cache = carry
        logits, cache = step(last, position, cache)
        token = jnp.where(done, pad, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = tokens.at[:, position].set(token)
        return position + 1, token, tokens, done | (token == eos), cache

    carry = (
        jnp.int32(0),
        jnp.full(batch, start, jnp.int32),
        jnp.full((batch, length), pad, jnp.int32),
        jnp.zeros(batch, bool),
        cache,
    )
    return jax.lax.while_loop(unfinished, body, carry)[2]
