"""Part of a dataset, all of it seeded: a fraction of every class, so many examples at random, at
most so many of each class, or some classes only.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cap_pretrain.data.sources.base import Example, Source, without_image
from cap_pretrain.errors import UserError

_READING_THREADS = 16  # of records that may lie on a network disk


class Subset:
    """The examples of a source at some indices, in that order. A `Source`."""

    def __init__(self, source: Source, indices: np.ndarray, what: str):
        """`what` says which they are, after the name of the source."""
        self._source, self._indices, self._what = source, indices, what
        self._numbers: dict[int, int] | None = None
        self.class_names = source.class_names

    def __str__(self) -> str:
        return f"{self._source}, {self._what}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._numbered(self._source[int(self._indices[index])])

    def without_image(self, index: int) -> Example:
        """`self[index]`, maybe without its image."""
        return self._numbered(without_image(self._source, int(self._indices[index])))

    def renumbered(self, classes: Sequence[int]) -> "Subset":
        """The same with these classes alone, to which all examples belong, as 0, 1, 2, …"""
        new = copy.copy(self)
        new._numbers = {int(label): number for number, label in enumerate(classes)}
        new.class_names = [self.class_names[label] for label in classes if self.class_names]
        return new

    def _numbered(self, example: Example) -> Example:
        if self._numbers is None:
            return example
        return example | {"label": self._numbers[example["label"]]}


def sample(source: Source, count: int, seed: int) -> Source:
    """Returns `count` examples drawn at random, in the order of the source.

    The source itself where it has no more, and for 0. The fewer are among the more.
    """
    if not count or count >= len(source):
        return source
    indices = np.random.default_rng([seed, len(source)]).permutation(len(source))[:count]
    return Subset(source, np.sort(indices), f"{count} of {len(source)} (seed {seed})")


def fraction_of(source: Source, fraction: float, seed: int) -> Source:
    """Returns a fraction of every class, at least one example of each; the source itself for 1.

    Stored datasets often lie class by class, so that the first 10% of one hold a tenth of the
    classes. The fewer examples of a smaller fraction are among those of a larger one. Every record
    is read once to learn its label.

    Raises:
        UserError: the source has no labels, or the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction: {fraction} is not in (0, 1].")
    if fraction == 1:
        return source
    labels = labels_of(source)
    if labels.min() < 0:
        raise UserError(
            f"data.fraction: {source} has examples without a label, so there are no classes to "
            'take a fraction of; name a part of the split instead, as --config.data.split="train'
            f'[:{100 * fraction:g}%]".'
        )
    indices = per_class(labels, lambda count: max(1, round(fraction * count)), seed)
    return Subset(source, indices, f"{100 * fraction:g}% of every class (seed {seed})")


@dataclasses.dataclass(frozen=True)
class ClassSizes:
    """Which classes a dataset has, by how many examples its training split has of them.

    Attributes:
        least: classes with fewer are dropped; 0: none is.
        most: so many examples of a class are drawn from the training split; 0: all.
    """

    least: int = 0
    most: int = 0

    def __bool__(self) -> bool:
        return bool(self.least or self.most)

    def of(
        self, source: Source, labels: np.ndarray, training: np.ndarray, *, drawn: int | None
    ) -> Source:
        """Returns the examples of the classes that are kept, which are numbered anew from 0.

        Who is drawn is the same each time, and the fewer are among the more.

        Args:
            source: any split.
            labels: int [N], those of `source`; -1: none, so the example is left out.
            training: int [M], those of the training split, which alone decides.
            drawn: the seed by which `most` of each class are drawn from `source`; None: all stay.

        Raises:
            UserError: no class is kept, or `source` has no example of those.
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
        told = [f"{len(classes)} of {np.count_nonzero(sizes)} classes"]
        if self.most and drawn is not None:
            kept = kept[per_class(labels[kept], lambda count: min(count, self.most), drawn)]
            capped = np.count_nonzero(sizes[classes] >= self.most)
            told.append(f"{capped} at the cap of {self.most} (seed {drawn})")
        return Subset(source, kept, ", ".join(told)).renumbered(classes)


def labels_of(source: Source) -> np.ndarray:
    """Returns int64 [N], the label of every example; reads each of them."""
    with ThreadPoolExecutor(_READING_THREADS) as threads:
        read = threads.map(lambda i: source[i]["label"], range(len(source)))
        return np.fromiter(read, np.int64, len(source))


def per_class(labels: Sequence[int], take: Callable[[int], int], seed: int) -> np.ndarray:
    """Returns the indices of `take(n)` examples drawn from the n of each class, ascending.

    Who is drawn first does not depend on `take`, so the fewer are among the more.
    """
    labels = np.asarray(labels)
    drawn = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, int(label)]).permutation(len(members))
        drawn.append(members[order[: take(len(members))]])
    return np.sort(np.concatenate(drawn))
