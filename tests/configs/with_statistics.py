"""A captioner with everything that a checkpoint can hold: BatchNorm-like statistics, and EMA.

The package's learners with statistics are slow to compile. This one registers itself when its file
is loaded by `--config`, so its registry entry is the full module path.
"""

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import evals, learners
from cap_pretrain.learners.captioner import Captioner
from tests import toy

NAME = "captioner_with_statistics"


class CaptionerWithStatistics(Captioner):
    """Cap whose loss also depends on the distance of a batch's mean color to a running mean."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.color = nnx.BatchStat(jnp.zeros(3))

    def loss(self, batch, key, train):
        loss, metrics = super().loss(batch, key, train)
        color = jnp.mean(batch["image"].astype(jnp.float32) / 255, axis=(0, 1, 2))
        running = self.color[...]
        if train:
            self.color[...] = 0.9 * running + 0.1 * color
        metrics["mean_color"] = jnp.mean(running)
        return loss * (1 + jnp.sum((color - running) ** 2)), metrics


learners.REGISTRY[NAME] = "tests.configs.with_statistics:CaptionerWithStatistics"


def get_config() -> ConfigDict:
    """Return the config, at toy size."""
    c = toy.config(NAME, {"parallel_fraction": 0.75}, optim__ema=0.9)
    c.evals = ConfigDict({"val": evals.defaults("loss")})
    return c
