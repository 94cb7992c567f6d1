"""Sets of distant permutations of nine tiles, the classes of a jigsaw puzzle.

The distance of two permutations is the number of positions where they differ (Hamming distance, 0
to 9). The set is grown greedily (Noroozi & Favaro 2016, 1603.09246, algorithm 1): the next
permutation is the one with the largest mean distance to those chosen so far, or with the largest
minimum distance. The mean is also VISSL's choice ("max_avg"), and no set can have a much larger
one. The minimum keeps any two classes from looking alike.

A file of permutations has one permutation per line, nine numbers from 0 to 8.
"""

import functools
import itertools
from pathlib import Path

import numpy as np

from cap_pretrain import files
from cap_pretrain.errors import UserError

TILES = 9
MOST = 362_880
"""Number of permutations of nine tiles, 9!."""

RULES = ("mean", "min")


@functools.lru_cache(maxsize=8)
def greedy(count: int, rule: str = "mean", seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Return `count` permutations, each chosen to be far from those before it.

    Args:
        count: Number of permutations. A larger set begins with the same ones.
        rule: One of RULES: the distance to the chosen permutations that is maximized.
        seed: Seed for the first permutation and for ties.

    Raises:
        UserError: `count` is out of range.
    """
    if not 2 <= count <= MOST:
        raise UserError(f"permutations: {count} is not from 2 to {MOST:,} (9!).")
    candidates = np.random.default_rng(seed).permutation(_all())
    # One row per position, so that a comparison reads memory sequentially.
    rows = np.ascontiguousarray(candidates.T)
    chosen = np.zeros(count, np.int64)
    equal, row = np.empty(MOST, np.int8), np.empty(MOST, np.int8)
    worst: np.ndarray = np.zeros(MOST, np.int32 if rule == "mean" else np.int8)
    for n in range(1, count):
        equal[:] = 0
        for place, tile in zip(rows, candidates[chosen[n - 1]], strict=True):
            np.equal(place, tile, out=row.view(bool))
            np.add(equal, row, out=equal)
        if rule == "mean":
            worst += equal
            worst[chosen[n - 1]] = np.iinfo(worst.dtype).max // 2
        else:
            np.maximum(worst, equal, out=worst)
        chosen[n] = np.argmin(worst)
    return tuple(map(tuple, candidates[chosen].tolist()))


@functools.cache
def _all() -> np.ndarray:
    """Return all permutations, int8 [MOST, TILES], in lexicographic order."""
    flat = itertools.chain.from_iterable(itertools.permutations(range(TILES)))
    return np.fromiter(flat, np.int8, MOST * TILES).reshape(MOST, TILES)


def distances(permutations: tuple[tuple[int, ...], ...]) -> tuple[float, int]:
    """Return the mean and the smallest distance between any two permutations."""
    table = np.array(permutations, np.int8)
    counts, smallest, total = len(table), TILES, 0
    for n in range(1, counts):
        found = np.sum(table[:n] != table[n], axis=1)
        smallest, total = min(smallest, int(found.min())), total + int(found.sum())
    return total / (counts * (counts - 1) / 2), smallest


def write(path: Path, permutations: tuple[tuple[int, ...], ...]) -> None:
    """Write a file of permutations."""
    lines = (" ".join(map(str, permutation)) for permutation in permutations)
    files.write_text(path, "\n".join(lines) + "\n")


def read(path: str | Path) -> tuple[tuple[int, ...], ...]:
    """Read a file of permutations.

    Raises:
        UserError: The file cannot be read, a line is not a permutation of 0 to 8, or one repeats.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(
            f"{path}: not a readable file of permutations; make one with "
            "tools/make_permutations.py."
        ) from e
    found: dict[tuple[int, ...], int] = {}
    for number, line in enumerate(lines, start=1):
        if sorted(line.split()) != list(map(str, range(TILES))):
            raise UserError(
                f"{path}: line {number} is {line[:40]!r}, not a permutation of the numbers 0 to 8."
            )
        permutation = tuple(map(int, line.split()))
        if permutation in found:
            raise UserError(f"{path}: line {number} repeats line {found[permutation]}; remove one.")
        found[permutation] = number
    return tuple(found)
