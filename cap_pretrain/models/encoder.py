"""What an image encoder is, whatever it is made of."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models import lab
from cap_pretrain.models.layers import EncoderOutput

COLOURS = ("rgb", "lightness")


class ImageEncoder(nnx.Module):
    """Images in, tokens and one pooled vector out.

    Attributes:
      width: D, of tokens and pooled vector.
      layers: those whose output `tokens_at` gives, first to last: the width of each by its name.
      frozen: whether it computes as in evaluation in training, too; `learners.build` sets it.
      colours: what it sees of images, one of COLOURS: all, or "lightness", the gray of the same
        lightness in all three channels, whatever it is given; `build_encoder` sets it.
    """

    width: int
    layers: Mapping[str, int]
    frozen = False
    colours = "rgb"

    def __call__(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> EncoderOutput:
        """images [B, H, W, 3] float in [-1, 1] -> tokens [B, N, D], pooled [B, D].

        Args:
          images: normalised.
          train: whether to compute as in training, with dropout and the batch's own statistics.
          key: for what is random then; None leaves it out.
        """
        train = train and not self.frozen
        return self._encode(self._seen(images), train=train, key=key if train else None)

    def _encode(self, images: jax.Array, *, train: bool, key: jax.Array | None) -> EncoderOutput:
        raise NotImplementedError

    def tokens_at(self, layer: str, images: jax.Array) -> jax.Array:
        """images as for `__call__` -> [B, N, D'] as they leave a layer; those above do not run."""
        return self._tokens_at(layer, self._seen(images))

    def _tokens_at(self, layer: str, images: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _seen(self, images: jax.Array) -> jax.Array:
        if self.colours == "rgb":
            return images
        gray = lab.gray((images.astype(jnp.float32) + 1) / 2)
        return (2 * gray - 1).astype(images.dtype)
