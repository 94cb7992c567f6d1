"""Permutations of nine tiles that are far from each other, the classes of a jigsaw puzzle.

Two permutations are as far apart as the places they fill differently (Hamming distance, 0 to 9).
The set is grown greedily (Noroozi & Favaro 2016, 1603.09246, algorithm 1), the next permutation
being the one with the largest mean distance to those chosen so far, or with the largest minimum.
Of the mean, which is also VISSL's choice ("max_avg"), no set can have much more; the minimum keeps
any two classes from looking alike.

A file of permutations has one a line, nine numbers from 0 to 8.
"""

import functools
import itertools
from pathlib import Path

import numpy as np

from cap_pretrain import files
from cap_pretrain.errors import UserError

TILES = 9
MOST = 362_880
"""9!, all that there are."""

RULES = ("mean", "min")


@functools.lru_cache(maxsize=8)
def greedy(count: int, rule: str = "mean", seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Returns `count` permutations, each chosen to be far from those before it.

    Args:
      count: how many; the first of more are the same.
      rule: one of RULES: of which distance to those chosen the largest is sought.
      seed: draws the first, and which is taken of equally good ones.

    Raises:
      UserError: there are not so many.
    """
    if not 2 <= count <= MOST:
        raise UserError(f"permutations: {count} is not from 2 to {MOST:,}, all there are of nine.")
    candidates = np.random.default_rng(seed).permutation(_all())
    # A row for each place: a comparison then runs through memory once.
    rows = np.ascontiguousarray(candidates.T)
    chosen = np.zeros(count, np.int64)
    equal, row = np.empty(MOST, np.int8), np.empty(MOST, np.int8)
    worst = np.zeros(MOST, np.int32 if rule == "mean" else np.int8)
    for n in range(1, count):
        equal[:] = 0
        for place, tile in zip(rows, candidates[chosen[n - 1]], strict=True):
            equal += np.equal(place, tile, out=row.view(bool)).view(np.int8)
        if rule == "mean":
            worst += equal
            worst[chosen[n - 1]] = np.iinfo(worst.dtype).max // 2
        else:
            np.maximum(worst, equal, out=worst)
        chosen[n] = np.argmin(worst)
    return tuple(map(tuple, candidates[chosen].tolist()))


@functools.cache
def _all() -> np.ndarray:
    """int8 [MOST, TILES], in lexicographic order."""
    flat = itertools.chain.from_iterable(itertools.permutations(range(TILES)))
    return np.fromiter(flat, np.int8, MOST * TILES).reshape(MOST, TILES)


def distances(permutations: tuple[tuple[int, ...], ...]) -> tuple[float, int]:
    """The mean and the smallest distance of any two of some permutations."""
    table = np.array(permutations, np.int8)
    counts, smallest, total = len(table), TILES, 0
    for n in range(1, counts):
        found = np.sum(table[:n] != table[n], axis=1)
        smallest, total = min(smallest, int(found.min())), total + int(found.sum())
    return total / (counts * (counts - 1) / 2), smallest


def write(path: Path, permutations: tuple[tuple[int, ...], ...]) -> None:
    """Writes a file of permutations."""
    lines = (" ".join(map(str, permutation)) for permutation in permutations)
    files.write_text(path, "\n".join(lines) + "\n")


def read(path: str | Path) -> tuple[tuple[int, ...], ...]:
    """Reads a file of permutations.

    Raises:
      UserError: it cannot be read, a line is no permutation of 0 to 8, or one comes twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(
            f"{path}: is no readable file of permutations; make one with "
            "tools/make_permutations.py."
        ) from e
    found = {}
    for number, line in enumerate(lines, start=1):
        if sorted(line.split()) != list(map(str, range(TILES))):
            raise UserError(
                f"{path}: line {number} is {line[:40]!r} and not the numbers 0 to 8 in some order."
            )
        permutation = tuple(map(int, line.split()))
        if permutation in found:
            raise UserError(
                f"{path}: line {number} is line {found[permutation]} again; remove one."
            )
        found[permutation] = number
    return tuple(found)
