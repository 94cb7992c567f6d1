"""What probes read of an encoder: one vector an image, of any layer."""

from typing import Any

import jax
import jax.numpy as jnp

from cap_pretrain.errors import UserError, did_you_mean

POOLED, TOKENS = "pooled", "tokens"


def read(encoder: Any, layer: str, images: jax.Array, *, train: bool = False, key=None):
    """images [B, H, W, 3] in [-1, 1] -> float32 [B, D].

    Args:
      encoder: gives `tokens` and `pooled`, and by `tokens_at` what leaves one of its `layers`.
      layer: "pooled"; "tokens", their mean; or one of the encoder's `layers`, its mean.
      images: normalised.
      train, key: for the encoder; a layer below the last is read as in evaluation.

    Raises:
      UserError: the encoder has no such layer.
    """
    if layer == POOLED:
        return encoder(images, train=train, key=key).pooled.astype(jnp.float32)
    if layer == TOKENS:
        tokens = encoder(images, train=train, key=key).tokens
    elif layer in encoder.layers:
        tokens = encoder.tokens_at(layer, images)
    else:
        known = (POOLED, TOKENS, *encoder.layers)
        raise UserError(f"the encoder has no layer {layer!r}.{did_you_mean(layer, known)}")
    return jnp.mean(tokens.astype(jnp.float32), axis=1)
