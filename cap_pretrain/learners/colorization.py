"""Colorization: pretraining an encoder by predicting colors (Zhang et al. 2016, 1603.08511).

The encoder sees only lightness, as a gray image in all three channels. A linear layer on its tokens
predicts, for each part of the image, the bin of the ab plane (see models/lab.py) of its mean color.
Bins that are rare in the training images have larger weights, and images without color do not
count. Recipes set `model.colours`, so the encoder sees only lightness in all later uses, too.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.data import images as image_files
from cap_pretrain.data import views
from cap_pretrain.data.sources.base import Source
from cap_pretrain.errors import UserError
from cap_pretrain.models import lab
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.sizes import STORED

# An image is gray if |a| and |b| of all its parts are at most this value (the authors' code). It is
# half a bin: all parts fall into the gray bin, and their remaining color is JPEG noise.
GRAY = 5.0
UNIFORM = "uniform"
# Number of training images whose colors are counted, and their side in pixels for this.
PRIOR_IMAGES, PRIOR_SIDE = 1000, 16


class Colorization(nnx.Module):
    """An encoder and a linear layer that predicts the colors of each token's part of the image.

    Args:
        encoder: image encoder.
        options: see `Options`.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
            upsample: Each token predicts `upsample` x `upsample` parts of its patch. The authors
                predict at a quarter of the image's side, which is 8 for a ResNet and 4 for patches
                of 16. The linear layer grows with the square of `upsample`.
            prior: Color counts of the training images that determine the weights of the bins: 261
                numbers separated by blanks. "uniform" weights all bins equally. "" counts the
                colors of 1000 training images at the start of a run and is replaced by the result
                (without data, "" is the same as "uniform").
        """

        upsample: int = 4
        prior: str = ""

        def __post_init__(self):
            if self.upsample < 1:
                raise UserError(f"learner.upsample: {self.upsample} must be at least 1.")
            counts = self.prior.split()
            known = self.prior in ("", UNIFORM)
            if not known and (
                len(counts) != lab.BINS
                or not all(count.isdecimal() for count in counts)
                or not any(map(int, counts))
            ):
                raise UserError(
                    f"learner.prior: {self.prior[:20]!r} is not {lab.BINS} counts of bins; "
                    f"leave it empty, or set it to {UNIFORM!r}."
                )

        @property
        def counts(self) -> np.ndarray | None:
            """`prior` as an array [Q]; None if all bins have equal weights."""
            return None if self.prior in ("", UNIFORM) else np.array(self.prior.split(), float)

    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        # The authors' code (train/solver.prototxt, models/colorization_train_val_v2.prototxt), with
        # three differences. The learning rate is x.1 after 225,000 of 500,000 steps there, a cosine
        # here. Crops are 176 of 256 pixels there, 7/8 of the image here. Weight decay is part of
        # the gradient there. VISSL evaluates such encoders, but publishes no training settings.
        "reference": {
            "batch_size": 40,
            "total_epochs": 15.6,  # 500,000 batches of ImageNet's 1,281,167 images
            "data.image_size": 176,
            "data.crop": "window",
            "data.flip": True,
            "model.colours": "lightness",
            "optim.name": "adamw",
            "optim.lr": 3e-5,
            "optim.b1": 0.9,
            "optim.b2": 0.99,
            "optim.weight_decay": 1e-3,
        },
    }

    reads = ("image",)
    keeps_tokens_at = ()  # each part of the image has a loss

    def __init__(self, encoder: ImageEncoder, *, options: Options, rngs: nnx.Rngs):
        self.encoder = encoder
        # Zeros, so that training starts from the uniform distribution over bins.
        zeros = nnx.initializers.zeros
        outputs = lab.BINS * options.upsample**2
        self.head = nnx.Linear(encoder.width, outputs, kernel_init=zeros, rngs=rngs)
        self.options = options

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        vocab_size: int,  # noqa: ARG003  # every learner takes it
        rngs: nnx.Rngs,
    ) -> "Colorization":
        """Build the learner that `config` describes."""
        return cls(build_encoder(config, rngs), options=learners.options(config), rngs=rngs)

    @staticmethod
    def settled(config: ConfigDict, mixture: Sequence[tuple[Source, float]]) -> dict[str, Any]:
        """Return the fields of `config.learner` that depend on the training images."""
        if config.learner.prior or config.model.name == STORED:
            return {}
        counts = count_colours(mixture)
        return {"prior": " ".join(map(str, counts))} if counts.any() else {}

    def predict(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Predict the distribution over bins.

        Args:
            images: uint8 [B, S, S, 3].
            train: Whether the encoder is in training mode.
            key: Random key for dropout.

        Returns:
            Logits float32 [B, G, G, Q], for G x G parts of each image.

        Raises:
            UserError: The encoder's tokens do not form a square grid.
        """
        gray = 2 * lab.gray(_unit(images)) - 1
        x = self.encoder(gray, train=train, key=key).tokens.astype(jnp.float32)
        batch, count, _ = x.shape
        side, r = math.isqrt(count), self.options.upsample
        if count - side**2 > 1:
            raise UserError(
                f"model.name: the {count} tokens of this encoder do not form a square grid; "
                "colorization needs one."
            )
        # A token before those of the grid is the class token.
        x = self.head(x[:, count - side**2 :])
        x = x.reshape(batch, side, side, r, r, lab.BINS).swapaxes(2, 3)
        return x.reshape(batch, side * r, side * r, lab.BINS)

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Compute the mean weighted cross-entropy over the parts of images.

        Gray and masked images do not count. The metrics are

            cross_entropy  without weights
            accuracy       how often the most likely bin is the correct one
            chance         how often the most common bin of the training images is correct
            ab_error       mean distance of the annealed mean from the color, in the ab plane
            ab_error_gray  mean distance of gray from the color
        """
        images = batch["image"]
        logits = self.predict(images, train=train, key=key)
        ab = _parts(lab.lab(_unit(images))[..., 1:], logits.shape[1])
        coloured = jnp.any(jnp.abs(ab) > GRAY, axis=(1, 2, 3)) & batch.get("mask", True)
        weight = jnp.sum(coloured).astype(jnp.float32)

        def mean(values: jax.Array) -> jax.Array:
            """Average [B, G, G] over the parts of the images that count."""
            by_image = jnp.mean(values.astype(jnp.float32), axis=(1, 2))
            return jnp.sum(jnp.where(coloured, by_image, 0)) / jnp.maximum(weight, 1)

        numbers, probabilities = lab.encode(ab)
        # Compared with every bin, because the gradient of indexing is a scatter, which is not
        # deterministic on GPUs.
        own = numbers[..., None] == jnp.arange(logits.shape[-1])
        target = jnp.sum(jnp.where(own, probabilities[..., None], 0), axis=-2)
        entropy = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
        nearest, counts = numbers[..., 0], self.options.counts
        if counts is None:
            loss, commonest = mean(entropy), int(lab.nearest_bin(np.zeros(2)))
        else:
            loss = mean(entropy * jnp.asarray(lab.weights(counts))[nearest])
            commonest = int(np.argmax(counts))
        return loss, {
            "loss_weight": weight,
            "cross_entropy": mean(entropy),
            "accuracy": mean(jnp.argmax(logits, axis=-1) == nearest),
            "chance": mean(nearest == commonest),
            "ab_error": mean(_length(lab.annealed_mean(logits) - ab)),
            "ab_error_gray": mean(_length(ab)),
        }

    @staticmethod
    def panel_names() -> tuple[str, ...]:
        """Return what `illustrate` shows."""
        return "the image", "what the encoder sees", "predicted colors"

    def illustrate(
        self,
        batch: dict[str, jax.Array],
        key: jax.Array,  # noqa: ARG002  # nothing is random
    ) -> tuple[tuple[jax.Array, ...], None]:
        """Return images [B, S, S, 3]: the originals, their lightness, and in predicted colors."""
        images = batch["image"]
        gray = jnp.round(255 * lab.gray(_unit(images))).astype(jnp.uint8)
        return (images, gray, self.colourize(images)), None

    def colourize(self, images: jax.Array) -> jax.Array:
        """Keep the lightness of uint8 images [B, S, S, 3] and replace their colors."""
        ab = lab.annealed_mean(self.predict(images))
        ab = jax.image.resize(ab, (*images.shape[:3], 2), "bilinear")
        lightness = lab.lab(_unit(images))[..., :1]
        rgb = lab.rgb(jnp.concatenate([lightness, ab], axis=-1))
        return jnp.round(255 * rgb).astype(jnp.uint8)


def count_colours(mixture: Sequence[tuple[Source, float]]) -> np.ndarray:
    """Count the colors of training images by bin, excluding gray images.

    Uses PRIOR_IMAGES images in total, divided between the sources by their weights and evenly
    spaced in each source. It computes in float64 with numpy, so all machines get the same counts.

    Args:
        mixture: Sources and their weights.

    Returns:
        int [Q].
    """
    total = sum(weight for _, weight in mixture)
    counts = np.zeros(lab.BINS, int)
    for source, weight in mixture:
        some = min(len(source), math.ceil(PRIOR_IMAGES * weight / total))
        for n in range(some):
            try:
                image = views.picture(source[n * len(source) // some]["image"], PRIOR_SIDE)
            except image_files.ImageError:
                continue
            ab = lab.lab(image / 255)[..., 1:]
            if np.any(np.abs(ab) > GRAY):
                numbers = lab.nearest_bin(ab).ravel()
                counts += np.bincount(numbers, minlength=lab.BINS)
    return counts


def _unit(images: jax.Array) -> jax.Array:
    """Convert uint8 images to float32 in [0, 1]."""
    return (normalize_images(images, jnp.float32) + 1) / 2


def _parts(ab: jax.Array, cells: int) -> jax.Array:
    """Average [B, S, S, 2] over the parts of a grid: [B, cells, cells, 2]."""
    means = lab.area_means(ab.shape[1], cells)
    return jnp.einsum("gs,bstc,ht->bghc", means, ab, means, precision="highest")


def _length(ab: jax.Array) -> jax.Array:
    return jnp.linalg.norm(ab, axis=-1)
