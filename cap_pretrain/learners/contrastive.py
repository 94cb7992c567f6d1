"""Base class of learners whose loss compares the examples of the whole batch."""

from typing import Any

import jax
from flax import nnx


class Contrastive(nnx.Module):
    """A learner that defines its loss by `embed` and `contrast`.

    With gradient accumulation (`config.accumulate`), the examples are embedded part by part but
    still compared all at once, with the gradient of the whole batch; see
    `training.step.accumulated_gradients`.
    """

    def embed(self, batch: dict[str, jax.Array], key: jax.Array, train: bool) -> Any:
        """Embed the batch: return a tree of arrays [B, ...], one row per example.

        A row may depend on other examples only through BatchNorm, whose batch is one part of the
        examples with gradient accumulation.
        """
        raise NotImplementedError

    def contrast(self, embedded: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss and metrics of the embeddings of all examples; change no variables."""
        raise NotImplementedError

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Compute the loss of a batch; masked examples are neither queries nor candidates."""
        return self.contrast(self.embed(batch, key, train))
