"""Base class of learners that match images with texts by unit vectors: CLIP, SigLIP and CoCa."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.learners import pairs
from cap_pretrain.learners.contrastive import Contrastive

# Log of the initial logit scale, and the initial logit bias: 1 / 0.07 as in CLIP (section 2.5),
# 10 and -10 as in SigLIP (section 3.2).
INITIAL_SCALE_AND_BIAS = {"softmax": (math.log(1 / 0.07), None), "sigmoid": (math.log(10), -10.0)}


def check_contrast(contrast: str) -> None:
    """Raise UserError if the option `contrast` of a learner is unknown."""
    if contrast not in INITIAL_SCALE_AND_BIAS:
        raise UserError(f"learner.contrast: {contrast!r} is not 'softmax' or 'sigmoid'.")


class Matching(Contrastive):
    """A learner that defines `embed_images` and `embed_text`, and has options with a `contrast`."""

    options: Any

    def init_scale(self, contrast: str) -> None:
        """Set the logit scale, and for "sigmoid" the bias, to what training starts with."""
        scale, bias = INITIAL_SCALE_AND_BIAS[contrast]
        self.log_scale = nnx.Param(jnp.asarray(scale, jnp.float32))
        if bias is not None:
            self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))

    def embed_images(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Embed uint8 images [B, H, W, 3] as unit vectors float32 [B, D]."""
        raise NotImplementedError

    def embed_text(
        self, text: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Embed text int32 [B, T] as unit vectors float32 [B, D]."""
        raise NotImplementedError

    def logits(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Return the logits [B, C] of the loss for unit vectors [B, D] and [C, D]."""
        return pairs.similarities(images, texts, self._scale_and_bias())

    def _scale_and_bias(self) -> dict[str, jax.Array]:
        scale = {"scale": jnp.exp(self.log_scale[...])}
        return scale | ({"bias": self.bias[...]} if self.options.contrast == "sigmoid" else {})

    def features(self, images: jax.Array) -> jax.Array:
        """Return the embeddings of `embed_images`, float32 [B, D]."""
        return self.embed_images(images)

    def image_features(self, images: jax.Array) -> jax.Array:
        """Encode uint8 images [B, H, W, 3] as unit vectors [B, D] for `compare`."""
        return self.embed_images(images)

    def text_features(self, text: jax.Array) -> jax.Array:
        """Encode text int32 [..., T] as unit vectors [..., D] for `compare`."""
        vectors = self.embed_text(text.reshape(-1, text.shape[-1]))
        return vectors.reshape(*text.shape[:-1], -1)

    def compare(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Return the cosine similarities float32 [B, C] of unit vectors.

        Args:
            images: [B, D].
            texts: [C, D], the same texts for each image, or [B, C, D], its own texts.
        """
        product = "bd,cd->bc" if texts.ndim == 2 else "bd,bcd->bc"
        return jnp.einsum(product, images, texts, precision="highest")

    def score(self, images: jax.Array, text: jax.Array) -> jax.Array:
        """Return cosines [B, C] of text int32 [B, C, T] and uint8 images [B, H, W, 3]."""
        return self.compare(self.image_features(images), self.text_features(text))

    def contrast(self, embedded: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        """Compute the contrastive loss, and metrics with the accuracy of in-batch retrieval.

        Args:
            embedded: Unit vectors `images` and `texts` [B, D], and `valid` bool [B], which examples
                count.
        """
        images, texts, valid = (embedded[k] for k in ("images", "texts", "valid"))
        shared, count = self._scale_and_bias(), jnp.maximum(jnp.sum(valid), 1)
        ring = getattr(self.options, "ring", False)
        ring = ring and not jax.sharding.get_abstract_mesh().empty
        compare = pairs.around if ring else pairs.gathered
        found = compare(pairs.LOSSES[self.options.contrast], images, texts, shared, valid)
        metrics = {
            "loss_weight": jnp.sum(valid).astype(jnp.float32),
            "image_to_text_accuracy": jnp.sum((found.own > found.other_text) & valid) / count,
            "text_to_image_accuracy": jnp.sum((found.own > found.other_image) & valid) / count,
            "logit_scale": shared["scale"],
        }
        return found.loss / count, metrics


def unit(x: jax.Array) -> jax.Array:
    """Scale vectors [B, D] to unit length, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
