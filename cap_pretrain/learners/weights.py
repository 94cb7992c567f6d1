"""Weights of losses, which change during a run."""

import dataclasses

import jax
import jax.numpy as jnp

from cap_pretrain.data import weights


@dataclasses.dataclass(frozen=True)
class Weight(weights.Weight):
    """A weight that a training step computes."""

    def at(self, progress: jax.Array | None) -> jax.Array | float:
        """Return the weight at a share of the run, float32 []; None is the end."""
        if self.constant or progress is None:
            return self.last
        shares, values = zip(*self.points, strict=True)
        return jnp.interp(progress, jnp.float32(shares), jnp.float32(values))
