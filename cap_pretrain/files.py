"""Files: a run's own, which are there in whole or not at all, its logs, and JSON of others."""

import contextlib
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cap_pretrain.errors import UserError


def make_workdir(workdir: Path) -> None:
    """Makes the folder of a run; raises UserError if it cannot be made or written to."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(b"to see whether there is room")
    except OSError as e:
        raise UserError(
            f"--workdir: cannot write to {str(workdir)!r} ({e.strerror}); mend that or name "
            "another folder."
        ) from e


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, making its folder; a kill leaves the old file or the new one.

    Raises:
      OSError: with the name of the file, as when the disk is full; the old file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    with naming(path):
        fresh.write_bytes(data)
        os.replace(fresh, path)


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds, gzipped or not.

    Raises:
      UserError: it is missing, cannot be read or is no JSON.
    """
    return _parse(path, _read(path))


def read_json_lines(path: Path) -> list[Any]:
    """`read_json` of a file with a value on each line; empty lines are passed over."""
    return [_parse(path, line) for line in _read(path).splitlines() if line.strip()]


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error


def _parse(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # also of the text encoding
        raise UserError(f"{path}: is not JSON ({error}).") from error


class Appended:
    """A file that only grows. What `write` has returned from is with the operating system.

    Every method raises OSError, with the name of the file, when the disk does not take it. What has
    not been written is forgotten then: `close` does not try again.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Appends all of `data`, or as much of it as there is room for."""
        with naming(self._path):
            while data:
                data = data[self._file.write(data) :]

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets errors of writing to `path` say so, as by themselves only those of opening do."""
    try:
        yield
    except OSError as e:
        e.filename, e.filename2 = str(path), None
        raise
