"""A captioner with everything that a checkpoint can hold: BatchNorm-like statistics, and EMA.

What keeps statistics in the package is slow to compile. This one registers itself when its file is
read, as that of a `--config`, so it is named by its whole path.
"""

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import evals, learners
from cap_pretrain.learners.captioner import Captioner
from tests import toy

NAME = "captioner_with_statistics"


class CaptionerWithStatistics(Captioner):
    """Cap whose loss also tells how far a batch's mean colour is from the running mean of all."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.colour = nnx.BatchStat(jnp.zeros(3))

    def loss(self, batch, key, train):
        loss, metrics = super().loss(batch, key, train)
        colour = jnp.mean(batch["image"].astype(jnp.float32) / 255, axis=(0, 1, 2))
        seen = self.colour[...]
        if train:
            self.colour[...] = 0.9 * seen + 0.1 * colour
        metrics["mean_colour"] = jnp.mean(seen)
        return loss * (1 + jnp.sum((colour - seen) ** 2)), metrics


learners.REGISTRY[NAME] = "tests.configs.with_statistics:CaptionerWithStatistics"


def get_config() -> ConfigDict:
    """Returns the configuration, at toy size."""
    c = toy.config(NAME, {"parallel_fraction": 0.75}, optim__ema=0.9)
    c.evals = ConfigDict({"val": evals.defaults("loss")})
    return c
