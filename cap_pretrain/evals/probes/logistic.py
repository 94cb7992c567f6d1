"""Multinomial logistic regression of the whole batch, by preconditioned L-BFGS.

The objective is that of scikit-learn's `LogisticRegression`, with C the inverse strength:

    C * sum_i weight_i * cross_entropy_i  +  1/2 * ||kernel||^2        (the bias is not penalised)

Its minimum is one point, and what follows only decides how soon it is reached, in float32:

- Features are centred, which the bias makes up for.
- L-BFGS starts from the curvature of the problem. When all probabilities are equal, the Hessian is
  that of least squares; otherwise the same times how undecided they are, roughly. So the
  eigenvectors of the features' covariance, found once, precondition every solution: features of any
  scale take the same tens of iterations, where plain L-BFGS takes thousands.
- The objective is convex, and along a line only logits change. So Newton's method finds the minimum
  along a line from logits alone, and an iteration passes over the features twice. It looks for a
  zero of the slope: to compare values of the objective would end the search early, in float32.
- What is wrong about a probability is added up from those of the other classes, not subtracted from
  one, so that rows which are nearly certain still count for what they are.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 1e-9
"""A solution ends when a step promises to lower the objective by less than this share of it."""

MAX_ITERATIONS = 1000
"""And after so many in any case, some ten times what has been seen to be needed."""

HISTORY = 10
"""Steps that L-BFGS remembers, as in SciPy."""

_dot = functools.partial(jnp.matmul, precision="highest")


class Problem(NamedTuple):
    """Labelled features, and what is found of them once for every solution.

    Attributes:
      x: float32 [N, D], centred.
      labels: int32 [N].
      mean: float32 [D], what was subtracted.
      axes: float32 [D, D], eigenvectors of the covariance, in columns.
      variances: float32 [D], its eigenvalues.
    """

    x: jax.Array
    labels: jax.Array
    mean: jax.Array
    axes: jax.Array
    variances: jax.Array


class Solution(NamedTuple):
    """A minimum.

    Attributes:
      theta: float32 [D + 1, K], kernel and, last, bias, for centred features.
      logits: float32 [N, K] of every row of the problem, whatever its weight.
      losses: float32 [N], cross-entropy of each row times its weight.
      iterations: int32; MAX_ITERATIONS if it did not converge.
    """

    theta: jax.Array
    logits: jax.Array
    losses: jax.Array
    iterations: jax.Array


class _History(NamedTuple):
    """The last steps and changes of the gradient, the newest first; zeros where there is none."""

    steps: jax.Array
    changes: jax.Array
    inverse_curvatures: jax.Array


@jax.jit
def pose(features: jax.Array, labels: jax.Array) -> Problem:
    """Prepares a problem from features float32 [N, D] and labels int32 [N]."""
    mean = jnp.mean(features, axis=0)
    x = features - mean
    variances, axes = jnp.linalg.eigh(_dot(x.T, x) / len(x))
    return Problem(x, labels, mean, axes, jnp.maximum(variances, 0.0))


@jax.jit
def minimise(problem: Problem, weights: jax.Array, c: jax.Array, start: jax.Array) -> Solution:
    """Returns the minimum of the objective.

    Args:
      problem: from `pose`.
      weights: float32 [N] of the rows; 0 leaves a row out.
      c: the scalar C.
      start: float32 [D + 1, K], where to begin: zeros, or `theta` of another solution.
    """
    x, classes = problem.x, start.shape[1]
    own = jax.nn.one_hot(problem.labels, classes, dtype=bool)

    def logits(theta):
        return _dot(x, theta[:-1]) + theta[-1]

    def losses(z):
        others = jnp.where(own, -jnp.inf, z - _pick(own, z))
        return weights * jax.nn.softplus(jax.nn.logsumexp(others, axis=1))

    def objective(theta, z):
        return c * jnp.sum(losses(z)) + jnp.sum(theta[:-1] ** 2) / 2

    def gradient(theta, z):
        wrong = jnp.where(own, 0.0, jax.nn.softmax(z))
        residual = c * weights[:, None] * (wrong - own * jnp.sum(wrong, axis=1, keepdims=True))
        g = jnp.concatenate(
            [_dot(x.T, residual) + theta[:-1], jnp.sum(residual, axis=0, keepdims=True)]
        )
        # To add the same to all classes changes nothing, so the mean is 0 but for rounding; and
        # nothing would hold back what adds up of it in the bias.
        return g - jnp.mean(g, axis=1, keepdims=True)

    def preconditioner(z):
        p = jax.nn.softmax(z)
        undecided = jnp.sum(weights[:, None] * p * (1 - p)) / (classes - 1)  # N / K if p = 1 / K
        steepness = c * jnp.maximum(undecided, 1e-12)
        scale = 1 / (steepness * problem.variances + 1)

        def apply(g):
            kernel = _dot(problem.axes, scale[:, None] * _dot(problem.axes.T, g[:-1]))
            return jnp.concatenate([kernel, g[-1:] / steepness])

        return apply

    def aim(theta, z, g, history, iterations):
        direction = -_inverse_hessian(preconditioner(z), history, g)
        return theta, z, g, history, iterations, direction, jnp.sum(direction * g)

    def goes_on(state):
        theta, z, _, _, iterations, _, slope = state
        promised = -slope / 2
        return (promised > TOLERANCE * objective(theta, z)) & (iterations < MAX_ITERATIONS)

    def iterate(state):
        theta, z, g, history, iterations, direction, slope = state
        along = _dot(x, direction[:-1]) + direction[-1]
        penalty = jnp.sum(theta[:-1] * direction[:-1]), jnp.sum(direction[:-1] ** 2)
        t = _line_search(z, along, own, c * weights, penalty, slope)
        theta, z = theta + t * direction, z + t * along
        change = -g + (g := gradient(theta, z))
        return aim(theta, z, g, _remember(history, t * direction, change), iterations + 1)

    z = logits(start)
    nothing = jnp.zeros((HISTORY, *start.shape))
    history = _History(nothing, nothing, jnp.zeros(HISTORY))
    state = aim(start, z, gradient(start, z), history, jnp.int32(0))
    theta, _, _, _, iterations, _, _ = jax.lax.while_loop(goes_on, iterate, state)
    z = logits(theta)  # without the rounding that the steps have added up
    return Solution(theta, z, losses(z), iterations)


@jax.jit
def logits(problem: Problem, theta: jax.Array, features: jax.Array) -> jax.Array:
    """The logits [M, K] that a solution gives other features [M, D]."""
    return _dot(features - problem.mean, theta[:-1]) + theta[-1]


def objective(solution: Solution, c: float) -> float:
    """The objective at a solution, added up in float64."""
    losses, theta = jax.device_get((solution.losses, solution.theta))
    penalty = np.sum(np.square(theta[:-1], dtype=np.float64)) / 2
    return float(c * np.sum(losses, dtype=np.float64) + penalty)


def _inverse_hessian(precondition: Callable, history: _History, g: jax.Array) -> jax.Array:
    """The inverse Hessian as the history has it, times `g`: the two loops of Nocedal (1980)."""

    def back(q, remembered):
        step, change, inverse = remembered
        share = inverse * jnp.sum(step * q)
        return q - share * change, share

    def forth(r, remembered):
        step, change, inverse, share = remembered
        return r + (share - inverse * jnp.sum(change * r)) * step, None

    newest = history.changes[0]
    size = history.inverse_curvatures[0] * jnp.sum(newest * precondition(newest))
    q, shares = jax.lax.scan(back, g, history)
    r = precondition(q) / jnp.where(size > 0, size, 1.0)
    return jax.lax.scan(forth, r, (*history, shares), reverse=True)[0]


def _remember(history: _History, step: jax.Array, change: jax.Array) -> _History:
    curvature = jnp.sum(step * change)
    inverse = jnp.where(curvature > 0, 1 / curvature, 0.0)
    return jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest[:-1]]),
        _History(step, change, inverse),
        history,
    )


def _pick(own: jax.Array, values: jax.Array) -> jax.Array:
    """[N, K] -> [N, 1], the value of each row's own class."""
    return jnp.sum(jnp.where(own, values, 0.0), axis=1, keepdims=True)


def _line_search(
    z: jax.Array,
    along: jax.Array,
    own: jax.Array,
    weights: jax.Array,
    penalty: tuple[jax.Array, jax.Array],
    slope: jax.Array,
) -> jax.Array:
    """How far to go from logits z [N, K] in the direction `along`, to where it is nearly level.

    Args:
      z, along: float32 [N, K].
      own: bool [N, K], the class of each row.
      weights: float32 [N].
      penalty: what it adds to the slope at t: penalty[0] + t * penalty[1].
      slope: at t = 0; a tenth of it is nearly level.
    """
    along = along - _pick(own, along)

    def slopes(t):
        p = jax.nn.softmax(z + t * along)
        mean = jnp.sum(p * along, axis=1, keepdims=True)
        variance = jnp.sum(p * (along - mean) ** 2, axis=1)
        first = jnp.sum(weights * mean[:, 0]) + penalty[0] + t * penalty[1]
        return first, jnp.sum(weights * variance) + penalty[1]

    def goes_on(state):
        _, _, _, (first, _), tries = state
        return (jnp.abs(first) > 0.1 * jnp.abs(slope)) & (tries < 20)

    def iterate(state):
        t, low, high, (first, second), tries = state
        low, high = jnp.where(first < 0, t, low), jnp.where(first < 0, high, t)
        newton = t - first / second
        between = jnp.where(jnp.isinf(high), 2 * t, (low + high) / 2)
        t = jnp.where((newton > low) & (newton < high), newton, between)
        return t, low, high, slopes(t), tries + 1

    t = jnp.float32(1)
    state = (t, jnp.float32(0), jnp.float32(jnp.inf), slopes(t), jnp.int32(0))
    return jax.lax.while_loop(goes_on, iterate, state)[0]
