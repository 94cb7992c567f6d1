"""Weights of losses, which change during a run, and weights of metrics in a mean."""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp

from cap_pretrain.data import weights

LOSS_WEIGHT = "loss_weight"


def is_weight(name: str) -> bool:
    """Return whether a metric is the weight of others in a mean over batches or their parts."""
    return name.endswith("_weight")


def has_own(name: str, metrics: Collection[str]) -> bool:
    """Return whether there is a weight for this metric alone, besides that of the loss."""
    return f"{name}_weight" in metrics and not name.endswith("loss")


def weight_of(name: str, metrics: Collection[str]) -> str:
    """Return which of the metrics is the weight of one in a mean over batches or their parts.

    That is NAME_weight if it is among them, else the weight of the loss of the joint learner's part
    that the metric is about, PART/loss_weight, or of the whole loss.
    """
    part = f"{name.partition('/')[0]}/{LOSS_WEIGHT}"
    return next((own for own in (f"{name}_weight", part) if own in metrics), LOSS_WEIGHT)


@dataclasses.dataclass(frozen=True)
class Weight(weights.Weight):
    """A weight that a training step computes."""

    def at(self, progress: jax.Array | None) -> jax.Array | float:
        """Return the weight at a share of the run, float32 []; None is the end."""
        if self.constant or progress is None:
            return self.last
        shares, values = zip(*self.points, strict=True)
        return jnp.interp(progress, jnp.float32(shares), jnp.float32(values))
