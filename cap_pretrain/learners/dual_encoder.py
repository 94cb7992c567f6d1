"""CLIP and SigLIP: learning an encoder by telling which caption belongs to which image.

CLIP: Radford et al. 2021 (2103.00020), softmax over the batch in both directions. SigLIP: Zhai et
al. 2023 (2303.15343), a sigmoid for every pair. Both see the global batch, however it is sharded.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.models.build import build_encoder, compute, text_size
from cap_pretrain.models.layers import XAVIER, normalize_images
from cap_pretrain.models.text import TextTower

# log of the initial logit scale, and the initial logit bias: 1 / 0.07 as in CLIP (section 2.5),
# 10 and -10 as in SigLIP (section 3.2).
INITIAL_SCALE_AND_BIAS = {"softmax": (math.log(1 / 0.07), None), "sigmoid": (math.log(10), -10.0)}


class DualEncoder(nnx.Module):
    """An image and a text tower, each with a linear projection of the same width.

    A ViT's text tower is of its size.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
          contrast: "softmax" (CLIP) or "sigmoid" (SigLIP).
        """

        contrast: str = "softmax"

        def __post_init__(self):
            if self.contrast not in INITIAL_SCALE_AND_BIAS:
                raise UserError(
                    f"learner.contrast: {self.contrast!r} is not 'softmax' or 'sigmoid'."
                )

    reads = ("image", "text")
    sum_over_batch = False

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
        logits = jnp.exp(self.log_scale[...]) * jnp.matmul(images, texts.T, precision="highest")
        return logits + self.bias[...] if self.options.contrast == "sigmoid" else logits

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

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The contrastive loss of a batch; masked examples are neither queries nor candidates."""
        image_key, text_key = jax.random.split(key)
        images = self.embed_images(batch["image"], train=train, key=image_key)
        texts = self.embed_text(batch["text"], train=train, key=text_key)
        logits = self.logits(images, texts)
        valid = batch.get("mask", jnp.ones(len(images), bool))
        contrast = {"softmax": softmax_contrast, "sigmoid": sigmoid_contrast}
        loss = contrast[self.options.contrast](logits, valid)

        count = jnp.maximum(jnp.sum(valid), 1)
        candidates = jnp.where(valid[None, :], logits, -jnp.inf)
        own = jnp.arange(len(logits))
        to_text = jnp.sum((jnp.argmax(candidates, 1) == own) * valid) / count
        candidates = jnp.where(valid[:, None], logits, -jnp.inf)
        to_image = jnp.sum((jnp.argmax(candidates, 0) == own) * valid) / count
        metrics = {
            "loss_weight": jnp.sum(valid).astype(jnp.float32),
            "image_to_text_accuracy": to_text,
            "text_to_image_accuracy": to_image,
            "logit_scale": jnp.exp(self.log_scale[...]),
        }
        return loss, metrics


def unit(x: jax.Array) -> jax.Array:
    """Scales vectors [B, D] to length one, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def softmax_contrast(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """CLIP: mean cross-entropy of rows and columns of logits [B, B], over valid examples."""
    blocked = jnp.where(valid[:, None] & valid[None, :], logits, -1e9)
    own = jnp.eye(len(logits))
    rows = optax.softmax_cross_entropy(blocked, own)
    columns = optax.softmax_cross_entropy(blocked.T, own)
    return jnp.sum((rows + columns) / 2 * valid) / jnp.maximum(jnp.sum(valid), 1)


def sigmoid_contrast(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """SigLIP: every pair is a binary question; summed over pairs, divided by the examples."""
    signs = 2.0 * jnp.eye(len(logits)) - 1.0
    pairs = -jax.nn.log_sigmoid(signs * logits) * (valid[:, None] & valid[None, :])
    return jnp.sum(pairs) / jnp.maximum(jnp.sum(valid), 1)
