"""Command-line values of the form SPLIT=PATH."""

import re
from collections.abc import Iterable
from pathlib import Path

from cap_pretrain.errors import UserError

_SPLIT_AND_PATH = re.compile(r"(?:(?P<split>\w+)=)?(?P<path>.+)")


def by_split(flag: str, values: Iterable[str], default: str) -> dict[str, Path]:
    """Parse SPLIT=PATH or PATH values of the option `flag` into paths by split, "~" expanded.

    A value without SPLIT= belongs to the split `default`. Raises UserError if a value is empty, or
    a split is given twice or called "all", the name by which TFDS refers to all splits.
    """
    paths: dict[str, Path] = {}
    for value in values:
        match = _SPLIT_AND_PATH.fullmatch(value)
        if match is None:
            raise UserError(f"{flag}: empty value; write SPLIT=PATH.")
        split = match["split"] or default
        if split == "all":
            raise UserError(
                f"{flag} {value}: TFDS reserves the name 'all' for all splits; choose another."
            )
        if split in paths:
            raise UserError(f"{flag} {value}: split {split!r} is given twice.")
        paths[split] = Path(match["path"]).expanduser()
    return paths
