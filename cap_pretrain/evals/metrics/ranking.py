"""The rank of the right candidate among others, in expectation over the order of tied ones.

Candidates of equal score have no order, so a metric is its expectation over all orders in which
they could come: a learner that tells nothing apart gets exactly the metrics of guessing. Scores
count as equal within a tolerance, since the score of the same text rounds differently in a batch of
another shape.
"""

from typing import Any

import numpy as np

# Recorded in results as part of their protocol.
TIES = "scores that tie count as what they are worth in a random order"


def compare(
    scores: np.ndarray, reference: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Compare scores with a reference; the shapes broadcast.

    Args:
        scores: float [...].
        reference: float [...].
        tolerance: scores that differ by no more are equal.

    Returns:
        Two bool [...]: where `scores` are higher, and where they are equal. A NaN counts as higher,
        so that a diverged learner is never correct.
    """
    difference = scores - reference
    equal = np.abs(difference) <= tolerance
    return ~equal & ~(difference < 0), equal


def probability_in_top(k: int, better: Any, wrong: Any, right: Any = 1) -> np.ndarray:
    """Return the probability that a right candidate is among the first `k`.

    All arguments broadcast.

    Args:
        k: how many candidates count.
        better: number of wrong candidates that score higher than the best right one.
        wrong: number of wrong candidates that tie with it.
        right: number of right candidates that tie with it, itself included.

    Returns:
        float64 in [0, 1]: one minus the probability that wrong candidates fill all of the places
        below the better ones, drawn without replacement.
    """
    better, wrong, right = np.broadcast_arrays(better, wrong, right)
    missed = np.ones(better.shape)
    for place in range(k):
        wrong_left = np.maximum(wrong - place, 0)
        goes_wrong = wrong_left / np.maximum(wrong_left + right, 1)
        missed *= np.where(better + place < k, goes_wrong, 1.0)
    return 1.0 - missed


def expected_rank(better: Any, wrong: Any, right: Any = 1) -> np.ndarray:
    """Return the expected rank, from 1, of the first right one; see `probability_in_top`."""
    return better + (np.add(wrong, right) + 1) / np.add(right, 1)
