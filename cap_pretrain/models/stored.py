"""A stand-in encoder for datasets of stored features instead of images."""

from types import MappingProxyType

import jax

from cap_pretrain.errors import UserError
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import EncoderOutput


class Stored(ImageEncoder):
    """Returns stored features unchanged (see tools/extract_features.py). It has no parameters.

    Args:
        width: D, width of the features.
    """

    layers = MappingProxyType({})

    def __init__(self, width: int):
        self.width = width

    def _encode(
        self,
        images: jax.Array,
        *,
        train: bool,  # noqa: ARG002  # nothing is computed
        key: jax.Array | None = None,  # noqa: ARG002  # nothing is computed
    ) -> EncoderOutput:
        """Split stored features [B, 1 + N, D] into the pooled vector and N tokens.

        If only the pooled vector is stored (N = 0), it also serves as the only token.

        Raises:
            UserError: The input is images.
        """
        if images.ndim != 3:
            raise UserError(
                "model.name: a model trained on stored features has no encoder for images; use a "
                "run that was trained with the encoder itself."
            )
        return EncoderOutput(images[:, 1:] if images.shape[1] > 1 else images, images[:, 0])
