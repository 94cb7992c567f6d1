"""Deduplication: the only pass that compares candidates with each other; the first is kept.

It holds up to three 64-bit numbers per candidate in memory, so it scales to hundreds of millions.
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cap_pretrain.data.builders import hashes
from cap_pretrain.data.builders.units import Row, read_rows

_REASONS = {0: "", 1: "duplicate id", 2: "duplicate image", 3: "near-duplicate image"}


def without_duplicates(paths: Sequence[Path], dedup: str) -> Iterator[tuple[Row, bytes]]:
    """Yield the rows of a split's units; duplicates get a "reason" and the image b"".

    `dedup` is "", "exact" or "perceptual", see `Filters`; duplicate ids are dropped in any case.
    """
    reasons = iter(_reasons(paths, dedup))
    for path in paths:
        for row, data in read_rows(path, with_data=True):
            if "reason" not in row and (reason := _REASONS[next(reasons)]):
                yield {**row, "reason": reason}, b""
            else:
                yield row, data


def _reasons(paths: Sequence[Path], dedup: str) -> np.ndarray:
    """Return a key of _REASONS for each row that is kept so far, uint8 [N]."""
    keys = ["id"]
    keys += ["exact"] if dedup else []
    keys += ["perceptual"] if dedup == "perceptual" else []
    columns = [array("Q") for _ in keys]
    for path in paths:
        for row, _ in read_rows(path):
            if "reason" not in row:
                values = {**row, "id": hashes.exact(row["id"].encode())}
                for key, column in zip(keys, columns, strict=True):
                    column.append(values[key])
    reasons = np.zeros(len(columns[0]), np.uint8)
    left = np.arange(len(reasons))
    for reason, (key, column) in enumerate(zip(keys, columns, strict=True), start=1):
        check = hashes.nearly_repeated if key == "perceptual" else hashes.repeated
        again = check(np.frombuffer(column, np.uint64)[left])
        reasons[left[again]] = reason
        left = left[~again]
    return reasons
