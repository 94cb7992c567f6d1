"""Image files by name, in a folder or a zip."""

import collections
import os
import posixpath
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cap_pretrain.errors import UserError

READ_ERRORS = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Raised on reading a single file that is corrupt, encrypted or has vanished."""

MAX_BYTES = 2**28  # larger files are rejected unread: no photographs, perhaps zip bombs
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
)


class Files(Protocol):
    """A folder or zip (`path`) of named files; `read` is thread-safe."""

    path: Path

    def names(self) -> Sequence[str]:
        """Return the names of all files, sorted, with "/" between folders."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises one of READ_ERRORS."""


def open_files(path: str | Path) -> Files:
    """Open a folder or a zip; raises UserError for anything else."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder or zip.")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: neither a folder nor a zip; unpack it, or give the folder.")
    return _Zip(path)


def image_names(files: Files) -> list[str]:
    """Return the names with an image suffix; raises UserError if there are none.

    Hidden files and macOS's resource forks are left out.
    """
    names = [
        name
        for name in files.names()
        if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    ]
    if not names:
        raise UserError(f"{files.path}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return names


class Finder:
    """Lookup of files by the names that annotations use.

    A name matches the full name of a file; or else its base name, since archives often add a
    folder. A base name that several files share matches none of them. If several of the folders and
    zips `where` have a file of the same name, the first wins. `key` maps a base name to the name
    that annotations use (default: itself), or to None to exclude the file.
    """

    def __init__(self, where: Sequence[Files], key: Callable[[str], str | None] | None = None):
        self._files_of: dict[str, Files] = {}
        for files in where:
            self._files_of = dict.fromkeys(files.names(), files) | self._files_of
        candidates: dict[str | None, list[str]] = collections.defaultdict(list)
        for name in self._files_of:
            base = posixpath.basename(name)
            if not base.startswith("."):  # such as macOS's resource forks
                candidates[key(base) if key else base].append(name)
        candidates.pop(None, None)
        self._by_key = {key: names[0] for key, names in candidates.items() if len(names) == 1}

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises FileNotFoundError or another of READ_ERRORS."""
        found = name if name in self._files_of else self._by_key.get(posixpath.basename(name))
        if found is None:
            raise FileNotFoundError(name)
        return self._files_of[found].read(found)


class _Folder:
    def __init__(self, path: Path):
        self.path = path
        self._names: list[str] | None = None

    def names(self) -> list[str]:
        if self._names is None:
            self._names = sorted(
                Path(folder, file).relative_to(self.path).as_posix()
                for folder, _, files in os.walk(self.path, followlinks=True)
                for file in files
            )
        return self._names

    def read(self, name: str) -> bytes:
        path = self.path / name
        _check_size(path.stat().st_size)
        return path.read_bytes()


class _Zip:
    def __init__(self, path: Path):
        self.path = path
        self._zip = zipfile.ZipFile(path)  # thread-safe: it locks reads of the shared file

    def names(self) -> list[str]:
        return sorted(info.filename for info in self._zip.infolist() if not info.is_dir())

    def read(self, name: str) -> bytes:
        _check_size(self._zip.getinfo(name).file_size)
        return self._zip.read(name)


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise OSError(f"{size} bytes is more than the limit of {MAX_BYTES}")
