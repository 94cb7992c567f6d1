"""The interface of a dataset: a random-access sequence of captioned or labeled images.

A source is a picklable sequence. `source[i]` is one example, as it is stored:

    image: bytes (an encoded file), uint8 [H, W, 3], or float [1 + N, D] (features of an encoder,
        see tools/extract_features.py)
    captions: list[str], possibly empty
    label: int, -1 if there is none
    id: str
    question: str, which the captions answer; missing or "" if there is none. The label and the
        class names then are those of question types.
    weights: list[float], relative probabilities of drawing each caption; missing or empty if equal
    origins: list[int], which feature of `data.fields.captions` holds each caption; missing if that
        names one

    regions: list of (phrase, box), see `data.regions`; missing or empty if there are none

A generated source may have a method `regions(index)` in place of the last, which is called only
where regions are read.

`source.class_names` lists the names of the labels and is empty if there are none. A source may also
have what these functions of this module call, each of which says what holds without it:
`without_image`, `block_bounds`, `read_ahead` and `example_bytes`.

To add a generated dataset, write a class like this in a new file and register it in
`open.GENERATED`. All stored datasets are read by `tfds.TfdsSource`.
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from cap_pretrain.data.weights import Weight, never
from cap_pretrain.errors import UserError

Example = dict[str, Any]

DEFAULT_FIELDS = {name: name for name in ("image", "captions", "label", "id", "question")}
"""Field -> feature of a stored dataset that holds it; "a/b" is feature b inside feature a.

Captions may come from several features, as in "caption:2+alt_text": first a feature is drawn by its
weight (1 if omitted), then one of its captions. Empty strings are not captions. A weight may change
during a run, "alt_text:1@0,0@0.5+caption" (see `data.origins`)."""

INFO_FILE = "dataset_info.json"


class NoSplitError(UserError):
    """A dataset has no split of that name; `splits` are the names of those it has."""

    def __init__(self, message: str, splits: Iterable[str]):
        super().__init__(message)
        self.splits = tuple(splits)


class Source(Protocol):
    """What the input pipeline needs of a dataset."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def without_image(source: Source, index: int) -> Example:
    """Return `source[index]`, without its image where the source can skip reading it."""
    return getattr(source, "without_image", source.__getitem__)(index)


def block_bounds(source: Source, size: int) -> np.ndarray:
    """Return where the blocks of a source begin, and its length: int64 [n + 1], ascending from 0.

    A block is a run of examples that are stored and fetched together, at most `size` of them;
    Parquet's row groups are blocks of any size. The blocks of a stored source do not cross files.
    By default every `size` examples are a block.
    """
    own = getattr(source, "block_bounds", None)
    return own(size) if own else file_bounds([len(source)], size)


def file_bounds(ends: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """Return `block_bounds` of a source whose files end at the examples `ends`, ascending."""
    files = zip([0, *ends], ends, strict=False)
    starts = [np.arange(start, end, size, dtype=np.int64) for start, end in files]
    return np.append(np.concatenate(starts), np.int64(ends[-1]))


def read_ahead(source: Source, ranges: Sequence[tuple[int, int]]) -> None:
    """Announce the example ranges (start, stop) that are read next, the most urgent first.

    A source on remote storage fetches them in the background, within its budget, and may drop what
    is not among them. By default nothing happens. The process that iterates over batches calls
    this, not its worker processes, whenever the ranges change.
    """
    own = getattr(source, "read_ahead", None)
    if own:
        own(ranges)


def example_bytes(source: Source) -> float:
    """Return the mean number of bytes that are stored, and fetched, for an example; 0: unknown."""
    return float(getattr(source, "example_bytes", 0.0))


def parse_mixture(text: str, field: str = "data.name") -> list[tuple[str, float]]:
    """Split "a:0.2+b:0.8" into [("a", 0.2), ("b", 0.8)]; an omitted weight is 1.

    The text after the last colon is a weight only if it is a number, so paths and versions
    ("coco_captions:1.1.0") may contain colons. Paths must not contain "+". Raises UserError, which
    names the config field, if a name is empty, or a weight is not positive and finite.
    """
    return [_parse_weighted(part.strip(), f"{field} {text!r}") for part in text.split("+")]


def parse_captions(text: str) -> list[tuple[str, Weight]]:
    """Split `data.fields.captions` into features and their weights, as `parse_mixture` does.

    A weight may be points WEIGHT@SHARE joined by commas, and then be 0, but not all at a time.
    """
    field, found = "data.fields.captions", []
    for part in text.split("+"):
        name, colon, points = part.strip().rpartition(":")
        if colon and "@" in points:
            found.append((name.strip(), Weight.parse(points, field)))
        else:
            name, weight = _parse_weighted(part.strip(), f"{field} {text!r}")
            found.append((name, Weight(((0.0, weight),))))
    if not all(name for name, _ in found):
        raise UserError(f"{field} {text!r}: a name is empty; write name:weight+name:weight.")
    empty = never([weight for _, weight in found])
    if empty is not None:
        raise UserError(f"{field} {text!r}: all weights are 0 at {empty:g} of the run.")
    return found


def mixed(found: Sequence[Sequence[str]], weights: Sequence[Weight]) -> dict[str, list]:
    """Return `captions` of several features, with `weights` and `origins`.

    A weight that changes during a run counts as at its end.

    Args:
        found: The captions of each feature.
        weights: The weight of each feature, which its captions share.
    """
    return {
        "captions": [caption for own in found for caption in own],
        "weights": [
            weight.last / len(own) for own, weight in zip(found, weights, strict=True) for _ in own
        ],
        "origins": [origin for origin, own in enumerate(found) for _ in own],
    }


def _parse_weighted(part: str, where: str) -> tuple[str, float]:
    name, weight = part, 1.0
    before, colon, after = part.rpartition(":")
    if colon:
        with contextlib.suppress(ValueError):  # not a number: the colon belongs to the name
            name, weight = before.strip(), float(after)
    if not name:
        raise UserError(f"{where}: a name is empty; write name:weight+name:weight.")
    if not (weight > 0 and math.isfinite(weight)):
        raise UserError(f"{where}: the weight of {name!r} is {weight}; it must be > 0.")
    return name, weight
