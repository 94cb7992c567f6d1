"""Command line values of the form SPLIT=PATH."""

import re
from collections.abc import Iterable
from pathlib import Path

from cap_pretrain.errors import UserError

_SPLIT_AND_PATH = re.compile(r"(?:(?P<split>\w+)=)?(?P<path>.+)")


def by_split(flag: str, values: Iterable[str], default: str) -> dict[str, Path]:
    """Parses ["train=a.zip", "val=b.zip"] into a path a split; without SPLIT= it is `default`.

    Raises:
        UserError: a split named twice or "all" (TFDS's word for all of them), or an empty value.
    """
    paths: dict[str, Path] = {}
    for value in values:
        match = _SPLIT_AND_PATH.fullmatch(value)
        if match is None:
            raise UserError(f"{flag}: empty value; write SPLIT=PATH.")
        split = match["split"] or default
        if split == "all":
            raise UserError(
                f"{flag} {value}: TFDS keeps the name 'all' for itself; choose another."
            )
        if split in paths:
            raise UserError(f"{flag} {value}: split {split!r} is given twice.")
        paths[split] = Path(match["path"]).expanduser()
    return paths
