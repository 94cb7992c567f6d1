"""Losses of predicted tokens, with gradients that suit each device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cap_pretrain.distributed.platform import platform
from cap_pretrain.models.text import PAD


def is_target(text: jax.Array, prompt: jax.Array | int = 0) -> jax.Array:
    """Return bool [..., T]: which tokens of `text` are predicted, neither prompt nor padding."""
    return (text != PAD) & (jnp.arange(text.shape[-1]) >= jnp.expand_dims(prompt, -1))


def token_weights(targets: jax.Array, mask: jax.Array | None, average: str) -> jax.Array:
    """Return the weight of each token in a loss, float32 [B, T].

    Args:
        targets: bool [B, T], the predicted tokens.
        mask: bool or float32 [B], the examples that count. None means all.
        average: "token" gives each token weight 1. "example" gives each caption weight 1, divided
            evenly between its tokens.
    """
    weights = targets.astype(jnp.float32)
    if mask is not None:
        weights = weights * mask[:, None]
    if average == "example":
        weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)
    return weights


def weighted_loss(
    nll: jax.Array, correct: jax.Array, weights: jax.Array, total: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """Return the mean of token losses [B, T] by `weights` [B, T] of sum `total`, and metrics."""
    loss = jnp.sum(nll * weights) / jnp.maximum(total, 1)
    accuracy = jnp.sum(correct * weights) / jnp.maximum(total, 1)
    return loss, {"loss_weight": total, "token_accuracy": accuracy}


def token_loss(
    logits: jax.Array, labels: jax.Array, smoothing: float, dtype: Any = jnp.float32
) -> jax.Array:
    """Compute the cross-entropy with label smoothing of each label.

    The gradient has one loop over the vocabulary, without a scatter: that of indexing writes an
    array as large as the logits, and is not deterministic on GPUs.

    Args:
        logits: float32 [..., V].
        labels: int32 [...].
        smoothing: Probability mass spread evenly over the V classes.
        dtype: The dtype that `logits` were computed in, in which the backward pass keeps them.

    Returns:
        float32 [...].
    """
    return _cross_entropy(smoothing, dtype, logits, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(smoothing, dtype, logits, labels):
    return _cross_entropy_forward(smoothing, dtype, logits, labels)[0]


def _cross_entropy_forward(smoothing, dtype, logits, labels):
    whole = jax.nn.logsumexp(logits, axis=-1)
    loss = whole - _own(logits, labels)
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (whole - jnp.mean(logits, axis=-1))
    return loss, (logits.astype(dtype), whole, labels)


def _cross_entropy_backward(smoothing, dtype, residuals, gradient):  # noqa: ARG001
    logits, whole, labels = residuals
    probabilities = jnp.exp(logits.astype(jnp.float32) - whole[..., None])
    wanted = jnp.where(_is_label(logits, labels), 1.0 - smoothing, 0.0)
    wanted = wanted + smoothing / logits.shape[-1]
    return gradient[..., None] * (probabilities - wanted), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _is_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1]) == labels[..., None]


def _own(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the logit of each label, [...]; on accelerators the loop fuses with others."""
    if platform() == "cpu":
        return jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.sum(jnp.where(_is_label(logits, labels), logits, 0.0), axis=-1)


def is_first_maximum(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return `argmax(logits, -1) == labels` for logits [..., V], labels int32 [...], but faster."""
    logits = jax.lax.stop_gradient(logits)
    own = _own(logits, labels)
    earlier = jnp.arange(logits.shape[-1]) < labels[..., None]
    before = jnp.max(jnp.where(earlier, logits, -jnp.inf), axis=-1)
    return (own >= jnp.max(logits, axis=-1)) & (before < own)


def mean_where(values: jax.Array, where: jax.Array) -> jax.Array:
    """Return the mean of `values` weighted by `where`, or 0 if nothing is selected."""
    return jnp.sum(values * where) / jnp.maximum(jnp.sum(where), 1)
