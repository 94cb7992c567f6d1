"""An encoder that has encoded already: its images are features that another one has stored."""

import jax

from cap_pretrain.errors import UserError
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import EncoderOutput


class Stored(ImageEncoder):
    """Passes stored features on (see tools/extract_features.py). It has no parameters.

    Args:
      width: D, of the features.
    """

    def __init__(self, width: int):
        self.width = width

    layers = {}

    def _encode(
        self, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> EncoderOutput:
        """images [B, 1 + N, D], the pooled vector and N tokens -> both.

        Where only the pooled vector is stored (N = 0), it is the one token, too.

        Raises:
          UserError: these are images.
        """
        if images.ndim != 3:
            raise UserError(
                "model.name: what was learned from stored features has no encoder to see images "
                "with; take a run that was given the encoder itself."
            )
        return EncoderOutput(images[:, 1:] if images.shape[1] > 1 else images, images[:, 0])
