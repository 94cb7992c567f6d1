"""Image files by name, out of a folder or a zip."""

import collections
import functools
import os
import posixpath
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cap_pretrain.errors import UserError

READ_ERRORS = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading one damaged, encrypted or vanished file may raise."""

MAX_BYTES = 2**28
"""Larger files are refused unread: no photograph, and perhaps a zip that unpacks without end."""

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
)


class Files(Protocol):
    """Named files; `read` may be called from several threads at once."""

    path: Path

    def names(self) -> Sequence[str]:
        """The names of all files, sorted, with "/" between folders."""

    def read(self, name: str) -> bytes:
        """Returns a file's bytes; raises one of READ_ERRORS."""


def open_files(path: str | Path) -> Files:
    """Opens a folder or a zip. Raises UserError for anything else."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder or zip.")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: neither a folder nor a zip; unpack it, or give the folder.")
    return _Zip(path)


def image_names(files: Files) -> list[str]:
    """The names that look like images; hidden files and macOS's resource forks are no images.

    Raises:
        UserError: there is none.
    """
    names = [
        name
        for name in files.names()
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    ]
    if not names:
        raise UserError(f"{files.path}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return names


class Finder:
    """Files as annotations call them: by name, or by base name, since archives often add a folder.

    What several base names stand for, none is called.

    Args:
        where: folders and zips; of files of one name in several of them, the first counts.
        key: makes of a base name what annotations call the file, or None if they never do; without
            one they call it by its base name.
    """

    def __init__(self, where: Sequence[Files], key: Callable[[str], str | None] | None = None):
        self._named: dict[str, Files] = {}
        for files in where:
            self._named = dict.fromkeys(files.names(), files) | self._named
        called = collections.defaultdict(list)
        for name in self._named:
            base = posixpath.basename(name)
            if not base.startswith("."):  # such as macOS's resource forks
                called[key(base) if key else base].append(name)
        called.pop(None, None)
        self._called = {call: names[0] for call, names in called.items() if len(names) == 1}

    def read(self, name: str) -> bytes:
        """Returns a file's bytes; raises FileNotFoundError or another of READ_ERRORS."""
        found = name if name in self._named else self._called.get(posixpath.basename(name))
        if found is None:
            raise FileNotFoundError(name)
        return self._named[found].read(found)


class _Folder:
    def __init__(self, path: Path):
        self.path = path

    @functools.cache
    def names(self) -> list[str]:
        return sorted(
            os.path.relpath(os.path.join(folder, file), self.path).replace(os.sep, "/")
            for folder, _, files in os.walk(self.path, followlinks=True)
            for file in files
        )

    def read(self, name: str) -> bytes:
        path = self.path / name
        _check_size(path.stat().st_size)
        return path.read_bytes()


class _Zip:
    def __init__(self, path: Path):
        self.path = path
        self._zip = zipfile.ZipFile(path)  # locks itself around reads of the shared file

    def names(self) -> list[str]:
        return sorted(info.filename for info in self._zip.infolist() if not info.is_dir())

    def read(self, name: str) -> bytes:
        _check_size(self._zip.getinfo(name).file_size)
        return self._zip.read(name)


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise OSError(f"{size} bytes is more than the limit of {MAX_BYTES}")
