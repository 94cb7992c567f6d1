"""Where examples come from: random-access sequences of captioned (or labelled) images.

A source is a picklable sequence. `source[i]` is one example, as it is stored:

    {"image": bytes (an encoded file) | uint8 [H, W, 3] | float [1 + N, D] (features, see
     tools/extract_features.py), "captions": list[str] (may be empty),
     "label": int (-1: none), "id": str, "question": str,
     "weights": list[float] (how often each caption is drawn; missing or empty: all alike)}

and `source.class_names` lists the names of the labels (empty: none). A question (missing or "":
none) is what the captions answer; then label and class names are those of kinds of questions. A new
kind of source is one new file with such a class and one entry in `_GENERATED`; everything stored
goes through TFDS. It may have `without_image(i)`, the rest of an example where that takes less.
"""

import contextlib
import math
from typing import Any, Protocol

from cap_pretrain.errors import UserError

Example = dict[str, Any]


DEFAULT_FIELDS = {name: name for name in ("image", "captions", "label", "id", "question")}
"""Which feature of a stored dataset holds what; "a/b" is feature b inside of feature a.

Captions may be in several, "caption:2+alt_text": one of these features is drawn by its weight, 1
when left out, and then one of its captions. What is empty there is no caption."""


INFO_FILE = "dataset_info.json"


class Source(Protocol):
    """What the pipeline needs to know of a dataset."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def without_image(source: Source, index: int) -> Example:
    """An example for whom its image does not matter: it may be missing."""
    return getattr(source, "without_image", source.__getitem__)(index)


def parse_mixture(text: str, field: str = "data.name") -> list[tuple[str, float]]:
    """Splits "a:0.2+b:0.8" into [("a", 0.2), ("b", 0.8)]; a weight that is left out is 1.

    What follows the last colon is a weight only if it is a number, so paths and versions
    ("coco_captions:1.1.0") may contain colons. Paths may not contain "+".

    Raises:
        UserError: an empty name, or a weight that is not positive and finite. It names `field`.
    """
    return [_parse_weighted(part.strip(), f"{field} {text!r}") for part in text.split("+")]


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
