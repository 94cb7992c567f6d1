"""What probes read of an encoder: one vector an image, of any layer."""

import jax
import jax.numpy as jnp

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models.encoder import ImageEncoder

POOLED, TOKENS = "pooled", "tokens"


def width(encoder: ImageEncoder, layer: str) -> int:
    """D of what `read` gives; arguments and errors as there."""
    known = dict.fromkeys((POOLED, TOKENS), encoder.width) | encoder.layers
    if layer not in known:
        raise UserError(f"the encoder has no layer {layer!r}.{did_you_mean(layer, known)}")
    return known[layer]


def read(encoder: ImageEncoder, layer: str, images: jax.Array, *, train: bool = False, key=None):
    """images [B, H, W, 3] in [-1, 1] -> float32 [B, D].

    Args:
      encoder: what is read of.
      layer: "pooled"; "tokens", their mean; or one of the encoder's `layers`, its mean.
      images: normalised.
      train, key: for the encoder; a layer below the last is read as in evaluation.

    Raises:
      UserError: the encoder has no such layer.
    """
    width(encoder, layer)  # raises
    if layer == POOLED:
        return encoder(images, train=train, key=key).pooled.astype(jnp.float32)
    if layer == TOKENS:
        tokens = encoder(images, train=train, key=key).tokens
    else:
        tokens = encoder.tokens_at(layer, images)
    return jnp.mean(tokens.astype(jnp.float32), axis=1)
