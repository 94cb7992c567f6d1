"""The files of a run, on a disk or in a bucket: paths, atomic writes, logs, and reading JSON."""

import io
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any, cast

from cap_pretrain.errors import UserError
from cap_pretrain.files.copies import local, local_folder, upload
from cap_pretrain.files.logs import Appended, naming
from cap_pretrain.files.markers import COMMITTED
from cap_pretrain.files.places import is_url, place
from cap_pretrain.untrusted import check_parsed, parse_json, read_bounded

__all__ = [
    "COMMITTED",
    "Appended",
    "is_url",
    "local",
    "local_folder",
    "make_workdir",
    "naming",
    "number",
    "numbered",
    "place",
    "read_json",
    "read_json_lines",
    "total_size",
    "unused",
    "upload",
    "write_bytes",
    "write_text",
]


def make_workdir(workdir: Path) -> None:
    """Create the folder of a run; raise UserError if it cannot be created or written to."""
    content = b"to check that there is space"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if is_url(workdir):
            probe = workdir / f".writable-{socket.gethostname()}-{os.getpid()}"
            probe.write_bytes(content)
            probe.unlink()
        else:
            with tempfile.TemporaryFile(dir=workdir) as file:
                file.write(content)
    except OSError as e:
        missing = is_url(workdir) and isinstance(e, FileNotFoundError)
        reason = "the bucket does not exist" if missing else e.strerror
        raise UserError(
            f"--workdir: cannot write to {str(workdir)!r} ({reason}); fix that or name "
            "another folder."
        ) from e


def write_text(path: Path, text: str) -> None:
    """Write a text to `path` atomically as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically, creating its folder.

    If the process is killed or the disk is full, the old file remains; every OSError names the
    file.
    """
    if is_url(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    with naming(path):
        fresh.unlink(missing_ok=True)  # it may be a link to elsewhere
        fresh.write_bytes(data)
        fresh.replace(path)


def unused(path: Path) -> Path:
    """Return `path` or, if that exists, the first of NAME.2.SUFFIX, NAME.3.SUFFIX, … that does not.

    What says how a state came to be is kept under such a name, so that nothing replaces it.
    """
    fresh, number = path, 1
    while fresh.is_symlink() or fresh.exists():
        number += 1
        fresh = path.with_name(f"{path.stem}.{number}{path.suffix}")
    return fresh


def total_size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    if is_url(folder):
        return sum(cast(Any, folder).sizes().values())
    return sum(file.stat().st_size for file in folder.rglob("*"))


def numbered(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Return the entries of a folder, which may not exist, called NUMBER and `suffix`.

    The number is written as Python writes it: "300", but not "0300", "+300" or other digits.
    """
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    named = {number(p.name.removesuffix(suffix)): p for p in paths if p.name.endswith(suffix)}
    return {n: path for n, path in named.items() if n is not None}


def number(name: str) -> int | None:
    """Return the number that a name is, or None if it is none or not as Python writes it."""
    return int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, which may be gzipped.

    Raises UserError if it is missing, cannot be read, is not JSON or decompresses to too much.
    """
    data = read_bounded(path)
    check_parsed(data, path)
    return parse_json(data, path)


def read_json_lines(path: Path) -> list[Any]:
    """Return the values of a JSON Lines file, skipping empty lines; see `read_json`."""
    data = read_bounded(path)
    check_parsed(data, path)
    return [parse_json(line, path) for line in io.BytesIO(data) if line.strip()]
