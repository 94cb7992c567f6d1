"""SimCLR: pretraining an encoder by matching two augmented views of one image.

Chen et al. 2020 (2002.05709). Both views are augmented independently (section 2.1, appendix A). All
views of the global batch are compared, however it is sharded.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners import augment
from cap_pretrain.learners.classifier import classification
from cap_pretrain.learners.contrastive import Contrastive
from cap_pretrain.learners.matching import unit
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import constrain


class SimCLR(Contrastive):
    """An encoder and a two-layer projection MLP, which is discarded after pretraining.

    Args:
        encoder: image encoder.
        options: see `Options`.
        rngs: random keys for the MLP.

    Raises:
        UserError: The size of the views is not a multiple of the encoder's patch size.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
            temperature: Divisor of the cosines; 0.1 in the paper's section 5 and in VISSL.
            hidden: Hidden width of the MLP. 0 is the encoder's width (2048 for a ResNet-50).
            outputs: Width of the compared vectors (section 2.3).
            size: Side of the views in pixels. 0 is the side of the images. Views are crops, so
                larger images (`data.image_size`) preserve details in them.
            colour: Strength of the color jitter (appendix A). 0 disables jitter and grayscale.
            blur: Whether to blur half of the views (appendix A). The paper omits it for small
                images (appendix B.9).
        """

        temperature: float = 0.1
        hidden: int = 0
        outputs: int = 128
        size: int = 0
        colour: float = 1.0
        blur: bool = True

        def __post_init__(self):
            if self.temperature <= 0:
                raise UserError(f"learner.temperature: {self.temperature} must be positive.")
            if self.outputs < 1:
                raise UserError(f"learner.outputs: {self.outputs} must be at least 1.")
            for name in ("hidden", "size", "colour"):
                if getattr(self, name) < 0:
                    raise UserError(f"learner.{name}: {getattr(self, name)} must not be negative.")

    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        # The paper's default setting (section 2.3) and VISSL's, simclr/simclr_8node_resnet, whose
        # ResNet-50 reaches 64.4% on ImageNet. Unlike the paper, VISSL applies weight decay and the
        # trust ratio to biases and BatchNorm as well; its warmup starts at 0.6.
        "reference": {
            "batch_size": 4096,
            "total_epochs": 100.0,
            "optim.name": "lars",
            "optim.lr": 0.3,
            "optim.lr_batch": 256,
            "optim.weight_decay": 1e-6,
            "optim.decay": "cosine",
            "optim.warmup_epochs": 10.0,
        },
    }

    reads = ("image",)

    def __init__(self, encoder: ImageEncoder, *, options: Options, rngs: nnx.Rngs):
        patch = getattr(encoder, "patch", 1)
        if options.size % patch:
            raise UserError(
                f"learner.size: {options.size} is not a multiple of the patch size {patch}."
            )
        self.encoder = encoder
        hidden = options.hidden or encoder.width
        self.hidden = nnx.Linear(encoder.width, hidden, rngs=rngs)
        self.projection = nnx.Linear(hidden, options.outputs, rngs=rngs)
        self.options = options

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        vocab_size: int,  # noqa: ARG003  # every learner takes it
        rngs: nnx.Rngs,
    ) -> "SimCLR":
        """Build the learner that `config` describes."""
        return cls(build_encoder(config, rngs), options=learners.options(config), rngs=rngs)

    def views(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Return two views per image, in adjacent rows.

        Args:
            images: uint8 [B, H, W, 3].
            key: Random key.

        Returns:
            float32 [2 B, S, S, 3] in [-1, 1].
        """

        def two(key, image):
            return jax.vmap(self._view, (0, None))(jax.random.split(key), image)

        views = augment.each(two, key, augment.unit_range(images))
        return constrain(2 * views.reshape(-1, *views.shape[2:]) - 1)

    def _view(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Apply crop, flip, color jitter, grayscale and blur, in this order (appendix A)."""
        options = self.options
        crop_key, flip_key, color_key, gray_key, blur_key = jax.random.split(key, 5)
        size = options.size or image.shape[0]
        image = augment.random_resized_crop(crop_key, image, size)
        image = augment.flip(flip_key, image)
        if options.colour:
            jitter = {name: options.colour * x for name, x in augment.SIMCLR_JITTER.items()}
            image = augment.colour_jitter(color_key, image, **jitter, probability=0.8)
            image = augment.grayscale(gray_key, image)
        if options.blur:
            image = augment.gaussian_blur(blur_key, image)
        return image

    def project(
        self, views: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Return unit vectors float32 [2 B, D] for views [2 B, S, S, 3] in [-1, 1]."""
        pooled = self.encoder(views, train=train, key=key).pooled
        return unit(self.projection(nnx.relu(self.hidden(pooled.astype(jnp.float32)))))

    def embed(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """Return unit `vectors` of two views per image, [B, 2, D], and `valid` bool [B] (the mask).

        Evaluation uses augmented views, too, drawn with a key that is always the same.
        """
        views_key, encoder_key = jax.random.split(key)
        views = self.views(batch["image"], views_key)
        vectors = self.project(views, train=train, key=encoder_key)
        count = len(batch["image"])
        valid = batch.get("mask", jnp.ones(count, bool))
        return {"vectors": vectors.reshape(count, 2, -1), "valid": valid}

    def contrast(self, embedded: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        """Compute the mean normalized temperature-scaled cross-entropy over views (section 2.1).

        Views of masked examples are neither queries nor candidates. The metric `accuracy` is the
        fraction of views whose nearest view is their partner.
        """
        vectors = embedded["vectors"].reshape(-1, embedded["vectors"].shape[-1])
        counts = jnp.repeat(embedded["valid"], 2)
        logits = constrain(choices(vectors, counts, self.options.temperature))
        loss, metrics = classification(logits, jnp.arange(len(vectors)) ^ 1, counts)
        return loss, metrics | {"chance": 1 / jnp.maximum(jnp.sum(counts) - 1, 1)}

    @staticmethod
    def panel_names() -> tuple[str, ...]:
        """Return what `illustrate` shows."""
        return "a view", "another view of it", "the nearest of all views"

    def illustrate(
        self, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Return two views of each image, the view nearest to the first, and if that is right."""
        views = self.views(batch["image"], key)
        vectors = self.project(views)
        valid = jnp.repeat(batch.get("mask", jnp.ones(len(batch["image"]), bool)), 2)
        nearest = jnp.argmax(choices(vectors, valid, self.options.temperature)[::2], axis=1)
        pixels = jnp.round(255 * (views + 1) / 2).astype(jnp.uint8)
        own = jnp.arange(len(vectors))[::2]
        return (pixels[::2], pixels[1::2], pixels[nearest]), nearest == own + 1


def choices(vectors: jax.Array, counts: jax.Array, temperature: float) -> jax.Array:
    """Return logits [N, N] over the candidate partners of each view.

    The logits are cosines divided by the temperature, and -1e9 for the view itself and for views
    that do not count.

    Args:
        vectors: Unit vectors [N, D].
        counts: bool [N], the views that count.
        temperature: Positive divisor.
    """
    logits = jnp.matmul(vectors, vectors.T, precision="highest") / temperature
    return jnp.where(counts & ~jnp.eye(len(vectors), dtype=bool), logits, -1e9)
