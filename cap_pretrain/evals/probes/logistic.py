"""Full-batch multinomial logistic regression by preconditioned L-BFGS.

The objective is that of scikit-learn's `LogisticRegression`, with C the inverse strength:

    C * sum_i weight_i * cross_entropy_i  +  1/2 * ||kernel||^2        (the bias is not penalized)

Its minimum is unique. The following only makes the solver reach it fast, in float32:

- Features are centered; the bias compensates.
- L-BFGS is preconditioned by the curvature of the problem. If all probabilities are equal, the
  Hessian is that of least squares; otherwise it is roughly that times the mean p (1 - p). So the
  eigenvectors of the features' covariance, computed once, precondition every solution: features of
  any scale take the same tens of iterations, where plain L-BFGS takes thousands.
- The objective is convex, and along a line only the logits change. So Newton's method minimizes
  along a line from logits alone, and an iteration passes over the features twice. It finds a zero
  of the slope: in float32, comparing values of the objective would end the search early.
- The residual of the true class is the sum of the other classes' probabilities, not one minus its
  own, so that it keeps its precision for rows that are nearly certain.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 1e-9
"""The solver stops when the expected decrease of the objective is below this fraction of it."""

MAX_ITERATIONS = 1000
"""The solver stops after so many in any case: some ten times what has been needed."""

HISTORY = 10
"""Number of steps in the history of L-BFGS, as in SciPy."""

_dot = functools.partial(jnp.matmul, precision="highest")


class Problem(NamedTuple):
    """Labeled features (labels int32 [N]) and what is computed once for all solutions, float32.

    `x`, [N, D], is the features minus their `mean`, [D]; `axes`, [D, D], are the eigenvectors of
    the covariance, in columns, and `variances`, [D], its eigenvalues.
    """

    x: jax.Array
    labels: jax.Array
    mean: jax.Array
    axes: jax.Array
    variances: jax.Array


class Solution(NamedTuple):
    """A minimum of the objective.

    Attributes:
        theta: float32 [D + 1, K], the kernel and, in the last row, the bias, for centered features.
        logits: float32 [N, K], of every row of the problem, whatever its weight.
        losses: float32 [N], the cross-entropy of each row times its weight.
        iterations: int32; MAX_ITERATIONS if it did not converge.
    """

    theta: jax.Array
    logits: jax.Array
    losses: jax.Array
    iterations: jax.Array


class _History(NamedTuple):
    """The last steps and changes of the gradient, the newest first; unused entries are zero."""

    steps: jax.Array
    changes: jax.Array
    inverse_curvatures: jax.Array


@jax.jit
def pose(features: jax.Array, labels: jax.Array) -> Problem:
    """Prepare a problem from features float32 [N, D] and labels int32 [N]."""
    mean = jnp.mean(features, axis=0)
    x = features - mean
    variances, axes = jnp.linalg.eigh(_dot(x.T, x) / len(x))
    return Problem(x, labels, mean, axes, jnp.maximum(variances, 0.0))


@jax.jit
def minimize(problem: Problem, weights: jax.Array, c: jax.Array, start: jax.Array) -> Solution:
    """Return the minimum of the objective for a problem from `pose` and the scalar C.

    `weights`, float32 [N], are those of the rows; 0 leaves a row out. `start`, float32 [D + 1, K],
    is the initial theta: zeros, or that of another solution.
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
        # Adding a constant to all classes changes nothing, so the mean is 0 except for rounding;
        # in the bias, which is not penalized, rounding errors would accumulate.
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

    def state_at(theta, z, g, history, iterations):
        direction = -_inverse_hessian(preconditioner(z), history, g)
        return theta, z, g, history, iterations, direction, jnp.sum(direction * g)

    def unconverged(state):
        theta, z, _, _, iterations, _, slope = state
        decrease = -slope / 2
        return (decrease > TOLERANCE * objective(theta, z)) & (iterations < MAX_ITERATIONS)

    def iterate(state):
        theta, z, g, history, iterations, direction, slope = state
        along = _dot(x, direction[:-1]) + direction[-1]
        penalty = jnp.sum(theta[:-1] * direction[:-1]), jnp.sum(direction[:-1] ** 2)
        t = _line_search(z, along, own, c * weights, penalty, slope)
        theta, z = theta + t * direction, z + t * along
        change = -g + (g := gradient(theta, z))
        return state_at(theta, z, g, _append(history, t * direction, change), iterations + 1)

    z = logits(start)
    empty = jnp.zeros((HISTORY, *start.shape))
    history = _History(empty, empty, jnp.zeros(HISTORY))
    state = state_at(start, z, gradient(start, z), history, jnp.int32(0))
    theta, _, _, _, iterations, _, _ = jax.lax.while_loop(unconverged, iterate, state)
    z = logits(theta)  # without the rounding errors that the steps have accumulated
    return Solution(theta, z, losses(z), iterations)


@jax.jit
def logits(problem: Problem, theta: jax.Array, features: jax.Array) -> jax.Array:
    """Return the logits [M, K] of a solution for other features [M, D]."""
    return _dot(features - problem.mean, theta[:-1]) + theta[-1]


def objective(solution: Solution, c: float) -> float:
    """Return the objective at a solution, summed in float64."""
    losses, theta = jax.device_get((solution.losses, solution.theta))
    penalty = np.sum(np.square(theta[:-1], dtype=np.float64)) / 2
    return float(c * np.sum(losses, dtype=np.float64) + penalty)


def _inverse_hessian(precondition: Callable, history: _History, g: jax.Array) -> jax.Array:
    """Multiply the approximate inverse Hessian by `g`: the two-loop recursion of Nocedal (1980)."""

    def back(q, entry):
        step, change, inverse = entry
        alpha = inverse * jnp.sum(step * q)
        return q - alpha * change, alpha

    def forth(r, entry):
        step, change, inverse, alpha = entry
        return r + (alpha - inverse * jnp.sum(change * r)) * step, None

    newest = history.changes[0]
    size = history.inverse_curvatures[0] * jnp.sum(newest * precondition(newest))
    q, alphas = jax.lax.scan(back, g, history)
    r = precondition(q) / jnp.where(size > 0, size, 1.0)
    return jax.lax.scan(forth, r, (*history, alphas), reverse=True)[0]


def _append(history: _History, step: jax.Array, change: jax.Array) -> _History:
    """Put an entry in front of the history; the oldest drops out."""
    curvature = jnp.sum(step * change)
    inverse = jnp.where(curvature > 0, 1 / curvature, 0.0)
    return jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest[:-1]]),
        _History(step, change, inverse),
        history,
    )


def _pick(own: jax.Array, values: jax.Array) -> jax.Array:
    """Return the value of each row's true class, [N, 1], of values [N, K]."""
    return jnp.sum(jnp.where(own, values, 0.0), axis=1, keepdims=True)


def _line_search(
    z: jax.Array,
    along: jax.Array,
    own: jax.Array,
    weights: jax.Array,
    penalty: tuple[jax.Array, jax.Array],
    slope: jax.Array,
) -> jax.Array:
    """Return the step size t at which the slope has fallen to a tenth, by safeguarded Newton steps.

    `z` are the logits at t = 0 and `along` their change per unit of t, float32 [N, K]; `own`, bool
    [N, K], the one-hot classes; `weights`, float32 [N], of the rows, times C; `slope` is that at
    the start. The penalty's slope at t is penalty[0] + t * penalty[1].
    """
    along = along - _pick(own, along)

    def slopes(t):
        p = jax.nn.softmax(z + t * along)
        mean = jnp.sum(p * along, axis=1, keepdims=True)
        variance = jnp.sum(p * (along - mean) ** 2, axis=1)
        first = jnp.sum(weights * mean[:, 0]) + penalty[0] + t * penalty[1]
        return first, jnp.sum(weights * variance) + penalty[1]

    def too_steep(state):
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
    return jax.lax.while_loop(too_steep, iterate, state)[0]
