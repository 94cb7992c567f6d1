"""Filters of candidates: options that all formats have in common."""

import argparse
import dataclasses
import math
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import simplejpeg

from cap_pretrain.data import images
from cap_pretrain.data.builders import hashes
from cap_pretrain.errors import UserError

_COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(?P<field>[^<>=!]+?)\s*(?P<sign>[<>=!]=|[<>])\s*(?P<value>.*?)\s*")
MAX_CAPTION = 20_000
"""Characters of the longest caption or question that is kept, unless --max_chars says otherwise."""

MAX_ID = 4096
"""Characters of the longest id of an example, as many as Linux allows in a path."""

DEDUP = ("exact", "perceptual")
"""What makes two images duplicates: equal file contents; or also nearly equal appearance."""


class RejectedError(Exception):
    """A filter rejects a valid image; the message is the reason, in a word or two."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition on a field of the candidates, such as `similarity>0.3`."""

    field: str
    sign: str  # a comparison operator, such as ">"
    value: str  # compared as a number if the field is a number, too

    def problem(self, fields: Mapping[str, Any]) -> str:
        """Return why a candidate with these fields is dropped, or "" if it is kept."""
        found = fields.get(self.field)
        if found is None:
            return f"without {self.field}"
        if isinstance(found, (dict, list)):
            return f"without {self.field}"  # comparable to nothing
        wanted: Any = self.value
        try:
            found, wanted = float(found), float(wanted)
        except (TypeError, ValueError, OverflowError):  # an integer of 400 digits is no float
            found = str(found)
            if self.sign not in ("==", "!="):
                return f"without {self.field}"  # text has no order here
        if _COMPARISONS[self.sign](found, wanted):
            return ""
        return f"not {self.field}{self.sign}{self.value}"


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as it is stored; hashes are None unless needed."""

    data: bytes
    size: tuple[int, int]  # (width, height) of `data` in pixels, before EXIF orientation is applied
    reencoded: bool  # whether the bytes differ from those that were read
    resized: bool
    exact: int | None = None  # hash of the bytes that were read
    perceptual: int | None = None

    @property
    def row(self) -> dict[str, Any]:
        """All attributes but `data` that are not None, JSON-serializable."""
        row = {name: value for name, value in vars(self).items() if name != "data"}
        return {name: value for name, value in row.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Filters:
    """Limits on what is kept, all of them off by default."""

    resize: int = 0  # larger images are resized to this shorter side, in pixels; 0: no resizing
    quality: int = 95  # of JPEGs that are resized, 1 to 100
    min_size: int = 0  # of the shorter side, in pixels
    max_aspect: float = math.inf  # the longer side divided by the shorter
    min_words: int = 0  # in a caption, separated by white space
    max_words: float = math.inf
    min_chars: int = 0  # in a caption
    max_chars: float = MAX_CAPTION
    min_ascii: float = 0.0  # minimum fraction of ASCII among a caption's characters, 0 to 1
    where: tuple[Condition, ...] = ()  # all must hold
    dedup: str = ""  # one of DEDUP keeps the first of duplicate images; "" keeps all
    held_out: hashes.HeldOut = dataclasses.field(default_factory=hashes.HeldOut)  # to be dropped

    @property
    def on_captions(self) -> bool:
        """Whether any caption filter is on."""
        limits = ("min_words", "max_words", "min_chars", "max_chars", "min_ascii")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return any(getattr(self, limit) != defaults[limit] for limit in limits)

    def known_problem(self, example_id: str, fields: Mapping[str, Any]) -> str:
        """Return why a candidate is dropped regardless of its image, or ""."""
        if len(example_id) > MAX_ID:
            return "id too long"
        if example_id in self.held_out.ids:
            return "held out"
        return next(filter(None, (one.problem(fields) for one in self.where)), "")

    def caption_problem(self, caption: str) -> str:
        """Return why a caption is dropped, or ""."""
        chars = len(caption)
        if chars > self.max_chars:  # first, since splitting is costly
            return "caption too long"
        words = len(caption.split())
        if words < self.min_words or chars < self.min_chars:
            return "caption too short"
        if words > self.max_words:
            return "caption too long"
        if sum(map(str.isascii, caption)) < self.min_ascii * chars:
            return "caption not in ASCII"
        return ""

    def picture(self, data: bytes) -> Picture:
        """Check an encoded image and return it as it is to be stored.

        Raises ImageError if the image cannot be decoded (see `images.decode`), or RejectedError if
        a filter rejects it, which may also be a corrupt image whose header is intact.
        """
        size = _size(data)
        if size and min(size) < self.min_size:
            raise RejectedError("too small")
        if size and max(size) > self.max_aspect * min(size):
            raise RejectedError("too elongated")
        exact = hashes.exact(data) if self.dedup or self.held_out.exact else None
        if exact in self.held_out.exact:
            raise RejectedError("held out")
        resized = bool(size and 0 < self.resize < min(size))
        if size and resized:
            plain, size = self._shrunk(data, size)
        else:
            plain = images.to_plain(data)
        perceptual = None
        if self.dedup == "perceptual" or len(self.held_out.perceptual):
            perceptual = hashes.perceptual(images.decode(data, hashes.LOOK))
            if self.held_out.has_like(perceptual):
                raise RejectedError("held out")
        if size is None:  # unreachable: what Pillow cannot open is not decoded either
            raise images.ImageError("no size in its header")
        return Picture(plain, size, resized or plain is not data, resized, exact, perceptual)

    def _shrunk(self, data: bytes, size: tuple[int, int]) -> tuple[bytes, tuple[int, int]]:
        """Return an image of this size as a smaller, upright JPEG, and its (width, height)."""
        pixels = images.decode(data, self.resize)
        longer = round(self.resize * max(size) / min(size))
        upright = pixels.shape[0] > pixels.shape[1]
        size = (self.resize, longer) if upright else (longer, self.resize)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        jpeg = simplejpeg.encode_jpeg(
            pixels, self.quality, colorspace="RGB", colorsubsampling="420"
        )
        return jpeg, size


def _size(data: bytes) -> tuple[int, int] | None:
    """Return width and height from the header, or None if no decoder will accept the image."""
    try:
        return images.size(data)
    except images.ImageError:
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line options of `Filters`."""
    group = parser.add_argument_group("filters", "dropped examples are counted in report.json")

    def number(flag: str, kind: type, what: str, least: float, most: float = math.inf) -> None:
        group.add_argument(flag, type=_between(kind, least, most), metavar="N", help=what)

    number("--resize", int, "shrink larger images to this shorter side, in pixels, as JPEG", 1)
    number("--quality", int, "of JPEGs that are resized, 1 to 100; default: 95", 1, 100)
    number("--min_size", int, "minimum of the shorter side, in pixels", 1)
    number("--max_aspect", float, "maximum of the longer side divided by the shorter", 1)
    number("--min_words", int, "drop captions with fewer words", 1)
    number("--max_words", int, "drop captions with more words", 1)
    number("--min_chars", int, "drop captions with fewer characters", 1)
    number("--max_chars", int, f"drop captions with more characters; default: {MAX_CAPTION}", 1)
    number("--min_ascii", float, "drop captions with a smaller fraction of ASCII, 0 to 1", 0, 1)
    what = (
        "keep examples whose JSON field or column fulfills this, as 'similarity>0.3' or "
        "'NSFW!=NSFW'; may be repeated"
    )
    group.add_argument("--where", action="append", metavar="CONDITION", help=what)
    what = "keep the first of images in a split whose files are equal, or that also look alike"
    group.add_argument("--dedup", choices=DEDUP, help=what)
    what = "lists of images to leave out, as written by tools/held_out.py for a dataset"
    group.add_argument("--held_out", nargs="+", type=Path, metavar="FILE", help=what)


def from_arguments(args: argparse.Namespace) -> Filters:
    """Return the filters given by options; raises UserError for invalid conditions or lists."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Filters)}
    given["where"] = tuple(map(condition, given["where"] or ()))
    given["held_out"] = hashes.read_held_out(given["held_out"] or ())
    return Filters(**{name: value for name, value in given.items() if value is not None})


def condition(text: str) -> Condition:
    """Parse a condition such as "similarity>0.3"; raises UserError."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        signs = " ".join(_COMPARISONS)
        raise UserError(f"--where {text!r}: write FIELD, one of {signs}, and a value.")
    return Condition(match["field"], match["sign"], match["value"])


def kept_captions(filters: Filters, captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the captions that pass the filters, and the reason for dropping each of the others."""
    problems = [filters.caption_problem(caption) for caption in captions]
    kept = [c for c, problem in zip(captions, problems, strict=True) if not problem]
    return kept, [problem for problem in problems if problem]


def _between(kind: type, least: float, most: float) -> Any:
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
        if not least <= value <= most:
            limits = f"{least} to {most}" if most < math.inf else f"at least {least}"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    return number
