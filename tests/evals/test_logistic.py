"""Logistic regression against scikit-learn's, and on problems that are hard for the latter."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cap_pretrain.evals.probes import logistic


def problem(n=300, d=20, classes=4, apart=0.6, seed=0):
    """Return features of very different scales, far from 0, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n).astype(np.int32)
    features = apart * rng.standard_normal((classes, d))[labels] + rng.standard_normal((n, d))
    features = features @ rng.standard_normal((d, d)) * np.exp(rng.standard_normal(d)) + 3
    return features.astype(np.float32), labels


def solve(features, labels, c, weights=None, classes=None, start=None):
    weights = np.ones(len(labels), np.float32) if weights is None else weights
    if start is None:
        start = np.zeros((features.shape[1] + 1, classes or labels.max() + 1), np.float32)
    posed = logistic.pose(features, labels)
    return posed, logistic.minimize(posed, weights, np.float32(c), start)


def reference(features, labels, c, **kwargs):
    """Return scikit-learn's solution in float64 and the objective at it."""
    model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-9)
    model.fit(features.astype(np.float64), labels, **kwargs)
    loss = -model.predict_log_proba(features.astype(np.float64))[np.arange(len(labels)), labels]
    loss = loss * kwargs.get("sample_weight", 1.0)
    return model, c * np.sum(loss) + 0.5 * np.sum(model.coef_**2)


@pytest.mark.parametrize("c", [1e-3, 1.0, 30.0])
def test_minimum_is_that_of_scikit_learn(c):
    features, labels = problem()
    other, _ = problem(seed=1)
    posed, found = solve(features, labels, c)
    model, least = reference(features, labels, c)
    assert logistic.objective(found, c) == pytest.approx(least, rel=1e-6)
    assert found.iterations < 150
    np.testing.assert_allclose(found.theta[:-1], model.coef_.T, atol=2e-3 * abs(model.coef_).max())
    mine = np.argmax(logistic.logits(posed, found.theta, other), axis=1)
    assert np.mean(mine == model.predict(other)) > 0.99


def test_rows_count_by_their_weight_and_not_at_all_with_weight_zero():
    features, labels = problem()
    weights = np.random.default_rng(1).integers(0, 3, len(labels)).astype(np.float32)
    assert (weights == 0).any()
    _, weighted = solve(features, labels, 0.3, weights)
    _, least = reference(features, labels, 0.3, sample_weight=weights)
    assert logistic.objective(weighted, 0.3) == pytest.approx(least, rel=1e-6)


def test_separable_classes_and_hardly_any_regularisation():
    features, labels = problem(apart=3.0)
    _, found = solve(features, labels, 1e4)
    assert found.iterations < 200
    _, least = reference(features, labels, 1e4)
    # Losses are some 1e-6: in float32, 1 - p has hardly any precision.
    assert logistic.objective(found, 1e4) == pytest.approx(least, rel=1e-3)
    assert (np.argmax(found.logits, axis=1) == labels).all()


def test_it_can_start_from_another_solution():
    features, labels = problem()
    _, cold = solve(features, labels, 1.0)
    _, warm = solve(features, labels, 1.0, start=cold.theta)
    assert warm.iterations <= 1 < cold.iterations
    assert logistic.objective(warm, 1.0) == pytest.approx(logistic.objective(cold, 1.0), rel=1e-7)


def test_constant_features_and_absent_classes_do_no_harm():
    features, labels = problem()
    with_constant = np.concatenate([features, np.full((300, 2), 7, np.float32)], axis=1)
    _, found = solve(with_constant, labels, 1.0, classes=6)
    _, least = reference(features, labels, 1.0)
    assert np.isfinite(found.theta).all()
    np.testing.assert_allclose(found.theta[20:22], 0, atol=1e-5)
    assert not np.isin(np.argmax(found.logits, axis=1), (4, 5)).any()
    # Two absent classes cost little, as their biases can decrease without bound.
    assert least <= logistic.objective(found, 1.0) + 1e-3
    assert logistic.objective(found, 1.0) == pytest.approx(least, rel=1e-3)


def test_nothing_is_sent_to_other_devices_on_the_way():
    features, labels = jax.device_put(problem())
    start = jax.device_put(np.zeros((21, 4), np.float32))
    weights, c = jax.device_put((np.ones(300, np.float32), np.float32(1)))
    with jax.transfer_guard("disallow"):
        logistic.minimize(logistic.pose(features, labels), weights, c, start)
