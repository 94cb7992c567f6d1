"""Supervised classification: linear probes with augmentation, and fine-tuning."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners.token_losses import mean_where, token_loss
from cap_pretrain.models import readout
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.convnet import BatchNorm
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import normalize_images


class Classifier(nnx.Module):
    """An encoder and a linear layer on one vector per image.

    Args:
        encoder: image encoder.
        options: see `Options`; `classes` must be set.

    Raises:
        UserError: The encoder has no such layer.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
            classes: Number of classes. 0 is the number of class names of the dataset.
            layer: Input of the linear layer: "pooled", "tokens" (their mean), or the name of an
                encoder layer such as "block_6" (its mean).
            batch_norm: Whether to normalize the features by a BatchNorm without scale and shift,
                as VISSL's linear probes do.
            label_smoothing: Probability mass spread evenly over the classes.
        """

        classes: int = 0
        layer: str = "pooled"
        batch_norm: bool = False
        label_smoothing: float = 0.0

        def __post_init__(self):
            if self.classes < 0:
                raise UserError(f"learner.classes: {self.classes} must not be negative.")
            if not 0 <= self.label_smoothing < 1:
                raise UserError(
                    f"learner.label_smoothing: {self.label_smoothing} is not in [0, 1)."
                )

    reads = ("image", "label")

    def __init__(self, encoder: ImageEncoder, *, options: Options, rngs: nnx.Rngs):
        self.encoder = encoder
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
        return cls(build_encoder(config, rngs), options=options, rngs=rngs)

    def classify(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Return logits float32 [B, classes] for uint8 images [B, H, W, 3]."""
        x = readout.read(
            self.encoder,
            self.options.layer,
            normalize_images(images, jnp.float32),
            train=train,
            key=key,
        )
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
