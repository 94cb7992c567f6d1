"""Classification by the k nearest neighbors: how well features separate classes, untrained."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain.errors import UserError
from cap_pretrain.evals import examples
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.exhibits import COUNT, Exhibit
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.metrics import classification
from cap_pretrain.evals.probes import probing
from cap_pretrain.evals.probes.features import on_one_device

CANDIDATES, SHOWN = 64, 4
"""Test images, the first ones, of which some are shown, and so many neighbors of each."""

CHUNK = 2**26
"""Similarities computed at once: 256 MB of them."""


class KNearestNeighbours:
    """Each of the k nearest training images votes for its class by exp(cosine / temperature).

    As in Wu et al. 2018 (1805.01978, section 3.4) and DINO (2104.14294), which the default k and
    temperature are from.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(probing.Options):
        """Settings, in addition to those of every probe.

        The smaller the temperature of the votes, the more the nearest neighbors decide.
        """

        k: int = 20
        temperature: float = 0.07

        def __post_init__(self):
            for name in ("k", "temperature"):
                if getattr(self, name) <= 0:
                    raise UserError(f"knn.{name}: {getattr(self, name)} must be positive.")

    def __init__(self, context: Context, options: Options):
        self._context, self._options = context, options
        self._splits = probing.Splits(context, options)

    def work(self) -> Work:
        """Return the work of an evaluation."""
        return self._splits.work()

    def __call__(self, variables: Any) -> Result:
        """Classify the test split."""
        options, data = self._options, self._splits(variables)
        k = min(options.k, len(data.train.labels))
        with on_one_device():
            train, test, temperature = jax.device_put(
                (data.train, data.test, np.float32(options.temperature))
            )
            scores = votes(*train, test.features, temperature, k=k, classes=data.classes)
            metrics = classification.metrics(scores, test.labels)
        protocol = f"{k} nearest neighbours by cosine, weights exp(cosine / {options.temperature})"
        details, lines = self._splits.details(data, protocol), self._splits.lines(data)
        shown = examples.attempted(self._context, lambda: self._exhibits(data))
        return Result(metrics, details, lines, exhibits=shown)

    def _exhibits(self, data: probing.Data) -> Iterator[Exhibit]:
        """Yield test images beside their nearest training images."""
        sources = self._splits.sources
        for part, features in (("train", data.train), ("test", data.test)):
            if len(features.labels) != len(sources[part]):
                return  # some were left out, so rows are not the numbers of examples
        some, train = data.test.features[:CANDIDATES], data.train.features
        # In the order of the cosine: the length of the test image's features does not matter.
        lengths = np.maximum(np.linalg.norm(train, axis=1), 1e-12)
        nearest = np.argsort(-(some @ train.T) / lengths, axis=1, kind="stable")[:, :SHOWN]
        same = data.train.labels[nearest] == data.test.labels[: len(some), None]
        for k in examples.balanced({k: bool(own[0]) for k, own in enumerate(same)}, COUNT):
            found = [
                (sources["train"], int(i), self._splits.name(int(data.train.labels[i])), bool(own))
                for i, own in zip(nearest[k], same[k], strict=True)
            ]
            label = self._splits.name(int(data.test.labels[k]))
            yield examples.neighbours(sources["test"], k, label, found)


@functools.partial(jax.jit, static_argnames=("k", "classes"))
def votes(
    train: jax.Array,
    labels: jax.Array,
    test: jax.Array,
    temperature: jax.Array,
    *,
    k: int,
    classes: int,
) -> jax.Array:
    """Return the fraction of the votes for each class, float32 [M, K], for features `test` [M, D].

    `train`, float32 [N, D], and `labels`, int [N], are the training features and their classes.
    """
    train = _unit(train)

    def of_one(features):
        cosines = jnp.matmul(train, _unit(features), precision="highest")
        nearest, where = jax.lax.top_k(cosines, k)
        # Relative to the nearest, so that no temperature makes all weights 0 or infinite.
        weights = jnp.exp((nearest - nearest[0]) / temperature)
        weights = weights / jnp.sum(weights)
        return jnp.sum(weights[:, None] * jax.nn.one_hot(labels[where], classes), axis=0)

    return jax.lax.map(of_one, test, batch_size=max(1, CHUNK // len(train)))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
