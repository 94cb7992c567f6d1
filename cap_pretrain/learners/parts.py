"""Learners that can share an encoder: their loss follows from the encoder's output.

A `Part` computes its loss in three steps, so that several parts can share the first:

    encoded = part.encode(images, train=train, key=part.encoder_key(key))
    rows = part.rows(encoded, batch, key, train)     a tree of arrays [B, ...]
    loss, metrics = part.reduce(rows)                over the examples of the whole batch

`joint.Joint` composes any of them.
"""

from typing import Any, ClassVar

import jax
from flax import nnx

from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import EncoderOutput


class Part(nnx.Module):
    """A learner whose loss follows from one pass of its encoder over the images of a batch.

    Attributes:
        encoder: The image encoder, which may belong to other parts, too.
        reads: The parts of a batch that it reads.
        joins: Whether it can be trained with others on one encoder.
        reads_encoded: Whether its rows depend on that pass, or only on others that it makes.
    """

    encoder: ImageEncoder
    reads: tuple[str, ...]
    joins: ClassVar[bool] = True
    reads_encoded: ClassVar[bool] = True

    def encode(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> EncoderOutput:
        """Encode uint8 images [B, H, W, 3]; `key` is for dropout in training."""
        raise NotImplementedError

    def encoder_key(self, key: jax.Array) -> jax.Array:
        """Return the key of the encoder's pass, from the random key of the loss."""
        raise NotImplementedError

    def rows(
        self, encoded: EncoderOutput, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> Any:
        """Return what the loss needs of each example, a tree of arrays [B, ...].

        Args:
            encoded: The encoder's output for `batch["image"]`; if `reads_encoded` is False, None.
            batch: What `reads` names, and optionally "mask" bool [B], False for padding examples.
            key: The random key of the loss.
            train: Whether to compute the training loss.
        """
        raise NotImplementedError

    def reduce(self, rows: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Return the scalar loss and metrics from the rows of all examples; change no variables."""
        raise NotImplementedError

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return the scalar loss of a batch and a dict of scalar metrics.

        Masked examples do not count.
        """
        encoded = self.encode(batch["image"], train=train, key=self.encoder_key(key))
        return self.reduce(self.rows(encoded, batch, key, train))
