"""Supervised classification on an encoder: linear probes with augmentation, and fine-tuning."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners, optim
from cap_pretrain.errors import UserError
from cap_pretrain.learners.captioner import token_loss
from cap_pretrain.models import readout
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.layers import normalize_images


class Classifier(nnx.Module):
    """An encoder and a linear layer on one vector an image.

    If `optim.lr_rules` leave all of the encoder as it is, it computes as in evaluation, without
    dropout and with the BatchNorm statistics that it came with, which do not move.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
          classes: how many; 0: as many as the dataset has names for.
          layer: what the linear layer reads: pooled, tokens (their mean), or a layer of the encoder
            by its name, as block_6 (its mean).
          batch_norm: whether features are normalised first, by a BatchNorm that learns no scale and
            shift, as linear probes of VISSL are.
          label_smoothing: mass spread evenly over the classes.
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
    sum_over_batch = True

    def __init__(self, encoder: nnx.Module, *, frozen: bool, options: Options, rngs: nnx.Rngs):
        """`frozen`: whether the encoder is; of `options`, `classes` must be set."""
        self.encoder = encoder
        width = encoder.size.width
        if options.batch_norm:  # of torch, and so of VISSL: momentum 0.1 and epsilon 1e-5
            self.norm = nnx.BatchNorm(
                width, momentum=0.9, epsilon=1e-5, use_bias=False, use_scale=False, rngs=rngs
            )
        zeros = nnx.initializers.zeros
        self.head = nnx.Linear(width, options.classes, kernel_init=zeros, rngs=rngs)
        self.frozen, self.options = frozen, options

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Classifier":
        options = learners.options(config)
        if not options.classes:
            raise UserError(
                "learner.classes: the dataset does not name its classes; give "
                "--config.learner.classes, how many there are."
            )
        if options.batch_norm and config.accumulate > 1:
            raise UserError(
                f"accumulate: {config.accumulate} parts would each have statistics of their own; "
                "set accumulate=1 or learner.batch_norm=False."
            )
        encoder = build_encoder(config, rngs)
        weights = {"encoder": nnx.to_pure_dict(nnx.state(encoder, nnx.Param))}
        frozen = optim.is_frozen(config.optim, weights)
        return cls(encoder, frozen=frozen, options=options, rngs=rngs)

    def classify(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """uint8 images [B, H, W, 3] -> logits float32 [B, classes]."""
        x = readout.read(
            self.encoder,
            self.options.layer,
            normalize_images(images, jnp.float32),
            train=train and not self.frozen,
            key=key,
        )
        if self.options.batch_norm:
            x = self.norm(x, use_running_average=not train)
        return self.head(x)

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Mean cross-entropy; examples that are masked or have no label do not count."""
        labels = batch["label"]
        logits = self.classify(batch["image"], train=train, key=key)
        counts = (labels >= 0) & batch.get("mask", True)
        weight = jnp.sum(counts).astype(jnp.float32)
        smoothing = self.options.label_smoothing if train else 0.0
        loss = jnp.sum(token_loss(logits, labels, smoothing) * counts) / jnp.maximum(weight, 1)
        right = (jnp.argmax(logits, axis=1) == labels) & counts
        return loss, {
            "loss_weight": weight,
            "accuracy": jnp.sum(right) / jnp.maximum(weight, 1),
        }
