"""Hashes of images: which of many are the same, nearly the same, or held out.

A hash here is a number of 64 bits. Among 12 million images two that differ share one with a
probability of 4e-6.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from cap_pretrain.errors import UserError, did_you_mean

NEAR = 4
"""In so many of its 64 bits the perceptual hash of an image may differ from that of its copy.

Of 300 images of Imagenette, 64 x 64 pixels, all copies at 0.5 to 1 of that size and JPEG qualities
of 40 to 75 are found so, 99.7 % of those at 0.35; no two of the images are nearer than 16 bits.
"""

LOOK = 64
"""Pixels that both sides of an image keep at least when it is decoded for its perceptual hash."""

# Bits in six groups: those of hashes that differ in NEAR bits are the same in two groups at least.
_GROUPS = [range(first, 64, NEAR + 2) for first in range(NEAR + 2)]
_MASKS = [
    np.uint64(sum(1 << bit for bit in (*one, *other)))
    for one, other in itertools.combinations(_GROUPS, 2)
]
_SIDE = 32  # of the picture that is transformed, pixels (Zauner 2010, section 3.2.1)


def exact(data: bytes) -> int:
    """The hash of bytes: the first 64 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def perceptual(pixels: np.ndarray) -> int:
    """The hash of what is seen: the same, or nearly, at another size or quality.

    Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), section
    3.2.1: the signs of 8 x 8 low frequencies of a small grey picture, relative to their median.

    Args:
        pixels: uint8 [H, W, 3].
    """
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[1:9, 1:9]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


def repeated(hashes: np.ndarray) -> np.ndarray:
    """uint64 [N] -> bool [N]: whether the same is found earlier."""
    again = np.ones(len(hashes), bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again


def nearly_repeated(hashes: np.ndarray) -> np.ndarray:
    """uint64 [N] -> bool [N]: whether one is found earlier that differs in at most NEAR bits."""
    again = repeated(hashes)
    distinct = np.flatnonzero(~again)
    values = hashes[distinct]
    near = np.zeros(len(values), bool)
    for mask in _MASKS:
        bits = values & mask
        order = np.argsort(bits, kind="stable")  # of those that are the same, the earlier first
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
    """Images that must not be in a dataset, as the test images of others.

    Attributes:
        ids: of examples.
        exact: hashes of their files.
        perceptual: hashes of what they show, uint64 [N].
    """

    ids: frozenset[str] = frozenset()
    exact: frozenset[int] = frozenset()
    perceptual: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))

    def has_like(self, hash: int) -> bool:
        """Whether one of them has this perceptual hash, or nearly."""
        return bool((np.bitwise_count(self.perceptual ^ np.uint64(hash)) <= NEAR).any())


def read_held_out(paths: Iterable[Path]) -> HeldOut:
    """Reads lists with lines "id ID", "exact HASH" and "perceptual HASH", hashes hexadecimal.

    Of a hash that is longer, as a whole SHA-256, the first 64 bits count. Empty lines, and those
    that begin with "#", say nothing.

    Raises:
        UserError: no such file, or a line that is not one of these.
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
                found[kind].add(value if kind == "id" else int(value[:16], 16))
            except ValueError as error:
                raise UserError(
                    f"--held_out {path}: line {number} has {value[:30]!r}, which is no hexadecimal "
                    "hash."
                ) from error
    hashes = np.array(sorted(found["perceptual"]), np.uint64)
    return HeldOut(frozenset(found["id"]), frozenset(found["exact"]), hashes)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--held_out {path}: cannot be read ({error}).") from error
