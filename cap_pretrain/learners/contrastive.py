"""What learners have in common whose loss compares the examples of the whole batch."""

from typing import Any

import jax
from flax import nnx


class Contrastive(nnx.Module):
    """A learner that says what is compared (`embed`) and how (`contrast`); its loss is both.

    Where memory is short (`config.accumulate`), examples are embedded part by part and compared
    all the same, with the gradient of the whole batch; see `step.accumulated_gradients`.
    """

    def embed(self, batch: dict[str, jax.Array], key: jax.Array, train: bool) -> Any:
        """What is compared: a tree of arrays [B, …], a row for each example of the batch.

        An example's may depend on others only as with BatchNorm, which then sees a part of them.
        """
        raise NotImplementedError

    def contrast(self, embedded: Any) -> tuple[jax.Array, dict[str, Any]]:
        """The loss, and metrics, of what `embed` made of all examples; changes no variables."""
        raise NotImplementedError

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The loss of a batch; masked examples are neither queries nor candidates."""
        return self.contrast(self.embed(batch, key, train))
