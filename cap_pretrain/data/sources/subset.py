"""Seeded parts of a dataset: random examples, parts of every class, or large enough classes."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cap_pretrain.data.regions import Region, regions_of
from cap_pretrain.data.sources import base, passes
from cap_pretrain.data.sources.base import Example, Source, without_image
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import console

HELD_OUT, HELD_OUT_MOST = 0.05, 10_000
"""The part of a dataset without a validation split that is held out, and its largest number."""

_READING_THREADS = 16  # the records may lie on a network disk

# Up to so many examples, those held out are the first of a permutation of all, which takes 8 bytes
# for each. Beyond, they are drawn one by one.
_PERMUTED = 2**26


class AllBut:
    """The indices below `count` but for `left_out`, int64 [m] ascending; only these m are held.

    It has the length and the elements of an array of the others, which `np.asarray` makes.
    """

    def __init__(self, count: int, left_out: np.ndarray):
        self._count, self._left_out = count, left_out
        self._kept_before = left_out - np.arange(len(left_out))

    def __len__(self) -> int:
        return self._count - len(self._left_out)

    def __getitem__(self, position: int) -> int:
        return position + int(np.searchsorted(self._kept_before, position, side="right"))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        del copy  # the array is always new
        return np.delete(np.arange(self._count), self._left_out).astype(dtype or np.int64)

    def searchsorted(self, bounds: np.ndarray) -> np.ndarray:
        """Return how many of the indices are below each of `bounds`, as an array's method does."""
        return bounds - np.searchsorted(self._left_out, bounds)


class Subset:
    """The examples of a source at `indices`, int [n]; `str` adds `description`. A `Source`.

    Its blocks are those of the source, as far as they hold examples of the subset. What lies
    between two examples of a block is fetched with them, so `indices` should be ascending.

    If a part of the dataset is held out (`divided`), `held_out` is its size, and `note` a line for
    the log.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray | AllBut,
        description: str,
        note: str = "",
        held_out: int = 0,
    ):
        self.note: str = note or getattr(source, "note", "")
        self.held_out: int = held_out or getattr(source, "held_out", 0)
        self.answers: Path | None = getattr(source, "answers", None)  # see `passes.kept`
        self._source, self._indices, self._description = source, indices, description
        self._numbers: dict[int, int] | None = None
        self.class_names = source.class_names

    def __str__(self) -> str:
        return f"{self._source}, {self._description}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._relabeled(self._source[int(self._indices[index])])

    def without_image(self, index: int) -> Example:
        """Return `self[index]`, without its image where the source can skip reading it."""
        return self._relabeled(without_image(self._source, int(self._indices[index])))

    def regions(self, index: int) -> list[Region]:
        """Return the regions of `self[index]` that its source computes; see `regions_of`."""
        return regions_of(self._source, int(self._indices[index]), {})

    def block_bounds(self, size: int) -> np.ndarray:
        """Return the bounds of the source's blocks within the subset; see `base.block_bounds`."""
        bounds = self._indices.searchsorted(base.block_bounds(self._source, size))
        return bounds[np.flatnonzero(np.diff(bounds, prepend=-1))]

    def read_ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Announce ranges to the source; see `base.read_ahead`."""
        indices = self._indices
        spans = [(int(indices[a]), int(indices[b - 1]) + 1) for a, b in ranges if a < b]
        base.read_ahead(self._source, spans)

    @property
    def example_bytes(self) -> float:
        """Bytes of the source for each example of the subset; see `base.example_bytes`."""
        return base.example_bytes(self._source) * len(self._source) / max(1, len(self))

    def renumbered(self, classes: np.ndarray) -> "Subset":
        """Return this subset with `classes`, which must cover all examples, as labels 0, 1, …."""
        new = copy.copy(self)
        new._numbers = {int(label): number for number, label in enumerate(classes)}
        new.class_names = [self.class_names[label] for label in classes if self.class_names]
        return new

    def _relabeled(self, example: Example) -> Example:
        if self._numbers is None:
            return example
        return example | {"label": self._numbers[example["label"]]}


def sample(source: Source, count: int, seed: int) -> Source:
    """Return `count` random examples in the order of the source.

    A smaller sample with the same seed is part of a larger one. If `count` is 0, or not less than
    the number of examples, the source itself is returned.
    """
    if not count or count >= len(source):
        return source
    indices = np.random.default_rng([seed, len(source)]).permutation(len(source))[:count]
    return Subset(source, np.sort(indices), f"{count} of {len(source)} (seed {seed})")


def divided(source: Source, most: int = -1) -> tuple[Subset, Subset]:
    """Divide a dataset that has no validation split; return its training part and the rest.

    `most` examples are drawn at random with a fixed seed, so that they are the same in every run on
    this dataset; -1: HELD_OUT of them, at most HELD_OUT_MOST. Of a source with `in_blocks`, blocks
    are drawn. Raises UserError if it has only one example.
    """
    count = len(source)
    if count < 2:
        raise UserError(
            f"data.eval_split: {source} has one example, so none can be held out; name a split."
        )
    if most < 0:
        most = min(HELD_OUT_MOST, max(1, int(HELD_OUT * count)))
    most = min(most, count - 1)
    held_out = _drawn(source, most)
    note = (
        f"{source}, is the only split: {most:,} of its {count:,} examples are held out of training "
        "as 'val', the same in every run; set data.held_out or data.eval_split to choose others."
    )
    return (
        Subset(source, AllBut(count, held_out), f"all but {most} held-out examples", note, most),
        Subset(source, held_out, f"{most} held-out examples", note, most),
    )


def _drawn(source: Source, most: int) -> np.ndarray:
    """Draw `most` examples, int64 [most] ascending; whole blocks if the source asks for them."""
    count = len(source)
    rng = np.random.default_rng([0, count])
    if getattr(source, "in_blocks", False):
        # At least some 32 blocks, if they are not larger by themselves.
        bounds = base.block_bounds(source, max(1, min(passes.BLOCK, most // 32)))
        order = rng.permutation(len(bounds) - 1)
        last = int(np.searchsorted(np.cumsum(np.diff(bounds)[order]), most))
        runs = [np.arange(bounds[block], bounds[block + 1]) for block in order[: last + 1]]
        return np.sort(np.concatenate(runs)[:most])
    if count <= _PERMUTED:
        return np.sort(rng.permutation(count)[:most])
    return np.sort(rng.choice(count, most, replace=False, shuffle=False))


def fraction_of(source: Source, fraction: float, seed: int) -> Source:
    """Return a fraction of every class, at least one example of each; the source itself for 1.

    Stored datasets are often sorted by class, so that the first 10% hold only a tenth of the
    classes. A smaller fraction with the same seed is part of a larger one. Every record is read
    once. Raises UserError if an example has no label, or the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction: {fraction} is not in (0, 1].")
    if fraction == 1:
        return source
    labels = labels_of(source)
    if labels.min() < 0:
        raise UserError(
            f"data.fraction: {source} has examples without a label, so there are no classes to "
            'take a fraction of; use a part of the split instead: --config.data.split="train'
            f'[:{100 * fraction:g}%]".'
        )
    indices = per_class(labels, lambda count: max(1, round(fraction * count)), seed)
    return Subset(source, indices, f"{100 * fraction:g}% of every class (seed {seed})")


@dataclasses.dataclass(frozen=True)
class ClassSizes:
    """Bounds on the number of training examples of a class; 0 means no bound.

    Classes with fewer than `least` in the training split are dropped, and at most `most` of each
    class are drawn from the training split.
    """

    least: int = 0
    most: int = 0

    def __bool__(self) -> bool:
        return bool(self.least or self.most)

    def of(
        self, source: Source, labels: np.ndarray, training: np.ndarray, *, drawn: int | None
    ) -> Source:
        """Return the examples of the classes that are kept, with labels renumbered from 0.

        `labels`, int [N], are those of `source`, any split; examples with -1 (no label) are left
        out. `training`, int [M], are those of the training split, which decide what classes are
        kept. `drawn` is the seed for drawing `most` of each class, for which a smaller `most` draws
        part of a larger one; None keeps all. Raises UserError if no class or example is kept.
        """
        sizes = np.bincount(training[training >= 0])
        classes = np.flatnonzero(sizes >= max(self.least, 1))
        if not len(classes):
            largest = f"the largest has {sizes.max()}" if len(sizes) else "there are no labels"
            raise UserError(
                f"data.class_min: {source} has no class with {self.least} examples to train on; "
                f"{largest}."
            )
        kept = np.flatnonzero(np.isin(labels, classes))
        if not len(kept):
            raise UserError(f"data.class_min: {source} has no example of the classes that remain.")
        notes = [f"{len(classes)} of {np.count_nonzero(sizes)} classes"]
        if self.most and drawn is not None:
            kept = kept[per_class(labels[kept], lambda count: min(count, self.most), drawn)]
            capped = np.count_nonzero(sizes[classes] >= self.most)
            notes.append(f"{capped} at the cap of {self.most} (seed {drawn})")
        return Subset(source, kept, ", ".join(notes)).renumbered(classes)


def labels_of(source: Source) -> np.ndarray:
    """Return the labels of all examples, int64 [N]; every example is read, see `passes`."""

    def read() -> np.ndarray:
        labels = np.empty(len(source), np.int64)
        label = lambda index: without_image(source, index)["label"]
        doing = console.doing(f"Reading the labels of {len(source):,} examples of {source}")
        with doing, ThreadPoolExecutor(_READING_THREADS) as threads:
            for run in passes.whole(source):
                labels[run.start : run.stop] = list(threads.map(label, run))
        return labels

    return passes.kept(source, "labels", read)


def per_class(labels: np.ndarray, take: Callable[[int], int], seed: int) -> np.ndarray:
    """Draw `take(n)` of the n examples of each class; return their indices, ascending, int [n].

    The order of drawing does not depend on `take`, so a smaller draw is part of a larger one.
    """
    drawn = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, int(label)]).permutation(len(members))
        drawn.append(members[order[: take(len(members))]])
    return np.sort(np.concatenate(drawn))
