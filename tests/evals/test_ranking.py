"""Ties count as their expectation over random orders."""

import itertools

import numpy as np
import pytest

from cap_pretrain.evals.metrics import ranking


def over_all_orders(metric, better, wrong, right):
    """Return the mean of `metric(places of right candidates)` over all orders of the tied ones."""
    orders = set(itertools.permutations("w" * wrong + "r" * right))
    return np.mean([metric(better + o.index("r") + 1) for o in orders])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_probability_in_top_is_the_mean_over_all_orders_of_the_tied(k):
    cases = list(itertools.product(range(4), range(5), range(1, 4)))
    expected = [over_all_orders(lambda place: place <= k, *case) for case in cases]
    better, wrong, right = np.array(cases).T
    found = ranking.probability_in_top(k, better, wrong, right)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.max() == 1.0 and (k > 3 or found.min() == 0.0)  # without ties, exactly


def test_expected_rank_is_the_mean_over_all_orders_of_the_tied():
    cases = list(itertools.product(range(3), range(5), range(1, 4)))
    expected = [over_all_orders(lambda place: place, *case) for case in cases]
    better, wrong, right = np.array(cases).T
    np.testing.assert_allclose(ranking.expected_rank(better, wrong, right), expected)


def test_guessing_has_the_metrics_of_guessing():
    assert ranking.probability_in_top(5, 0, 999, 1) == pytest.approx(5 / 1000)
    assert ranking.probability_in_top(1, 0, 4995, 5) == pytest.approx(5 / 5000)
    assert ranking.expected_rank(0, 999, 1) == 500.5


def test_scores_are_equal_within_the_tolerance_and_what_is_no_number_is_higher():
    scores = np.array([1.0, 1.25, 1.5, 0.75, 0.5, np.nan, np.inf, -np.inf])
    higher, equal = ranking.compare(scores, np.float64(1.0), 0.25)
    assert higher.tolist() == [False, False, True, False, False, True, True, False]
    assert equal.tolist() == [True, True, False, True, False, False, False, False]
    assert ranking.compare(scores, np.float64(np.nan), 0.25)[0].all()
