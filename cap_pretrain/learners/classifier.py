"""Supervised classification: linear probes with augmentation, and fine-tuning."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.learners.token_losses import mean_where, token_loss
from cap_pretrain.models import readout
from cap_pretrain.models.build import build_encoder, build_pooling
from cap_pretrain.models.convnet import BatchNorm
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.vit import MapHead
from cap_pretrain.naflex import LAYOUTS

HEADS = ("linear", "map")


class Classifier(nnx.Module):
    """An encoder and a linear layer on one vector per image, which may be pooled by attention.

    Args:
        encoder: image encoder.
        options: see `Options`; `classes` must be set.
        pool: attention pooling of the layer's tokens, for head="map"; otherwise None.

    Raises:
        UserError: The encoder has no such layer.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
            classes: Number of classes. 0 is the number of class names of the dataset.
            layer: Input of the head: "pooled", "tokens" (their mean), or the name of an encoder
                layer such as "block_6" (its mean). With head="map", all tokens, not their mean.
            head: "linear", or "map": attention pooling of the layer's tokens (Zhai et al. 2021,
                2106.04560), trained with the linear layer after it.
            batch_norm: Whether to normalize the features by a BatchNorm without scale and shift,
                as VISSL's linear probes do.
            label_smoothing: Probability mass spread evenly over the classes.
        """

        classes: int = 0
        layer: str = "pooled"
        head: str = "linear"
        batch_norm: bool = False
        label_smoothing: float = 0.0

        def __post_init__(self):
            if self.head not in HEADS:
                raise UserError(
                    f"learner.head: {self.head!r} is unknown.{did_you_mean(self.head, HEADS)}"
                )
            if self.head == "map" and self.layer == readout.POOLED:
                raise UserError(
                    "learner.layer: 'pooled' is one vector, but learner.head='map' pools tokens; "
                    "set it to 'tokens'."
                )
            if self.classes < 0:
                raise UserError(f"learner.classes: {self.classes} must not be negative.")
            if not 0 <= self.label_smoothing < 1:
                raise UserError(
                    f"learner.label_smoothing: {self.label_smoothing} is not in [0, 1)."
                )

    reads = ("image", "label")
    layouts = LAYOUTS

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        options: Options,
        pool: MapHead | None = None,
        rngs: nnx.Rngs,
    ):
        self.encoder = encoder
        if pool:
            self.pool = pool
        width = readout.width(encoder, options.layer)
        if options.batch_norm:
            self.norm = BatchNorm(width, affine=False, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.head = nnx.Linear(width, options.classes, kernel_init=zeros, rngs=rngs)
        self.options = options

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        vocab_size: int,  # noqa: ARG003  # every learner takes it
        rngs: nnx.Rngs,
    ) -> "Classifier":
        """Build the learner that `config` describes."""
        options = learners.options(config)
        if not options.classes:
            raise UserError(
                "learner.classes: the dataset does not name its classes; set their number with "
                "--config.learner.classes."
            )
        encoder, pool = build_encoder(config, rngs), None
        if options.head == "map":
            pool = build_pooling(config, readout.width(encoder, options.layer), rngs)
        return cls(encoder, options=options, pool=pool, rngs=rngs)

    def classify(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Return logits float32 [B, classes] for uint8 images [B, H, W, 3]."""
        images = normalize_images(images, jnp.float32)
        where = self.encoder, self.options.layer, images
        if self.options.head == "map":
            x = self.pool(readout.read_tokens(*where, train=train, key=key)).astype(jnp.float32)
        else:
            x = readout.read(*where, train=train, key=key)
        if self.options.batch_norm:
            x = self.norm(x, train=train)
        return self.head(x)

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Compute the mean cross-entropy of the examples that are not masked and have a label."""
        labels = batch["label"]
        logits = self.classify(batch["image"], train=train, key=key)
        counts = (labels >= 0) & batch.get("mask", True)
        return classification(
            logits, labels, counts, self.options.label_smoothing if train else 0.0
        )


def classification(
    logits: jax.Array, labels: jax.Array, counts: jax.Array, smoothing: float = 0.0
) -> tuple[jax.Array, dict[str, Any]]:
    """Compute the mean cross-entropy over the examples that count.

    Args:
        logits: float32 [B, classes].
        labels: int32 [B].
        counts: bool [B].
        smoothing: Probability mass spread evenly over the classes.

    Returns:
        The loss, and the metrics "loss_weight" and "accuracy".
    """
    weight = jnp.sum(counts).astype(jnp.float32)
    correct = jnp.argmax(logits, axis=1) == labels
    return mean_where(token_loss(logits, labels, smoothing), counts), {
        "loss_weight": weight,
        "accuracy": mean_where(correct, counts),
    }
