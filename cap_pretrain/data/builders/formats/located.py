"""Shared parts of formats with regions: phrases with boxes in pixels."""

from collections.abc import Iterable
from typing import Any

from cap_pretrain.data.builders.filters import MAX_CAPTION
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.data.builders.regions import region_features, stored_regions
from cap_pretrain.data.examples import texts
from cap_pretrain.data.regions import MAX_REGIONS, Box, Region, checked_box

MAX_SIDE = 10**6
"""Largest side of an image in pixels that annotations may claim."""


class Located(annotated.SharedImages):
    """Images with regions, and perhaps captions: the features "phrases" and "boxes".

    The boxes, four numbers for each phrase, are those of `data.regions`.
    """

    def values(self, entry: Entry) -> dict[str, Any]:
        """Return captions, phrases and boxes."""
        return super().values(entry) | stored_regions(entry.regions)

    def features(self) -> dict[str, Any]:
        """Return the features "captions", "phrases" and "boxes"."""
        return super().features() | region_features()

    def description(self) -> str:
        """Return one sentence that names the input files."""
        return f"Images with phrases and their boxes, built from {self._origin}."


def in_shares(values: Any, width: float, height: float) -> Box | None:
    """Return the box of (x, y, width, height) in pixels of an image; None if it is not valid.

    It is cut to the image. It is not valid if it is not four finite numbers, if its width or height
    is not positive, or if it lies outside the image.
    """
    numbers = isinstance(values, (list, tuple)) and len(values) == 4
    if not numbers or not all(type(value) in (int, float) for value in values):
        return None
    try:
        x, y, w, h = map(float, values)
    except OverflowError:  # an integer of 400 digits
        return None
    return checked_box((x / width, y / height, (x + w) / width, (y + h) / height))


def usable(found: Iterable[tuple[Any, Box | None]]) -> tuple[list[Region], list[str]]:
    """Return the regions of (phrase, box) that can be used, and why each of the others cannot."""
    regions: list[Region] = []
    dropped: list[str] = []
    for phrase, box in found:
        words = next(iter(texts(phrase)), "") if isinstance(phrase, str) else ""
        if not words:
            dropped.append("region without phrase")
        elif len(words) > MAX_CAPTION:
            dropped.append("phrase too long")
        elif box is None:
            dropped.append("box not valid")
        elif len(regions) == MAX_REGIONS:
            dropped.append(f"more than {MAX_REGIONS} regions")
        else:
            regions.append((words, box))
    return regions, dropped
