"""CLIP and SigLIP: learning an encoder by telling which caption belongs to which image.

CLIP: Radford et al. 2021 (2103.00020), softmax over the batch in both directions. SigLIP: Zhai et
al. 2023 (2303.15343), a sigmoid for every pair. Both see the global batch, however it is sharded.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners import pairs
from cap_pretrain.learners.contrastive import Contrastive
from cap_pretrain.models.build import build_encoder, compute, text_size
from cap_pretrain.models.layers import XAVIER, normalize_images
from cap_pretrain.models.text import TextTower

# log of the initial logit scale, and the initial logit bias: 1 / 0.07 as in CLIP (section 2.5),
# 10 and -10 as in SigLIP (section 3.2).
INITIAL_SCALE_AND_BIAS = {"softmax": (math.log(1 / 0.07), None), "sigmoid": (math.log(10), -10.0)}


class DualEncoder(Contrastive):
    """An image and a text tower, each with a linear projection of the same width.

    A ViT's text tower is of its size.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
          contrast: "softmax" (CLIP) or "sigmoid" (SigLIP).
          ring: whether, for "sigmoid", texts go around the devices instead of being gathered on
            each: a device then holds as many texts and [b, b] logits as it has examples, instead of
            all B and [b, B]. Nothing else changes. It is one message after the other, as many as
            there are devices, so it pays where those arrays are what does not fit.
        """

        contrast: str = "softmax"
        ring: bool = False

        def __post_init__(self):
            if self.contrast not in INITIAL_SCALE_AND_BIAS:
                raise UserError(
                    f"learner.contrast: {self.contrast!r} is not 'softmax' or 'sigmoid'."
                )
            if self.ring and self.contrast != "sigmoid":
                raise UserError(
                    f"learner.ring: {self.contrast!r} needs all texts of the batch at once; only "
                    "'sigmoid' can take them in turns."
                )

    reads = ("image", "text")

    def __init__(
        self,
        encoder: nnx.Module,
        text_tower: TextTower,
        *,
        options: Options,
        rngs: nnx.Rngs,
    ):
        self.encoder = encoder
        self.text_tower = text_tower
        width, dtype = text_tower.size.width, text_tower.compute.dtype
        kwargs = dict(dtype=dtype, kernel_init=XAVIER, rngs=rngs)
        self.image_projection = nnx.Linear(encoder.width, width, **kwargs)
        self.text_projection = nnx.Linear(width, width, **kwargs)
        scale, bias = INITIAL_SCALE_AND_BIAS[options.contrast]
        self.log_scale = nnx.Param(jnp.asarray(scale, jnp.float32))
        if bias is not None:
            self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))
        self.options = options

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "DualEncoder":
        tower = TextTower(
            text_size(config),
            vocab_size=vocab_size,
            length=config.text.length,
            compute=compute(config),
            rngs=rngs,
        )
        return cls(build_encoder(config, rngs), tower, options=learners.options(config), rngs=rngs)

    def embed_images(self, images: jax.Array, *, train: bool = False, key=None) -> jax.Array:
        """uint8 images [B, H, W, 3] -> unit vectors [B, D] float32."""
        images = normalize_images(images, self.text_tower.compute.dtype)
        pooled = self.encoder(images, train=train, key=key).pooled
        return unit(self.image_projection(pooled))

    def embed_text(self, text: jax.Array, *, train: bool = False, key=None) -> jax.Array:
        """text int32 [B, T] -> unit vectors [B, D] float32."""
        return unit(self.text_projection(self.text_tower(text, train=train, key=key)))

    def logits(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Unit vectors [B, D] and [C, D] -> similarities [B, C] as the loss reads them."""
        return pairs.similarities(images, texts, self._scale_and_bias())

    def _scale_and_bias(self) -> dict[str, jax.Array]:
        scale = {"scale": jnp.exp(self.log_scale[...])}
        return scale | ({"bias": self.bias[...]} if self.options.contrast == "sigmoid" else {})

    def features(self, images: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] -> unit vectors [B, D] float32, as they meet those of texts."""
        return self.embed_images(images)

    def image_features(self, images: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] -> what `compare` wants of them: unit vectors [B, D]."""
        return self.embed_images(images)

    def text_features(self, text: jax.Array) -> jax.Array:
        """text int32 [..., T] -> what `compare` wants of it: unit vectors [..., D]."""
        vectors = self.embed_text(text.reshape(-1, text.shape[-1]))
        return vectors.reshape(*text.shape[:-1], -1)

    def compare(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Cosines [B, C] float32 of unit vectors.

        Args:
          images: [B, D].
          texts: [C, D], the same for each image, or [B, C, D], its own.
        """
        product = "bd,cd->bc" if texts.ndim == 2 else "bd,bcd->bc"
        return jnp.einsum(product, images, texts, precision="highest")

    def score(self, images: jax.Array, text: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3], text int32 [B, C, T] -> cosines [B, C]."""
        return self.compare(self.image_features(images), self.text_features(text))

    def embed(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """Unit vectors of `images` and `texts`, [B, D] each, and which are `valid`."""
        image_key, text_key = jax.random.split(key)
        images = self.embed_images(batch["image"], train=train, key=image_key)
        texts = self.embed_text(batch["text"], train=train, key=text_key)
        valid = batch.get("mask", jnp.ones(len(images), bool))
        return {"images": images, "texts": texts, "valid": valid}

    def contrast(self, embedded: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        """The contrastive loss; of the metrics, accuracies are of retrieval within the batch."""
        images, texts, valid = (embedded[k] for k in ("images", "texts", "valid"))
        shared, count = self._scale_and_bias(), jnp.maximum(jnp.sum(valid), 1)
        ring = self.options.ring and not jax.sharding.get_abstract_mesh().empty
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
    """Scales vectors [B, D] to length one, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
