"""The linear probe: accuracy of a linear classifier on features of the frozen encoder."""

import dataclasses
from typing import Any

import jax
import numpy as np

from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.metrics import classification
from cap_pretrain.evals.probes import logistic, probing
from cap_pretrain.evals.probes.features import on_one_device

PROTOCOL = (
    "multinomial logistic regression on features as they are: C * sum of cross-entropies + 1/2 "
    "||kernel||^2, bias not penalised, minimised over the whole training split by L-BFGS"
)


class LinearProbe:
    """Multinomial logistic regression on cached features, with C chosen on held-out images.

    All C are fitted sequentially, from strong regularization to weak, each starting from the
    previous solution. The C with the highest top-1 on the held-out part (of equals, the smallest)
    is then fitted to the whole training split. The test split is used once, for the metrics.

    One device holds the training features and about six copies of their logits: 35 GB for ImageNet
    with 768 features. Where that is too much, set `train_limit`.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(probing.Options):
        """Settings, in addition to those of every probe.

        Attributes:
            validation_split: the split to choose C on; "" holds out a tenth of every training
                class.
            c: values to choose from, inverse strengths of the regularization as in scikit-learn's
                `LogisticRegression`. With a single value, nothing is chosen or held out.
        """

        validation_split: str = ""
        c: tuple[float, ...] = tuple(float(10 ** (e / 2)) for e in range(-12, 13))

        def __post_init__(self):
            if not self.c or min(self.c) <= 0:
                raise UserError(f"linear_probe.c: {self.c!r} must be one or more positive numbers.")

    def __init__(self, context: Context, options: Options):
        self._grid = sorted(options.c)
        choosing = len(self._grid) > 1
        self._splits = probing.Splits(
            context, options, options.validation_split if choosing else None
        )

    def work(self) -> Work:
        """Return the work of an evaluation."""
        return self._splits.work()

    def __call__(self, variables: Any) -> Result:
        """Choose C, fit the classifier and test it."""
        data = self._splits(variables)
        with on_one_device():
            return self._fit(data)

    def _fit(self, data: probing.Data) -> Result:
        problem = logistic.pose(*jax.device_put(data.train))
        shape = (data.train.features.shape[1] + 1, data.classes)
        theta = jax.device_put(np.zeros(shape, np.float32))
        c, held_out = self._grid[0], {}
        path: list[tuple[float, float]] = []
        if len(self._grid) > 1:
            c, theta, path = self._choose(problem, data, theta)
            held_out = {"held_out_top1": max(top1 for _, top1 in path)}
        solution = _solve(problem, data.final, c, theta)
        test = jax.device_put(data.test)
        scores = logistic.logits(problem, solution.theta, test.features)
        iterations = int(jax.device_get(solution.iterations))
        details = self._splits.details(data, PROTOCOL) | {
            "objective": logistic.objective(solution, c),
            "iterations": iterations,
            "converged": iterations < logistic.MAX_ITERATIONS,
            "held_out_top1_by_c": path,
        }
        train = classification.metrics(solution.logits, problem.labels, data.final)
        metrics = classification.metrics(scores, test.labels) | {"c": c}
        lines = list(self._splits.lines(data))
        if path and c in (self._grid[0], self._grid[-1]):
            lines.append(f"the best C, {c:g}, is at an end of the values tried; extend `c`")
        if not details["converged"]:
            lines.append(f"C = {c:g} did not converge in {iterations} iterations")
        return Result(metrics | held_out | {"train_top1": train["top1"]}, details, tuple(lines))

    def _choose(
        self, problem: logistic.Problem, data: probing.Data, theta: jax.Array
    ) -> tuple[float, jax.Array, list[tuple[float, float]]]:
        """Return the best C, its solution, and the held-out top-1 of each: (C, top-1)."""
        tried = []
        for c in self._grid:
            solution = _solve(problem, data.final & ~data.choose, c, theta)
            theta = solution.theta
            top1 = classification.metrics(solution.logits, problem.labels, data.choose)["top1"]
            tried.append((top1, c, theta))
        _, best, theta = max(tried, key=lambda t: t[0])  # of equals the first, the smallest C
        return best, theta, [(c, top1) for top1, c, _ in tried]


def _solve(
    problem: logistic.Problem, rows: np.ndarray, c: float, start: jax.Array
) -> logistic.Solution:
    """Fit the rows that `rows`, bool [N], selects."""
    weights, strength = jax.device_put((rows.astype(np.float32), np.float32(c)))
    return logistic.minimize(problem, weights, strength, start)
