"""Image files by name, in a folder or a zip."""

import collections
import functools
import os
import posixpath
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cap_pretrain.data.image_files import IMAGE_SUFFIXES, MAX_BYTES
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import FREE_BYTES, MAX_RATIO, open_regular, parsing

READ_ERRORS = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Raised on reading a single file that is corrupt, encrypted or has vanished."""

_LIMITED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Files(Protocol):
    """A folder or zip (`path`) of named files; `read` is thread-safe."""

    path: Path

    def names(self) -> Sequence[str]:
        """Return the names of all files, sorted, with "/" between folders."""

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises one of READ_ERRORS."""

    def skipped(self) -> Mapping[str, str]:
        """Return the folders that are not read, and why: links to others, without permission."""


def open_files(path: str | Path) -> Files:
    """Open a folder or a zip; raises UserError for anything else."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder or zip.")
    if not (path.is_file() and zipfile.is_zipfile(path)):
        raise UserError(f"{path}: neither a folder nor a zip; unpack it, or give the folder.")
    with parsing(path):
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


UNREADABLE = "unreadable folder"

DEEPEST = 16
"""Folders of a path that are compared with those of a name."""


class AmbiguousNameError(FileNotFoundError):
    """Several files match a name equally well."""


class Finder:
    r"""Lookup of files by the names that annotations use.

    A name matches the full name of a file; or else the file whose path ends in the most of its
    parts, at least in its base name, since archives often add or leave out folders. All Unicode
    forms of a name are equal, and "\" stands for "/", as Windows writes paths. If several of the
    folders and zips `where` have a file of the same name, the first wins. `key` maps a base name to
    the name that annotations use (default: itself), or to None to exclude the file.
    """

    def __init__(self, where: Sequence[Files], key: Callable[[str], str | None] | None = None):
        self._files_of: dict[str, Files] = {}
        for files in where:
            self._files_of = dict.fromkeys(files.names(), files) | self._files_of
        self._by_key: dict[str | None, list[str]] = collections.defaultdict(list)
        for name in self._files_of:
            base = posixpath.basename(_plain(name))
            if not base.startswith("."):  # such as macOS's resource forks
                self._by_key[key(base) if key else base].append(name)
        self._by_key.pop(None, None)
        self._ends_of: dict[str, dict[str, list[str]]] = {}

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises AmbiguousNameError, FileNotFoundError or of READ_ERRORS."""
        found = name if name in self._files_of else self._closest(_plain(name).split("/"))
        return self._files_of[found].read(found)

    def _closest(self, parts: Sequence[str]) -> str:
        """Return the file whose path ends in the most of `parts`."""
        candidates = self._by_key.get(parts[-1], [])
        if not candidates:
            raise FileNotFoundError("/".join(parts))
        if len(candidates) == 1:
            return candidates[0]
        if parts[-1] not in self._ends_of:
            self._ends_of[parts[-1]] = _by_end(candidates)
        ends = self._ends_of[parts[-1]]
        closest = next(filter(None, (ends.get(end) for end in _ends(parts))))
        if len(closest) > 1:
            raise AmbiguousNameError(f"{closest[0]} or {closest[1]}")
        return closest[0]


def _plain(name: str) -> str:
    """Return a name in one Unicode form, with "/" between its parts."""
    return unicodedata.normalize("NFC", name).replace("\\", "/")


def _ends(parts: Sequence[str]) -> Iterator[str]:
    """Yield the last folders of a path, from the most of them, up to DEEPEST, to none."""
    folders = parts[:-1][-DEEPEST:]
    return ("/".join(folders[n:]) for n in range(len(folders) + 1))


def _by_end(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the first two names of files by each of their `_ends`."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        for end in _ends(_plain(name).split("/")):
            if len(found[end]) < 2:
                found[end].append(name)
    return dict(found)


def distinct_names(paths: Iterable[Path], *names: Callable[[Path], str]) -> dict[str, Path]:
    """Name each file by the first of `names` that is unique for it, in order of `paths`.

    The last of `names` must always be unique.
    """
    left, named = list(paths), dict[Path, str]()
    for name in names:
        counts = collections.Counter(map(name, left)) + collections.Counter(named.values())
        named |= {path: name(path) for path in left if counts[name(path)] == 1}
        left = [path for path in left if path not in named]
    return {named[path]: path for path in sorted(named)}


class _Folder:
    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        return self._walked[0]

    def skipped(self) -> dict[str, str]:
        return self._walked[1]

    @functools.cached_property
    def _walked(self) -> tuple[list[str], dict[str, str]]:
        """All names, and the skipped folders: each folder is read once, so loops end."""
        names: list[str] = []
        skipped: dict[str, str] = {}
        seen: set[tuple[int, int]] = set()
        folders, links = collections.deque([""]), collections.deque[str]()
        while folders or links:  # links last: a folder is read by its own name
            folder = (folders or links).popleft()
            try:
                status = (self.path / folder).stat()
                if (status.st_dev, status.st_ino) in seen:
                    skipped[folder] = "link to a folder that is read already"
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(self.path / folder) as entries:
                    for entry in sorted(entries, key=lambda e: e.name):
                        name = posixpath.join(folder, entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(name)
                        elif entry.is_symlink() and (self.path / name).is_dir():
                            links.append(name)
                        else:
                            names.append(name)
            except OSError:
                skipped[folder] = UNREADABLE
        return sorted(names), skipped

    def read(self, name: str) -> bytes:
        with open_regular(self.path / name) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OSError(f"more than the limit of {MAX_BYTES} bytes")
        return data


class _Zip:
    def __init__(self, path: Path):
        self.path = path
        self._zip = zipfile.ZipFile(open_regular(path))  # thread-safe: it locks reads of the file

    def names(self) -> list[str]:
        return sorted(info.filename for info in self._zip.infolist() if info.filename[-1:] != "/")

    def skipped(self) -> dict[str, str]:
        return {}

    def read(self, name: str) -> bytes:
        info = self._zip.getinfo(name)
        if info.file_size > MAX_BYTES:
            raise OSError(f"{info.file_size} bytes is more than the limit of {MAX_BYTES}")
        if info.file_size > FREE_BYTES + MAX_RATIO * info.compress_size:
            raise OSError(f"it decompresses to over {MAX_RATIO} times its size")
        # Of other methods than deflate, zipfile decompresses all that it reads, at any ratio.
        step = info.file_size if info.compress_type in _LIMITED else 4096
        try:
            with self._zip.open(info) as file:
                return b"".join(iter(lambda: file.read(max(step, 1)), b""))
        except Exception as error:  # zipfile and the decompressors raise nearly anything
            raise OSError(str(error) or type(error).__name__) from error
