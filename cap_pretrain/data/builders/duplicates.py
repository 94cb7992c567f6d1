"""The one pass in which candidates are seen together: of those that are the same, the first stays.

It keeps a few numbers of 64 bits of each, so that a machine's memory holds hundreds of millions.
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cap_pretrain.data.builders import hashes
from cap_pretrain.data.builders.units import Row, read_rows

_REASONS = {0: "", 1: "duplicate id", 2: "duplicate image", 3: "near-duplicate image"}


def without_duplicates(paths: Sequence[Path], dedup: str) -> Iterator[tuple[Row, bytes]]:
    """Yields the rows of units with their images; those of duplicates have a reason and none.

    Args:
        paths: the units of a split, in their order.
        dedup: of `Filters`; ids are unique in any case.
    """
    reasons = iter(_reasons(paths, dedup))
    for path in paths:
        for row, data in read_rows(path, with_data=True):
            if "reason" not in row and (reason := _REASONS[next(reasons)]):
                yield {**row, "reason": reason}, b""
            else:
                yield row, data


def _reasons(paths: Sequence[Path], dedup: str) -> np.ndarray:
    """uint8 [N], keys of _REASONS, for the rows that were kept so far."""
    checks = [hashes.repeated]
    checks += [hashes.repeated] if dedup else []
    checks += [hashes.nearly_repeated] if dedup == "perceptual" else []
    columns = [array("Q") for _ in checks]
    for path in paths:
        for row, _ in read_rows(path):
            if "reason" not in row:
                values = hashes.exact(row["id"].encode()), row.get("exact"), row.get("perceptual")
                for column, value in zip(columns, values, strict=False):
                    column.append(value)
    reasons = np.zeros(len(columns[0]), np.uint8)
    left = np.arange(len(reasons))
    for reason, (check, column) in enumerate(zip(checks, columns, strict=True), start=1):
        again = check(np.frombuffer(column, np.uint64)[left])
        reasons[left[again]] = reason
        left = left[~again]
    return reasons
