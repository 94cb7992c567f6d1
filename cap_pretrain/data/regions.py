"""Regions of images: phrases with boxes, such as referring expressions.

A box is left, top, right and bottom as shares of the image's width and height, 0 to 1 from the
left and from the top, so that it fits the image at any size, also with another aspect ratio.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cap_pretrain.errors import UserError

Box = tuple[float, float, float, float]
Region = tuple[str, Box]

MAX_REGIONS = 1000
"""Regions of an image that are read at most; Visual Genome has some 50 an image."""


def checked_box(values: Any) -> Box | None:
    """Return a box cut to the image; None if it is not four finite numbers or has no area there.

    `values` are four numbers, of Python or NumPy.
    """
    try:
        left, top, right, bottom = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        return None
    if not all(map(math.isfinite, (left, top, right, bottom))):
        return None
    box = max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)
    return box if box[0] < box[2] and box[1] < box[3] else None


def checked(phrases: Iterable[str], boxes: Iterable[Any]) -> list[Region]:
    """Return the regions with a phrase and a box by `checked_box`; the others are left out."""
    found = []
    for phrase, values in zip(phrases, boxes, strict=True):
        box = checked_box(values)
        if box and phrase.strip():
            found.append((phrase.strip(), box))
    return found[:MAX_REGIONS]


def regions_of(source: Any, index: int, example: dict[str, Any]) -> list[Region]:
    """Return the regions of an example of a source, [] if there are none.

    They are in `example["regions"]`, or a generated source computes them by a method
    `regions(index)`, only when they are asked for.
    """
    if "regions" in example:
        return example["regions"]
    own = getattr(source, "regions", None)
    return own(index) if own else []


def encoded(regions: Sequence[Region], count: int, tokenizer: Any) -> dict[str, np.ndarray]:
    """Return `count` regions as they are in a batch; what is missing is 0.

    Returns:
        `phrases` int32 [count, T], and `boxes` float32 [count, 4].
    """
    phrases = np.zeros((count, tokenizer.max_len), np.int32)
    boxes = np.zeros((count, 4), np.float32)
    for place, (phrase, box) in enumerate(regions[:count]):
        phrases[place], boxes[place] = tokenizer.encode(phrase), box
    return {"phrases": phrases, "boxes": boxes}


def chosen(regions: Sequence[Region], where: Iterable[float]) -> list[Region]:
    """Return different regions, one for each number in [0, 1) of `where`, as far as there are."""
    left = list(regions)
    return [left.pop(int(share * len(left))) for share in where if left]


def check_augmentation(crop: str, flip: bool) -> None:
    """Raise UserError if an augmentation of images makes regions wrong."""
    if crop != "none" or flip:
        what = "data.flip: True" if flip else f"data.crop: {crop!r}"
        raise UserError(
            f"{what} moves what boxes and phrases such as 'on the left' refer to; set "
            "data.crop=none and data.flip=False to learn from regions."
        )
