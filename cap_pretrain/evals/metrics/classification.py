"""Classification accuracy: top-1, top-5 and the mean over classes of top-1."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain.evals.metrics import ranking


@jax.jit
def count_better_and_tied(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Count the wrong classes that score above the true one, and those that tie: int32 [N] each.

    Scores are float [N, K], labels int [N]. A NaN counts as a higher score, so that a diverged
    classifier is never correct.
    """
    own = jnp.take_along_axis(scores, labels[:, None], axis=1)
    tied = jnp.sum(scores == own, axis=1) - 1
    return jnp.sum(~(scores <= own), axis=1), jnp.maximum(tied, 0)


def accuracies(better: np.ndarray, tied: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return `top1`, `top5` and `mean_per_class`, the mean of top-1 over classes with images.

    `better` and `tied`, int [N], are from `count_better_and_tied`; `labels`, int [N], are the true
    classes.
    """
    top1 = ranking.probability_in_top(1, better, tied)
    per_class = [top1[labels == k].mean() for k in np.unique(labels)]
    return {
        "top1": float(top1.mean()),
        "top5": float(ranking.probability_in_top(5, better, tied).mean()),
        "mean_per_class": float(np.mean(per_class)),
    }


def metrics(scores: Any, labels: Any, rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """Return the `accuracies` of some rows of `scores` [N, K] with `labels` [N]."""
    better, tied, labels = jax.device_get((*count_better_and_tied(scores, labels), labels))
    return accuracies(better[rows], tied[rows], labels[rows])
