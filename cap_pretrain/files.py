"""Atomic writes of a run's files, append-only logs, and reading JSON with clear errors."""

import contextlib
import gzip
import json
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cap_pretrain.errors import UserError


def make_workdir(workdir: Path) -> None:
    """Create the folder of a run; raise UserError if it cannot be created or written to."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(b"to check that there is space")
    except OSError as e:
        raise UserError(
            f"--workdir: cannot write to {str(workdir)!r} ({e.strerror}); fix that or name "
            "another folder."
        ) from e


def write_text(path: Path, text: str) -> None:
    """Write a text to `path` atomically as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically, creating its folder.

    If the process is killed, either the old file or the new one remains.

    Raises:
        OSError: the disk is full, for example; it names the file. The old file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    with naming(path):
        fresh.write_bytes(data)
        fresh.replace(path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, which may be gzipped.

    Raises:
        UserError: the file is missing, cannot be read or is not JSON.
    """
    return _parse(path, _read(path))


def read_json_lines(path: Path) -> list[Any]:
    """Return the values of a JSON Lines file, skipping empty lines; see `read_json`."""
    return [_parse(path, line) for line in _read(path).splitlines() if line.strip()]


def _read(path: Path) -> bytes:
    """Return the content of a file, decompressed if it is gzipped."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error


def _parse(path: Path, data: bytes) -> Any:
    """Parse JSON read from `path`; raise UserError if it is invalid."""
    try:
        return json.loads(data)
    except ValueError as error:  # also for an invalid text encoding
        raise UserError(f"{path}: is not JSON ({error}).") from error


class Appended:
    """An unbuffered append-only file: when `write` returns, the operating system has the data.

    Every method raises OSError, with the name of the file, if it cannot write. The data of that
    call is then dropped; `close` does not try again.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Append all of `data`; if the disk is full, as much of it as fits."""
        with naming(self._path):
            while data:
                data = data[self._file.write(data) :]

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._file.close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to every OSError inside the context; Python adds it only when opening fails."""
    try:
        yield
    except OSError as e:
        e.filename, e.filename2 = str(path), None
        raise
