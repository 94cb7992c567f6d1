"""Where the right candidate stands among others, with ties counted as what they are.

Candidates of equal score have no order, so a figure is its expectation over all orders that they
could come in: a learner that tells nothing apart has exactly the figures of guessing. Scores count
as equal within a tolerance, since the same text rounds otherwise in a batch of another shape.
"""

from typing import Any

import numpy as np

TIES = "scores that tie count as what they are worth in a random order"


def compare(
    scores: np.ndarray, reference: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where `scores` are higher than `reference`, and where they are equal to it.

    Takes arrays whose shapes broadcast, returns two of bool. What is not a number counts as higher,
    so that a learner that has diverged is never right.
    """
    difference = scores - reference
    equal = np.abs(difference) <= tolerance
    return ~equal & ~(difference < 0), equal


def share_in_top(k: int, better: Any, wrong: Any, right: Any = 1) -> np.ndarray:
    """The chance that a right candidate is among the first `k`; all arguments broadcast.

    Args:
      k: how many candidates count.
      better: number of wrong candidates that score higher than the best right one.
      wrong: number of wrong candidates that tie with it.
      right: number of right candidates that tie with it, itself included.

    Returns:
      float64 in [0, 1]: one minus the chance that every place which the better ones leave goes to a
      wrong one, in a draw without replacement.
    """
    better, wrong, right = np.broadcast_arrays(better, wrong, right)
    missed = np.ones(better.shape)
    for place in range(k):
        wrong_left = np.maximum(wrong - place, 0)
        goes_wrong = wrong_left / np.maximum(wrong_left + right, 1)
        missed *= np.where(better + place < k, goes_wrong, 1.0)
    return 1.0 - missed


def expected_rank(better: Any, wrong: Any, right: Any = 1) -> np.ndarray:
    """The expected place, from 1 on, of the first right candidate; arguments as `share_in_top`."""
    return better + (np.add(wrong, right) + 1) / np.add(right, 1)
