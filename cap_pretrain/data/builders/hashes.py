"""Hashes of images, to find exact duplicates, near-duplicates and held-out images.

A hash here is a 64-bit integer. Among 12 million distinct images, the probability that any two
share an exact hash is 4e-6.
"""

import dataclasses
import hashlib
import itertools
import json
import string
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from cap_pretrain import untrusted
from cap_pretrain.errors import UserError, did_you_mean

NEAR = 4
"""Images whose perceptual hashes differ in at most this many of 64 bits are near-duplicates.

Measured on 300 images of Imagenette at 64 x 64 pixels: this finds all copies at 0.5 to 1 of that
size and JPEG qualities of 40 to 75, and 99.7 % of those at 0.35. No two of the distinct images are
closer than 16 bits.
"""

LOOK = 64  # minimum of both sides, in pixels, to which an image is decoded for `perceptual`

# The bits in NEAR + 2 groups: two hashes that differ in at most NEAR bits agree in at least two of
# the groups. So near-duplicates agree under at least one mask of two groups.
_GROUPS = [range(first, 64, NEAR + 2) for first in range(NEAR + 2)]
_MASKS = [
    np.uint64(sum(1 << bit for bit in (*one, *other)))
    for one, other in itertools.combinations(_GROUPS, 2)
]
_SIDE = 32  # of the image that is transformed, in pixels (Zauner 2010, section 3.2.1)


def exact(data: bytes) -> int:
    """Return the first 64 bits of the SHA-256 of `data`."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def perceptual(pixels: np.ndarray) -> int:
    """Return a hash of RGB pixels, [H, W, 3] uint8, that changes little with size and quality.

    The DCT hash of Zauner, "Implementation and benchmarking of perceptual image hash functions"
    (2010), section 3.2.1: the signs of 8 x 8 low frequencies of a small gray image, relative to
    their median.
    """
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[1:9, 1:9]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


def repeated(hashes: np.ndarray) -> np.ndarray:
    """Return whether an equal hash occurs earlier: [N] uint64 -> [N] bool."""
    again = np.ones(len(hashes), bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again


def nearly_repeated(hashes: np.ndarray) -> np.ndarray:
    """Return whether a hash within NEAR bits occurs earlier: [N] uint64 -> [N] bool."""
    again = repeated(hashes)
    distinct = np.flatnonzero(~again)
    values = hashes[distinct]
    near = np.zeros(len(values), bool)
    for mask in _MASKS:
        bits = values & mask
        order = np.argsort(bits, kind="stable")  # equal bits stay in the order of the input
        bits, ordered = bits[order], values[order]
        start = np.arange(len(order) - 1)
        for apart in range(1, len(order)):
            start = start[start + apart < len(order)]
            start = start[bits[start] == bits[start + apart]]
            if not len(start):
                break
            later = start + apart
            differ = np.bitwise_count(ordered[start] ^ ordered[later])
            near[order[later[differ <= NEAR]]] = True
    again[distinct] |= near
    return again


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Images that must not be in a dataset, such as the test images of benchmarks."""

    ids: frozenset[str] = frozenset()  # of examples
    exact: frozenset[int] = frozenset()  # hashes of image files
    perceptual: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))

    def has_like(self, perceptual: int) -> bool:
        """Return whether one of the images has this perceptual hash, within NEAR bits."""
        distance = np.bitwise_count(self.perceptual ^ np.uint64(perceptual))
        return bool((distance <= NEAR).any())


def held_out_id(id_: str) -> str:
    """Return the line of a list of held-out images for an id: quoted if it is not a plain line."""
    plain = id_ == id_.strip() == untrusted.printable(id_) and not id_.startswith('"')
    return f"id {id_ if plain else json.dumps(id_)}"


def _read_id(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text  # an id that begins with a quote, of a list written by hand


def _read_hash(text: str) -> int:
    if not set(text) <= set(string.hexdigits):
        raise ValueError(text)  # int() also takes signs and underscores
    return int(text, 16)


def read_held_out(paths: Iterable[Path]) -> HeldOut:
    """Read lists of held-out images; raises UserError if one is unreadable or has another form.

    Each line is "id ID" (or the ID as `held_out_id` quotes it), "exact HASH" or "perceptual HASH",
    with the hash in hexadecimal. Only the first 64 bits of a longer hash count, so a full SHA-256
    is fine. Empty lines and lines that start with "#" are skipped.
    """
    found: dict[str, set] = {"id": set(), "exact": set(), "perceptual": set()}
    for path in paths:
        for number, line in enumerate(_lines(path), start=1):
            kind, _, value = line.partition(" ")
            if kind.startswith("#") or not line:
                continue
            if kind not in found:
                raise UserError(
                    f"--held_out {path}: line {number} begins with {kind[:30]!r}; write "
                    f"'id ID', 'exact HASH' or 'perceptual HASH'.{did_you_mean(kind, found)}"
                )
            try:
                found[kind].add(_read_id(value) if kind == "id" else _read_hash(value[:16]))
            except ValueError as error:
                raise UserError(
                    f"--held_out {path}: line {number} has {value[:30]!r}, which is not a "
                    "hexadecimal hash."
                ) from error
    hashes = np.array(sorted(found["perceptual"]), np.uint64)
    return HeldOut(frozenset(found["id"]), frozenset(found["exact"]), hashes)


def _lines(path: Path) -> list[str]:
    try:
        with untrusted.open_regular(path) as file:
            return [line.strip() for line in file.read().decode("utf-8-sig").split("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"--held_out {path}: cannot be read ({error}).") from error
