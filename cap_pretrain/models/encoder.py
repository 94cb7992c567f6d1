"""Base class of all image encoders."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models import lab
from cap_pretrain.models.layers import EncoderOutput

COLOURS = ("rgb", "lightness")


class ImageEncoder(nnx.Module):
    """A network that maps images to tokens and one pooled vector.

    Subclasses implement `_encode` and `_tokens_at`.

    Attributes:
        width: D, width of the tokens and the pooled vector.
        layers: Widths of the layers that `tokens_at` accepts, by name, from first to last.
        leading: Number of tokens before those of the patches: 1 with a class token.
        frozen: Whether to compute as in evaluation during training, too. Set by `learners.build`.
        colours: Colors that the encoder sees, one of COLOURS: "rgb", or "lightness", which replaces
            each pixel by the gray of the same lightness. Set by `build_encoder`.
    """

    width: int
    layers: Mapping[str, int]
    leading = 0
    frozen = False
    colours = "rgb"

    def __call__(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> EncoderOutput:
        """Encode images.

        Args:
            images: float [B, H, W, 3] in [-1, 1]; a ViT also encodes `native.Patches`.
            train: Whether to use dropout and batch statistics.
            key: Random key for dropout and dropped tokens in training. None disables both.

        Returns:
            tokens [B, N, D] and pooled [B, D]; see `EncoderOutput`.
        """
        train = train and not self.frozen
        return self._encode(self._seen(images), train=train, key=key if train else None)

    def _encode(self, images: jax.Array, *, train: bool, key: jax.Array | None) -> EncoderOutput:
        raise NotImplementedError

    def tokens_at(self, layer: str, images: jax.Array) -> jax.Array:
        """Return the output [B, N, D'] of a layer, without computing later layers."""
        return self._tokens_at(layer, self._seen(images))

    def _tokens_at(self, layer: str, images: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _seen(self, images: jax.Array) -> jax.Array:
        if self.colours == "rgb":
            return images
        gray = lab.gray((images.astype(jnp.float32) + 1) / 2)
        return (2 * gray - 1).astype(images.dtype)
