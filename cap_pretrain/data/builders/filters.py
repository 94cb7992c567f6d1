"""What of the candidates is kept, and how: options that all formats have in common."""

import argparse
import dataclasses
import io
import math
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import simplejpeg
from PIL import Image

from cap_pretrain.data import images
from cap_pretrain.data.builders import hashes
from cap_pretrain.errors import UserError

_COMPARED = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(?P<field>[^<>=!]+?)\s*(?P<sign>[<>=!]=|[<>])\s*(?P<value>.*?)\s*")
DEDUP = ("exact", "perceptual")
"""What counts as the same image: the bytes of its file; or also what it shows, nearly."""


class Refused(Exception):
    """An image that is whole but not wanted; the message is the reason, in a word or two."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a field of the candidates must be, as `similarity>0.3`."""

    field: str
    sign: str
    value: str

    def problem(self, fields: Mapping[str, Any]) -> str:
        """Why a candidate with these fields is dropped, or ""."""
        found = fields.get(self.field)
        if found is None:
            return f"without {self.field}"
        wanted: Any = self.value
        try:
            found, wanted = float(found), float(wanted)
        except (TypeError, ValueError):
            found = str(found)
            if self.sign not in ("==", "!="):
                return f"without {self.field}"  # in numbers
        if _COMPARED[self.sign](found, wanted):
            return ""
        return f"not {self.field}{self.sign}{self.value}"


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as it is stored.

    Attributes:
        data: the encoded image.
        size: width and height of `data` before it is turned as EXIF wants it, pixels.
        reencoded: whether the bytes are not those that were read.
        resized: whether the pixels are not.
        exact: hash of what was read, if that was asked for.
        perceptual: hash of what it shows, if that was asked for.
    """

    data: bytes
    size: tuple[int, int]
    reencoded: bool
    resized: bool
    exact: int | None = None
    perceptual: int | None = None

    @property
    def row(self) -> dict[str, Any]:
        """All but `data`, as JSON can have it."""
        row = {name: value for name, value in vars(self).items() if name != "data"}
        return {name: value for name, value in row.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Filters:
    """Limits, all of them off by default.

    Attributes:
        resize: pixels of the shorter side of what is larger; 0: as they are.
        quality: of JPEGs that are resized, 1 to 100.
        min_size: least of the shorter side, pixels.
        max_aspect: most of the longer side in terms of the shorter.
        min_words: least of words between white space, of a caption that is kept.
        max_words: most of them.
        min_chars: least of characters of a caption that is kept.
        max_chars: most of them.
        min_ascii: least share of ASCII among its characters, 0 to 1.
        where: what fields must be.
        dedup: "exact" or "perceptual": of images that are the same the first is kept.
        held_out: images that are left out.
    """

    resize: int = 0
    quality: int = 95
    min_size: int = 0
    max_aspect: float = math.inf
    min_words: int = 0
    max_words: float = math.inf
    min_chars: int = 0
    max_chars: float = math.inf
    min_ascii: float = 0.0
    where: tuple[Condition, ...] = ()
    dedup: str = ""
    held_out: hashes.HeldOut = dataclasses.field(default_factory=hashes.HeldOut)

    @property
    def on_captions(self) -> bool:
        """Whether captions are looked at."""
        limits = ("min_words", "max_words", "min_chars", "max_chars", "min_ascii")
        own = {field.name: field.default for field in dataclasses.fields(self)}
        return any(getattr(self, limit) != own[limit] for limit in limits)

    def known_problem(self, id: str, fields: Mapping[str, Any]) -> str:
        """Why a candidate is dropped, whatever its image; or ""."""
        if id in self.held_out.ids:
            return "held out"
        return next(filter(None, (one.problem(fields) for one in self.where)), "")

    def caption_problem(self, caption: str) -> str:
        """Why a caption is dropped, or ""."""
        words, chars = len(caption.split()), len(caption)
        if words < self.min_words or chars < self.min_chars:
            return "caption too short"
        if words > self.max_words or chars > self.max_chars:
            return "caption too long"
        if sum(map(str.isascii, caption)) < self.min_ascii * chars:
            return "caption not in ASCII"
        return ""

    def picture(self, data: bytes) -> Picture:
        """Returns an image as it is to be stored.

        Raises:
            ImageError: as `images.decode`.
            Refused: it is whole, or looks so, but not wanted.
        """
        size = _size(data)
        if size and min(size) < self.min_size:
            raise Refused("too small")
        if size and max(size) > self.max_aspect * min(size):
            raise Refused("too elongated")
        look = self.dedup == "perceptual" or len(self.held_out.perceptual)
        same = hashes.exact(data) if self.dedup or self.held_out.exact else None
        if same in self.held_out.exact:
            raise Refused("held out")
        if resized := bool(size and 0 < self.resize < min(size)):
            plain, size = self._shrunk(data, size)
        else:
            plain = images.to_plain(data)
        seen = hashes.perceptual(images.decode(data, hashes.LOOK)) if look else None
        if seen is not None and self.held_out.has_like(seen):
            raise Refused("held out")
        return Picture(plain, size, resized or plain is not data, resized, same, seen)

    def _shrunk(self, data: bytes, size: tuple[int, int]) -> tuple[bytes, tuple[int, int]]:
        """Returns a smaller JPEG, upright, of an image of this size; and its size."""
        pixels = images.decode(data, self.resize)
        longer = round(self.resize * max(size) / min(size))
        high = pixels.shape[0] > pixels.shape[1]
        size = (self.resize, longer) if high else (longer, self.resize)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        jpeg = simplejpeg.encode_jpeg(
            pixels, self.quality, colorspace="RGB", colorsubsampling="420"
        )
        return jpeg, size


def _size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the header, or None of what no decoder will take."""
    try:
        return Image.open(io.BytesIO(data)).size
    except Exception:  # on garbage, Pillow's plug-ins raise nearly everything
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `Filters`."""
    group = parser.add_argument_group("what is kept", "counted by reason in report.json")

    def number(flag: str, kind: type, what: str, least: float, most: float = math.inf) -> None:
        group.add_argument(flag, type=_between(kind, least, most), metavar="N", help=what)

    number("--resize", int, "shrink larger images to this shorter side, in pixels, as JPEG", 1)
    number("--quality", int, "of JPEGs that are resized, 1 to 100; default: 95", 1, 100)
    number("--min_size", int, "least of the shorter side, in pixels", 1)
    number("--max_aspect", float, "most of the longer side divided by the shorter", 1)
    number("--min_words", int, "captions with fewer words do not count", 1)
    number("--max_words", int, "captions with more words do not count", 1)
    number("--min_chars", int, "captions with fewer characters do not count", 1)
    number("--max_chars", int, "captions with more characters do not count", 1)
    number("--min_ascii", float, "least share of ASCII in a caption that counts, 0 to 1", 0, 1)
    what = "a json field or column and what it must be, as 'similarity>0.3' or 'NSFW!=NSFW'; again"
    group.add_argument("--where", action="append", metavar="CONDITION", help=f"{what} for more")
    what = "keep the first of images whose files are equal, or that also look alike, in a split"
    group.add_argument("--dedup", choices=DEDUP, help=what)
    what = "lists of images to leave out, as tools/held_out.py makes of a dataset"
    group.add_argument("--held_out", nargs="+", type=Path, metavar="FILE", help=what)


def from_arguments(args: argparse.Namespace) -> Filters:
    """Returns the filters; raises UserError for a condition or a list that is not understood."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Filters)}
    given["where"] = tuple(map(condition, given["where"] or ()))
    given["held_out"] = hashes.read_held_out(given["held_out"] or ())
    return Filters(**{name: value for name, value in given.items() if value is not None})


def condition(text: str) -> Condition:
    """Parses "similarity>0.3"; raises UserError."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        signs = " ".join(_COMPARED)
        raise UserError(f"--where {text!r}: write FIELD, one of {signs}, and a value.")
    return Condition(match["field"], match["sign"], match["value"])


def kept_captions(filters: Filters, captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the captions that are kept, and why each of the others is not."""
    problems = [filters.caption_problem(caption) for caption in captions]
    kept = [c for c, problem in zip(captions, problems, strict=True) if not problem]
    return kept, [problem for problem in problems if problem]


def _between(kind: type, least: float, most: float) -> Any:
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
        if not least <= value <= most:
            limits = f"{least} to {most}" if most < math.inf else f"at least {least}"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    return number
