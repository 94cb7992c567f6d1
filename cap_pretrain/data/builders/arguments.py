"""Command-line values of the form SPLIT=PATH."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import path_part

_SPLIT_AND_PATH = re.compile(r"(?:(?P<split>[\w-]+)=)?(?P<path>.+)", re.DOTALL)
_SPLIT = re.compile(r"\w+(-\w+)*")


def check_splits(names: Iterable[Any], where: object) -> None:
    """Raise UserError if a split's name is unusable in file names, or two differ only in case."""
    seen: dict[str, str] = {}
    for name in names:
        path_part(name, "split", where)
        if name == "all" or not _SPLIT.fullmatch(name):
            raise UserError(
                f"{where}: split {name!r} must consist of letters, digits, _ and -, and cannot be "
                "'all', which TFDS reserves for all splits; choose another."
            )
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise UserError(f"{where}: splits {other!r} and {name!r} differ only in case.")


def by_split(flag: str, values: Iterable[str], default: str) -> dict[str, Path]:
    """Parse SPLIT=PATH or PATH values of the option `flag` into paths by split, "~" expanded.

    A value without SPLIT= belongs to the split `default`. Raises UserError if a value is empty, or
    a split is given twice or has an unusable name.
    """
    paths: dict[str, Path] = {}
    for value in values:
        match = _SPLIT_AND_PATH.fullmatch(value)
        if match is None:
            raise UserError(f"{flag}: empty value; write SPLIT=PATH.")
        split, path = match["split"] or default, match["path"]
        if "-" in split and Path(value).expanduser().exists():  # the path has the "="
            split, path = default, value
        if split:
            check_splits([split], f"{flag} {value}")
        if split in paths:
            raise UserError(f"{flag} {value}: split {split!r} is given twice.")
        paths[split] = Path(path).expanduser()
    return paths
