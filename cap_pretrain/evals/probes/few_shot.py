"""Few-shot classification: ridge regression on a few images of each class, in closed form."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain.data.sources import subset
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.metrics import classification
from cap_pretrain.evals.probes import probing
from cap_pretrain.evals.probes.features import Labelled, on_one_device

CHOOSING = 2000
"""At most about so many held-out images choose the strength of the regularization."""

_dot = functools.partial(jnp.matmul, precision="highest")


class FewShot:
    """Ridge regression to targets of 1 and -1, as in the few-shot evaluation of big_vision.

    Features are standardized by the mean and deviation of the shots. The bias is not penalized
    (big_vision penalizes it by a ten-thousandth). The strength is chosen for each number of shots,
    the same for all draws, by the mean top-1 on held-out training images. So the method sees more
    labels than the shots, but not the test split, on which the strength has often been chosen. With
    a single value of `l2` nothing is chosen; big_vision has used 1024.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(probing.Options):
        """Settings, in addition to those of every probe.

        Attributes:
            shots: training images of each class; a class that has fewer contributes all it has.
            draws: how often the shots are drawn; metrics are the mean and standard deviation.
            validation_split: the split to choose `l2` on; "" holds out a tenth of every training
                class.
            l2: strengths of the regularization to choose from.
        """

        shots: tuple[int, ...] = (1, 5, 10)
        draws: int = 5
        validation_split: str = ""
        l2: tuple[float, ...] = tuple(2.0**e for e in range(-10, 21, 2))

        def __post_init__(self):
            for name in ("shots", "l2"):
                values = getattr(self, name)
                if not values or min(values) <= 0:
                    raise UserError(f"few_shot.{name}: {values!r} must be positive numbers.")
            if self.draws < 1:
                raise UserError(f"few_shot.draws: {self.draws} must be at least 1.")

    def __init__(self, context: Context, options: Options):
        self._options = options
        choosing = len(options.l2) > 1
        self._splits = probing.Splits(
            context, options, options.validation_split if choosing else None
        )

    def work(self) -> Work:
        """Return the work of an evaluation."""
        return self._splits.work()

    def __call__(self, variables: Any) -> Result:
        """Fit the draws of each number of shots and test them."""
        data = self._splits(variables)
        with on_one_device():
            by_shots = {shots: self._evaluate(data, shots) for shots in self._options.shots}
        metrics = {}
        for shots, result in by_shots.items():
            metrics[f"top1_{shots}shot"] = float(np.mean(result["top1"]))
            metrics[f"top1_{shots}shot_std"] = float(np.std(result["top1"]))
        protocol = (
            "ridge regression to 1 and -1 on features standardised by the shots, mean and standard "
            f"deviation of top-1 over {self._options.draws} draws"
        )
        details = self._splits.details(data, protocol) | {"by_shots": by_shots}
        return Result(metrics, details, self._splits.lines(data))

    def _evaluate(self, data: probing.Data, shots: int) -> dict[str, Any]:
        """Return the chosen strength and the top-1 of every draw, with so many shots."""
        pool = np.flatnonzero(data.final & ~data.choose)
        fits = []
        for draw in range(self._options.draws):
            seed = self._options.seed * self._options.draws + draw  # distinct for all runs
            rows = pool[subset.per_class(data.train.labels[pool], lambda n: min(n, shots), seed)]
            few = jax.device_put(_rows(data.train, rows))
            fits.append(ridge(*few, classes=data.classes))
        l2, by_l2, held_out = self._options.l2[0], [], np.zeros(0, int)
        if len(self._options.l2) > 1:
            held_out = self._held_out(data)
            validation = jax.device_put(_rows(data.train, held_out))
            by_l2 = [
                (l2, float(np.mean(_top1(fits, validation, l2)))) for l2 in sorted(self._options.l2)
            ]
            l2 = max(by_l2, key=lambda pair: (pair[1], pair[0]))[0]  # of equals, the strongest
        return {
            "l2": l2,
            "held_out_top1_by_l2": by_l2,
            "held_out_images": len(held_out),
            "shots_in_all": len(rows),
            "top1": _top1(fits, jax.device_put(data.test), l2),
        }

    def _held_out(self, data: probing.Data) -> np.ndarray:
        """Return the training rows that choose the strength, about CHOOSING at most."""
        rows = np.flatnonzero(data.choose)
        fraction = min(1.0, CHOOSING / len(rows))
        labels = data.train.labels[rows]
        return rows[
            subset.per_class(labels, lambda n: max(1, round(fraction * n)), self._options.seed)
        ]


class Ridge(NamedTuple):
    """What all strengths share (D features, K classes), float32; `bias` is [K].

    Features are standardized by their mean and deviation, [D]. `values`, [R], are the eigenvalues
    of X X^T or X^T X, whichever is smaller; with `left`, [D, R], and `right`, [R, K], the kernel
    for strength l2 is left / (values + l2) @ right.
    """

    mean: jax.Array
    deviation: jax.Array
    values: jax.Array
    left: jax.Array
    right: jax.Array
    bias: jax.Array


@functools.partial(jax.jit, static_argnames="classes")
def ridge(features: jax.Array, labels: jax.Array, *, classes: int) -> Ridge:
    """Prepare the solutions for features float32 [N, D] and labels int [N]."""
    mean, deviation = jnp.mean(features, axis=0), jnp.std(features, axis=0) + 1e-5  # big_vision's
    x = (features - mean) / deviation
    y = 2 * jax.nn.one_hot(labels, classes) - 1
    bias = jnp.mean(y, axis=0)
    y = y - bias
    if x.shape[0] <= x.shape[1]:
        values, axes = jnp.linalg.eigh(_dot(x, x.T))
        left, right = _dot(x.T, axes), _dot(axes.T, y)
    else:
        values, axes = jnp.linalg.eigh(_dot(x.T, x))
        left, right = axes, _dot(axes.T, _dot(x.T, y))
    return Ridge(mean, deviation, jnp.maximum(values, 0.0), left, right, bias)


@jax.jit
def predict(ridge: Ridge, features: jax.Array, l2: jax.Array) -> jax.Array:
    """Return the outputs [M, K] of the solution of strength `l2` for features [M, D]."""
    kernel = _dot(ridge.left / (ridge.values + l2), ridge.right)
    return _dot((features - ridge.mean) / ridge.deviation, kernel) + ridge.bias


def _top1(fits: list[Ridge], data: Labelled, l2: float) -> list[float]:
    strength = jax.device_put(np.float32(l2))
    return [
        classification.metrics(predict(fit, data.features, strength), data.labels)["top1"]
        for fit in fits
    ]


def _rows(data: Labelled, rows: np.ndarray) -> Labelled:
    return Labelled(data.features[rows], data.labels[rows])
