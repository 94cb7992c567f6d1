"""Learning an encoder by telling the colours of a gray image (Zhang et al. 2016, 1603.08511).

The encoder sees nothing but lightness, as an image that is gray in all three channels. From its
tokens a linear layer tells, for each part of the image, which bin of the ab plane (see lab.py)
its colour is in, the mean over the part. Bins that are rare in the training images count more, and
images without colour do not count. Recipes set `model.colours`, so that whatever else is done with
the encoder, it goes on seeing lightness alone.
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
from cap_pretrain.data import pipeline
from cap_pretrain.data.sources.base import Source
from cap_pretrain.errors import UserError
from cap_pretrain.models import lab
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.sizes import STORED

# An image is gray if neither a nor b of any part of it is beyond this (the authors' code). That is
# half a bin: all of it would be in the bin of gray, and what is there is the noise of JPEG.
GRAY = 5.0
UNIFORM = "uniform"
# Of how many training images the colours are counted, and at which size.
PRIOR_IMAGES, PRIOR_SIDE = 1000, 16


class Colorization(nnx.Module):
    """An encoder and a linear layer that tells the colours of what each token sees."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
          upsample: each token tells the colours of so many times so many parts of its patch. The
            authors predict at a quarter of the image's side, which is 8 for a ResNet, 4 for patches
            of 16; the linear layer grows with its square.
          prior: how many colours of each bin the training images have, 261 counts with blanks
            between them, by which the bins are weighted; "uniform": all bins count alike. "" counts
            1000 of them as a run begins, and what it finds takes the place of "" (where there are
            no data, "" is as uniform).
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
                    f"leave it empty, or say {UNIFORM!r}."
                )

        @property
        def counts(self) -> np.ndarray | None:
            """`prior` as numbers [Q]; None if all bins count alike."""
            return None if self.prior in ("", UNIFORM) else np.array(self.prior.split(), float)

    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        # The authors' code (train/solver.prototxt, models/colorization_train_val_v2.prototxt). Its
        # rate is x.1 after 225,000 of 500,000 steps, and a cosine here; its windows are 176 of 256
        # pixels, and 7/8 of the image here; its weight decay is part of the gradient. VISSL judges
        # such encoders, but publishes no settings of their training.
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

    def __init__(self, encoder: ImageEncoder, *, options: Options, rngs: nnx.Rngs):
        self.encoder = encoder
        # Zeros, so that learning begins with all bins alike.
        zeros = nnx.initializers.zeros
        outputs = lab.BINS * options.upsample**2
        self.head = nnx.Linear(encoder.width, outputs, kernel_init=zeros, rngs=rngs)
        self.options = options

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Colorization":
        return cls(build_encoder(config, rngs), options=learners.options(config), rngs=rngs)

    @staticmethod
    def settled(config: ConfigDict, mixture: Sequence[tuple[Source, float]]) -> dict[str, Any]:
        """The fields of `config.learner` that the training images settle."""
        if config.learner.prior or config.model.name == STORED:
            return {}
        counts = count_colours(mixture)
        return {"prior": " ".join(map(str, counts))} if counts.any() else {}

    def predict(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """uint8 images [B, S, S, 3] -> logits float32 [B, G, G, Q], for G x G parts of each.

        Raises:
          UserError: the encoder's tokens are no square grid.
        """
        gray = 2 * lab.gray(_unit(images)) - 1
        x = self.encoder(gray, train=train, key=key).tokens.astype(jnp.float32)
        batch, count, _ = x.shape
        side, r = math.isqrt(count), self.options.upsample
        if count - side**2 > 1:
            raise UserError(
                f"model.name: the {count} tokens of this encoder are no square grid, whose parts "
                "could be coloured."
            )
        # A token before those of the grid is that of the class.
        x = self.head(x[:, count - side**2 :])
        x = x.reshape(batch, side, side, r, r, lab.BINS).swapaxes(2, 3)
        return x.reshape(batch, side * r, side * r, lab.BINS)

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Mean weighted cross-entropy over the parts of images; gray and masked ones do not count.

        Metrics: `cross_entropy`, without weights; `accuracy`, how often the likeliest bin is the
        right one, and `chance`, how often the commonest of the training images is; `ab_error`, how
        far the annealed mean is from the colour in the ab plane, and `ab_error_gray`, how far gray
        is.
        """
        images = batch["image"]
        logits = self.predict(images, train=train, key=key)
        ab = _parts(lab.lab(_unit(images))[..., 1:], logits.shape[1])
        coloured = jnp.any(jnp.abs(ab) > GRAY, axis=(1, 2, 3)) & batch.get("mask", True)
        weight = jnp.sum(coloured).astype(jnp.float32)

        def mean(values: jax.Array) -> jax.Array:
            """Over the parts of images that count, [B, G, G] -> scalar."""
            by_image = jnp.mean(values.astype(jnp.float32), axis=(1, 2))
            return jnp.sum(jnp.where(coloured, by_image, 0)) / jnp.maximum(weight, 1)

        numbers, shares = lab.encode(ab)
        # Compared with every bin: indexing has a scatter for its gradient, not exact on GPUs.
        own = numbers[..., None] == jnp.arange(logits.shape[-1])
        target = jnp.sum(jnp.where(own, shares[..., None], 0), axis=-2)
        entropy = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
        right, counts = numbers[..., 0], self.options.counts
        if counts is None:
            loss, commonest = mean(entropy), int(lab.nearest_bin(np.zeros(2)))
        else:
            loss = mean(entropy * jnp.asarray(lab.weights(counts))[right])
            commonest = int(np.argmax(counts))
        return loss, {
            "loss_weight": weight,
            "cross_entropy": mean(entropy),
            "accuracy": mean(jnp.argmax(logits, axis=-1) == right),
            "chance": mean(right == commonest),
            "ab_error": mean(_length(lab.annealed_mean(logits) - ab)),
            "ab_error_gray": mean(_length(ab)),
        }

    def colourize(self, images: jax.Array) -> jax.Array:
        """uint8 images [B, S, S, 3] -> uint8 of their lightness and the colours it makes of it."""
        ab = lab.annealed_mean(self.predict(images))
        ab = jax.image.resize(ab, (*images.shape[:3], 2), "bilinear")
        lightness = lab.lab(_unit(images))[..., :1]
        rgb = lab.rgb(jnp.concatenate([lightness, ab], axis=-1))
        return jnp.round(255 * rgb).astype(jnp.uint8)


def count_colours(mixture: Sequence[tuple[Source, float]]) -> np.ndarray:
    """Counts the colours of images of each bin, int [Q], but of those that are gray.

    PRIOR_IMAGES of a mixture are looked at, of each of its members as many as its weight says and
    evenly spread over it. It is done in float64 by numpy, so that any machine finds the same.
    """
    total = sum(weight for _, weight in mixture)
    counts = np.zeros(lab.BINS, int)
    for source, weight in mixture:
        some = min(len(source), math.ceil(PRIOR_IMAGES * weight / total))
        for n in range(some):
            try:
                image = pipeline.picture(source[n * len(source) // some]["image"], PRIOR_SIDE)
            except image_files.ImageError:
                continue
            ab = lab.lab(image / 255)[..., 1:]
            if np.any(np.abs(ab) > GRAY):
                numbers = lab.nearest_bin(ab).ravel()
                counts += np.bincount(numbers, minlength=lab.BINS)
    return counts


def _unit(images: jax.Array) -> jax.Array:
    """uint8 -> float32 in [0, 1]."""
    return (normalize_images(images, jnp.float32) + 1) / 2


def _parts(ab: jax.Array, cells: int) -> jax.Array:
    """[B, S, S, 2] -> [B, cells, cells, 2]: means over the parts of a grid."""
    means = lab.area_means(ab.shape[1], cells)
    return jnp.einsum("gs,bstc,ht->bghc", means, ab, means, precision="highest")


def _length(ab: jax.Array) -> jax.Array:
    return jnp.linalg.norm(ab, axis=-1)
