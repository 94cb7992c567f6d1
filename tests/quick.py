"""A learner that compiles at once, for tests of the loop around it."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain import learners
from cap_pretrain.learners.token_losses import mean_where

NAME = "quick"


class Quick(nnx.Module):
    """Predicts the mean token of a caption from the mean color of its image, with dropout."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`: the width of the hidden layer."""

        width: int = 4

    reads = ("image", "text")

    def __init__(self, *, options: Options, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(3, options.width, rngs=rngs)
        self.decoder = nnx.Linear(options.width, 1, rngs=rngs)

    @classmethod
    def from_config(cls, config, vocab_size: int, rngs: nnx.Rngs) -> "Quick":
        return cls(options=learners.options(config), rngs=rngs)

    def loss(self, batch, key, train: bool):
        x = self.encoder(jnp.mean(batch["image"].astype(jnp.float32), axis=(1, 2)) / 255)
        if train:
            x = x * jax.random.bernoulli(key, 0.8, x.shape) / 0.8
        text = jnp.mean(batch["text"].astype(jnp.float32), axis=1) / 100
        examples = batch.get("mask", jnp.ones(len(text), bool)).astype(jnp.float32)
        loss = mean_where((self.decoder(x)[:, 0] - text) ** 2, examples)
        return loss, {"loss_weight": jnp.sum(examples)}


learners.REGISTRY[NAME] = f"{__name__}:{Quick.__name__}"
