"""Features that probes read from an encoder: a vector or all tokens per image, of any layer."""

import jax
import jax.numpy as jnp

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models import native
from cap_pretrain.models.encoder import ImageEncoder

POOLED, TOKENS = "pooled", "tokens"


def width(encoder: ImageEncoder, layer: str) -> int:
    """Return the width D of the result of `read`, with its arguments and errors."""
    known = dict.fromkeys((POOLED, TOKENS), encoder.width) | dict(encoder.layers)
    if layer not in known:
        raise UserError(f"the encoder has no layer {layer!r}.{did_you_mean(layer, known)}")
    return known[layer]


def read(
    encoder: ImageEncoder,
    layer: str,
    images: jax.Array,
    *,
    train: bool = False,
    key: jax.Array | None = None,
) -> jax.Array:
    """Compute one vector per image.

    Args:
        encoder: The encoder to read from.
        layer: "pooled"; "tokens" (their mean); or one of the encoder's `layers` (its mean).
        images: float [B, H, W, 3] in [-1, 1].
        train: Whether the encoder is in training mode. Named layers always use evaluation mode.
        key: Random key for dropout in training.

    Returns:
        float32 [B, D].

    Raises:
        UserError: The encoder has no such layer.
    """
    width(encoder, layer)  # raises
    if layer == POOLED:
        return encoder(images, train=train, key=key).pooled.astype(jnp.float32)
    if layer == TOKENS:
        tokens = encoder(images, train=train, key=key).tokens
    else:
        tokens = encoder.tokens_at(layer, images)
    return native.mean(tokens.astype(jnp.float32), width(encoder, layer))


def read_tokens(
    encoder: ImageEncoder,
    layer: str,
    images: jax.Array,
    *,
    train: bool = False,
    key: jax.Array | None = None,
) -> jax.Array:
    """Return all tokens [B, N, D] of a layer; "tokens" are the encoder's last ones.

    Padding may be marked in them, as `models.native` does.
    The arguments are those of `read`. Raises UserError if the encoder has no such layer, or for
    "pooled", which is one vector.
    """
    if layer == POOLED:
        raise UserError(
            "the layer 'pooled' is one vector, which attention pooling cannot pool; choose "
            "'tokens' or the name of a layer."
        )
    width(encoder, layer)  # raises
    if layer == TOKENS:
        return encoder(images, train=train, key=key).tokens
    return encoder.tokens_at(layer, images)
