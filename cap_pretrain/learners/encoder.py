"""An encoder alone, which learns nothing: for evaluation."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain.errors import UserError
from cap_pretrain.models.build import build_encoder


class Encoder(nnx.Module):
    """Nothing but an encoder."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """There are none."""

    reads = ("image",)

    def __init__(self, encoder: nnx.Module):
        self.encoder = encoder

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Encoder":
        return cls(build_encoder(config, rngs))

    def loss(self, batch: dict[str, jax.Array], key: jax.Array, train: bool) -> Any:
        raise UserError("learner: an encoder alone learns nothing; set total_steps=0 to evaluate.")


class Pretrained(Encoder):
    """Stands for what `config.encoder` holds, until `initial.resolve` has put that in its place."""
