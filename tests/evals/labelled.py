"""Labeled images of separable classes, and a context to probe them in."""

import dataclasses
from typing import Any

import numpy as np

from cap_pretrain.distributed import sharding
from cap_pretrain.evals.base import Context
from tests import tiny
from tests.evals.stubs import Numbers


class Coloured:
    """Images of noise in which class k of K is somewhat brighter in one corner and color channel.

    Images in `broken` cannot be decoded. The images are sorted by class, as in many datasets.
    """

    def __init__(self, count: int, classes: int, *, seed: int = 0, clear: int = 40, broken=()):
        self.class_names = [f"class {k}" for k in range(classes)]
        self._seed, self._count, self._clear, self._broken = seed, count, clear, broken

    def __str__(self):
        return f"coloured {self._seed}"

    def __len__(self):
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = index * len(self.class_names) // self._count
        rng = np.random.default_rng([self._seed, index])
        image = rng.integers(60, 160, (tiny.SIDE, tiny.SIDE, 3), np.uint8)
        half = tiny.SIDE // 2
        rows, columns = half * (label // 3 % 2), half * (label // 6 % 2)
        image[rows : rows + half, columns : columns + half, label % 3] += np.uint8(self._clear)
        return {
            "image": b"broken" if index in self._broken else image,
            "captions": [],
            "label": label,
            "id": str(index),
        }


@dataclasses.dataclass(frozen=True)
class Among(Context):
    """A context with one dataset for each name of a split."""

    sources: Any = None

    def source(self, split: str = "", data: str = ""):
        return self.sources[split or self.config.data.eval_split]


def context(train: Any, test: Any, *, workdir: Any = None, mesh: Any = None, **more: Any):
    """Return a context for a tiny captioner with random weights, and its variables."""
    c = tiny.config()
    graphdef, *variables = tiny.split(c)
    mesh = mesh or sharding.make_mesh(c)
    sources = {"train": train, "val": test} | more
    made = Among(c, graphdef, Numbers(), mesh, workdir=workdir, sources=sources)
    return made, tuple(variables)
