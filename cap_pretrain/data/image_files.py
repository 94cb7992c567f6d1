"""Encoded images: mending of damage that costs no pixel, and limits on the work of decoding."""

import contextlib
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from PIL import Image, features

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**30 // 4 // 3
"""Pixels of the largest image that is decoded: Pillow's limit, 89 million."""

MAX_MEMORY = 9 * MAX_PIXELS
"""Bytes that decoding may use at a time in a process, 805 MB; large images wait for each other."""

MAX_BYTES = 2**28
"""Size of the largest image file that is read: larger ones are no photographs, perhaps bombs."""

_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif .jxl .jp2"
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
"""Suffixes of pictures, also of kinds that cannot be decoded: those are counted as dropped."""

MAX_SCANS = 100
"""Scans of a progressive JPEG; each takes time for all pixels. Usual encoders write 3 to 20."""

# Bytes per pixel at the peak of decoding, measured on images of 36 million pixels; _VIDEO: of the
# formats made from those of videos, WebP and AVIF.
_PILLOW, _VIDEO, _PROGRESSIVE, _SEQUENTIAL = 8, 16, 9, 3
_SMALL = 2**23  # bytes; below it, nobody waits
_MARKER = re.compile(rb"\xff[^\0\xff]")  # begins a segment of a JPEG
_CODED_END = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # ends the data of a scan
_SCAN, _END = 0xDA, 0xD9
_PROGRESSIVE_FRAMES = (0xC2, 0xC6, 0xCA, 0xCE)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_ALONE = {0x01, *range(0xD0, 0xDA)}  # markers of segments without content
_PNG = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # chunks of a PNG that make its pixels
_AVIF = b"" if features.check("avif") else b"|avi"
_UNSUPPORTED = re.compile(
    rb"(?s)....ftyp(hei|hev|mif1|msf1" + _AVIF + rb")|\xff\x0a|\0\0\0\x0c(JXL|jP) |\xff\x4f\xff\x51"
)

T = TypeVar("T")


class ImageError(ValueError):
    """The bytes are not an image, or one that is corrupt or too large."""


class UnsupportedError(ImageError):
    """The image has a format that cannot be decoded here."""


def unsupported(data: bytes) -> bool:
    """Return whether this is a HEIC, JPEG XL or JPEG 2000, or an AVIF that Pillow cannot read."""
    return _UNSUPPORTED.match(data) is not None


def max_pixels(kind: str | None) -> int:
    """Return the number of pixels up to which an image of this format of Pillow is decoded."""
    return min(MAX_PIXELS, MAX_MEMORY // (_VIDEO if kind in ("WEBP", "AVIF") else _PILLOW))


def memory(
    data: bytes, pixels: int, kind: str | None = None, scale: int = 1
) -> contextlib.AbstractContextManager:
    """Return a context in which an image may be decoded; it waits until there is memory for it.

    Args:
        data: the file.
        pixels: number of pixels of the file.
        kind: format, if it is decoded by Pillow; None: a JPEG decoded by libjpeg.
        scale: a JPEG is decoded at 1 / scale of its size. A progressive one holds all coefficients
            in memory even so.
    """
    if pixels * _VIDEO < _SMALL:
        return contextlib.nullcontext()
    if kind is None:
        amount = pixels // scale**2 * _SEQUENTIAL
        if _is_progressive(data):
            amount += pixels * (_PROGRESSIVE - _SEQUENTIAL)
    else:
        amount = pixels * (_VIDEO if kind in ("WEBP", "AVIF") else _PILLOW)
    amount = min(amount, MAX_MEMORY)
    return contextlib.nullcontext() if amount < _SMALL else _MEMORY.share(amount)


class _Memory:
    def __init__(self, left: int):
        self._left, self._changed = left, threading.Condition()

    @contextlib.contextmanager
    def share(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


_MEMORY = _Memory(MAX_MEMORY)


def has_too_many_scans(data: bytes) -> bool:
    """Return whether a JPEG is progressive and has more than MAX_SCANS scans."""
    if not _is_progressive(data) or data.count(b"\xff\xda") <= MAX_SCANS:
        return False
    return sum(marker == _SCAN for marker, *_ in _segments(data)) > MAX_SCANS


def _is_progressive(data: bytes) -> bool:
    frames = (marker for marker, *_ in _segments(data) if marker in _FRAMES)
    return next(frames, None) in _PROGRESSIVE_FRAMES


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield (marker, start, end, end of the scan's data) of the segments of a JPEG to its end."""
    position = 2
    while match := _MARKER.search(data, position):
        start, marker = match.start(), data[match.start() + 1]
        end = start + 2
        if marker not in _ALONE:
            end += int.from_bytes(data[end : end + 2])
        position = end
        if marker == _SCAN:
            coded = _CODED_END.search(data, end)
            position = coded.start() if coded else len(data)
        yield marker, start, end, position
        if marker == _END:
            return


def mending(function: Callable[[bytes], T], data: bytes) -> T:
    """Return function(data); if it raises ImageError, function of the mended file.

    Damage is mended that pixels do not depend on. Of a JPEG these are bytes between segments, the
    parameters of scans that mean something in progressive files only (some phones write nonsense),
    an unknown version, and zeros after the data of a scan; of a PNG, all chunks but those of its
    pixels.
    """
    try:
        return function(data)
    except ImageError:
        for mended in _mended(data):
            with contextlib.suppress(ImageError):
                if mended != data:
                    return function(mended)
        raise


def _mended(data: bytes) -> Iterator[bytes]:
    if data.startswith(b"\xff\xd8"):
        yield _mended_jpeg(data)
        yield _mended_jpeg(data, padded=True)
    elif data.startswith(_PNG):
        yield _mended_png(data)


def _mended_jpeg(data: bytes, padded: bool = False) -> bytes:
    """Return the mended JPEG; `padded`: zeros after the data of a scan do not belong to it."""
    parts, sequential, end = [data[:2]], False, len(data)
    for marker, start, stop, end in _segments(data):
        segment, coded = data[start:stop], data[stop:end]
        sequential |= marker in _SEQUENTIAL_FRAMES
        if marker == _SCAN and sequential:
            segment = segment[:-3] + b"\0\x3f\0"  # Ss, Se, Ah and Al (ITU T.81, B.2.3)
        if segment[4:9] == b"JFIF\0" and segment[9:10] != b"\1":
            segment = segment[:9] + b"\1\1" + segment[11:]
        if padded:
            coded = coded.rstrip(b"\0")
            coded += b"\0" * coded.endswith(b"\xff")
        parts += [segment, coded]
    return b"".join([*parts, data[end:]])


def _mended_png(data: bytes) -> bytes:
    parts, start = [_PNG], len(_PNG)
    while start < len(data):
        kind, end = (
            data[start + 4 : start + 8],
            start + 12 + int.from_bytes(data[start : start + 4]),
        )
        sound = zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        if kind in _NEEDED or (kind == b"eXIf" and sound):
            parts.append(data[start:end])
        start = end
    return b"".join(parts)
