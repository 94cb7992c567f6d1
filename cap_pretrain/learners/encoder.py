"""A learner that only holds an encoder, for evaluation. It cannot be trained."""

import dataclasses
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain.errors import UserError
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.naflex import LAYOUTS


class Encoder(nnx.Module):
    """An encoder without a training objective."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """There are no options."""

    reads = ("image",)
    layouts = LAYOUTS

    def __init__(self, encoder: ImageEncoder):
        self.encoder = encoder

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        vocab_size: int,  # noqa: ARG003  # every learner takes it
        rngs: nnx.Rngs,
    ) -> "Encoder":
        """Build the learner that `config` describes."""
        return cls(build_encoder(config, rngs))

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        """Raise UserError: there is no loss."""
        del args, kwargs
        raise UserError(
            "learner.name: an encoder alone cannot be trained; set total_steps=0 to evaluate."
        )


class Pretrained(Encoder):
    """Placeholder for the learner in `config.encoder`, which `warm_start.resolve` replaces."""
