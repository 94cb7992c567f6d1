"""Fewer patch tokens in training: a random part of each image, so that a step costs less.

FLIP (Li et al. 2022, 2212.00794) drops patches before the encoder. OpenVision 2 (Liu et al. 2025,
2509.01644) encodes all of them, and its caption decoder reads a part of the result.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cap_pretrain import rng

# Where tokens are dropped: before the blocks of the encoder, or before the caption decoder.
PLACES = ENCODER, DECODER = ("encoder", "decoder")


def changes(config: ConfigDict) -> list[tuple[float, dict[str, Any]]]:
    """Return from which share of the run on all tokens are kept; see `training.phases.changes`."""
    model = config.model
    if model.keep_tokens == 1 or model.keep_tokens_until == 1:
        return []
    return [(model.keep_tokens_until, {"model.keep_tokens": 1.0})]


# From so many tokens on, their number is a multiple of MULTIPLE: cuDNN's attention refuses odd
# numbers, and GPUs and TPUs compute on 8 rows or more. Smaller numbers are kept as asked.
MANY, MULTIPLE = 32, 8


def number_kept(total: int, share: float, leading: int = 0) -> int:
    """Return how many of `total` patch tokens are kept.

    It is `share`, rounded, but at least one. From MANY on, that and `leading`, the number of other
    tokens, add up to the nearest multiple of MULTIPLE.
    """
    count = max(1, round(share * total))
    if MANY <= count < total:
        count = min(total, MULTIPLE * round((count + leading) / MULTIPLE) - leading)
    return count


def draw(
    key: jax.Array, batch: int, total: int, share: float, leading: int = 0
) -> jax.Array | None:
    """Draw the tokens that each example keeps, all sets being equally likely.

    The draw of an example depends only on the key and on its index in the global batch.

    Args:
        key: Random key of the batch, which may serve other purposes, too.
        batch: Number of examples.
        total: N, number of tokens of an example.
        share: Share of tokens to keep, in (0, 1].
        leading: Number of tokens besides these, such as a class token.

    Returns:
        Indices int32 [batch, K] in ascending order; None if all tokens are kept.
    """
    count = number_kept(total, share, leading)
    if count == total:
        return None
    numbers = jax.random.bits(rng.derived(key, "tokens"), (batch, total))
    order = jnp.argsort(numbers, axis=1)
    return jnp.sort(order[:, :count].astype(jnp.int32), axis=1)


@jax.custom_vjp
def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return the tokens of x [B, N, D] at distinct indices int32 [B, K]: [B, K, D].

    The gradient gathers, too. That of indexing would be a scatter, which is slower and not
    deterministic on GPUs.
    """
    return _at(x, index)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="promise_in_bounds")


def _take_forward(x, index):
    return _at(x, index), (index, x.shape[1])


def _take_backward(residuals, gradient):
    index, total = residuals
    is_at = index[:, None] == jnp.arange(total, dtype=index.dtype)[:, None]  # [B, N, K]
    kept, place = jnp.any(is_at, axis=-1), jnp.argmax(is_at, axis=-1)
    return jnp.where(kept[..., None], _at(gradient, place), 0).astype(gradient.dtype), None


take.defvjp(_take_forward, _take_backward)
