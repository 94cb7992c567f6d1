"""Datasets whose examples are numbered through a list of files: splits, blocks and errors."""

import bisect
import hashlib
import itertools
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cap_pretrain.data.sources import passes, storage
from cap_pretrain.data.sources.base import Example, NoSplitError, file_bounds
from cap_pretrain.data.sources.listing import Listing, NoSuchSplit, find
from cap_pretrain.data.sources.metadata import listed
from cap_pretrain.data.sources.storage import why
from cap_pretrain.errors import UserError


def find_split(pattern: str, split: str, suffix: str, where: str) -> Listing:
    """Return the files of a split as "train[:90%]"; raises NoSplitError, see `listing.find`."""
    name = split.strip().partition("[")[0]
    if "+" in split:
        raise UserError(f"{where}: split {split!r}: several splits are not joined here; name one.")
    try:
        return find(pattern, name, suffix, where)
    except NoSuchSplit as error:
        raise NoSplitError(
            f"{where}: no split {name!r}; it has {listed(error.splits)}.", error.splits
        ) from error


def part(split: str, count: int, where: str) -> tuple[int, int]:
    """Return the first example and the one after the last of a split as "train[10%:90%]"."""
    from tensorflow_datasets.core import splits

    infos = {"train": types.SimpleNamespace(num_examples=count, shard_lengths=[count])}
    bracket = split.strip().partition("[")[1:]
    try:
        (found,) = splits.ReadInstruction.from_spec("train" + "".join(bracket)).to_absolute(infos)
    except (ValueError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["no split"])[-1]
        raise UserError(f"{where}: split {split!r} is not valid ({reason}).") from error
    start, stop = found.from_ or 0, count if found.to is None else found.to
    if start >= stop:
        raise UserError(f"{where}: split {split!r} is empty; choose another.")
    return start, stop


def own_folder(listing: Listing, cache: str) -> Path:
    """Return the folder of what was found out about these very files."""
    about = (str(listing.root), [(f.name, f.size, f.stamps) for f in listing.files])
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    return storage.cache_folder(cache) / f"files-{digest}"


def answers_folder(listing: Listing, fields: Mapping[str, str], cache: str) -> Path:
    """Return the folder of `passes.kept` for these very files."""
    return passes.answers_folder(own_folder(listing, cache), fields)


class Numbered:
    """A part of the examples of files that hold `counts` of them; subclasses read one.

    Blocks never span two files. `splits` are the names of all splits there are, and `answers` is
    the folder of `passes.kept`.
    """

    class_names: list[str]
    in_blocks = True  # what is held out is whole blocks, which are fetched or decoded as such

    def __init__(
        self, where: str, split: str, listing: Listing, counts: Sequence[int], answers: Path
    ):
        self._where, self._split, self._listing, self.answers = where, split, listing, answers
        self.splits = listing.splits
        self._ends = list(itertools.accumulate(counts))
        total = self._ends[-1] if self._ends else 0
        if not total:
            raise UserError(f"{where}: has no usable example; name other files.")
        self._start, self._stop = part(split, total, where)
        self.example_bytes = listing.size / total
        self.class_names = []

    def __str__(self) -> str:
        return f"{self._where}, split {self._split!r}"

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Example:
        return self._example(index, image=True)

    def without_image(self, index: int) -> Example:
        """Return `self[index]` with an empty image."""
        return self._example(index, image=False)

    def block_bounds(self, size: int) -> np.ndarray:
        """Return where blocks of at most `size` examples begin, anew at each file."""
        return file_bounds(self._within(self._ends), size)

    def _within(self, ends: Sequence[int]) -> np.ndarray:
        """Return where runs of examples end that end at `ends` of all files, int64 [n]."""
        inner = np.unique(np.clip(np.asarray(ends, np.int64), self._start, self._stop))
        return inner[inner > self._start] - self._start

    def _place(self, index: int) -> tuple[int, int]:
        """Return the file of example `index`, and its number in the file."""
        number = self._start + index
        file = bisect.bisect_right(self._ends, number)
        return file, number - (self._ends[file - 1] if file else 0)

    def _spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return (file, first, end) for the parts in each file of examples `start` to `stop`."""
        found = []
        while start < stop:
            file, first = self._place(start)
            count = min(stop - start, self._ends[file] - self._start - start)
            found.append((file, first, first + count))
            start += count
        return found

    def _example(self, index: int, *, image: bool) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file, number = self._place(int(index))
        try:
            example = self._read(file, number, image=image)
            if self.class_names and not -1 <= example["label"] < len(self.class_names):
                raise ValueError(
                    f"its label is {example['label']} of {len(self.class_names)} classes"
                )
            return example
        except UserError:
            raise
        except Exception as error:  # parsers raise nearly anything on corrupt bytes
            name = self._listing.files[file].name
            raise UserError(
                f"{self}: example {index} in {name} cannot be read ({why(error)}); copy or make "
                "that file again."
            ) from error

    def _read(self, file: int, number: int, *, image: bool) -> Example:
        """Return example `number` of a file, with b"" for its image unless `image`."""
        raise NotImplementedError
