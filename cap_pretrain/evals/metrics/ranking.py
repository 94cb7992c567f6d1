"""The rank of the right candidate among others, in expectation over the order of tied ones.

Candidates of equal score have no order, so a metric is its expectation over all orders in which
they could come: a learner that tells nothing apart gets exactly the metrics of guessing. Scores
within a tolerance are equal, since rounding depends on the shape of the batch.
"""

from typing import Any

import numpy as np

# Recorded in results as part of their protocol.
TIES = "scores that tie count as what they are worth in a random order"


def compare(
    scores: np.ndarray, reference: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return where scores are higher than a reference and where equal, bool; the shapes broadcast.

    Scores that differ by no more than `tolerance` are equal. A NaN counts as higher, so that a
    diverged learner is never correct.
    """
    difference = scores - reference
    equal = np.abs(difference) <= tolerance
    return ~equal & ~(difference < 0), equal


def probability_in_top(k: int, better: Any, wrong: Any, right: Any = 1) -> np.ndarray:
    """Return the probability, float64, that a right candidate is among the first `k`.

    It is one minus the probability that wrong candidates fill all of the places below the better
    ones, drawn without replacement. All arguments broadcast.

    Args:
        k: how many candidates count.
        better: number of wrong candidates that score higher than the best right one.
        wrong: number of wrong candidates that tie with it.
        right: number of right candidates that tie with it, itself included.
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
