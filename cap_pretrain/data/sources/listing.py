"""The files of a dataset in their original layout: by pattern or folder, local or remote."""

import dataclasses
import fnmatch
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cap_pretrain.data.sources import storage, unchanged
from cap_pretrain.data.sources.storage import Remote, retried, why
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.untrusted import shown

MAX_FILES = 2**20
"""Most files that a pattern may name."""

TRAIN = "train"

_THREADS = 16  # folders that are listed at a time
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MAGIC = re.compile(r"[{*?\[]")
_GLOB = re.compile(r"[*?\[]")
# Words in names of files that say the split, as in train-00000-of-00042.parquet.
_SPLITS = {"train": TRAIN, "training": TRAIN, "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
_ALIASES = {"val": "validation", "validation": "val"}


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a dataset; `stamps` change with its content."""

    name: str  # below the folder of the listing, with "/" between folders
    size: int  # bytes
    stamps: tuple[str, ...]
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fsspec's, of a remote file


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of one split in the order of its examples, below the folder `root`."""

    root: Path | Remote
    files: tuple[File, ...]
    splits: tuple[str, ...]  # names of all splits there are

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files)

    def path(self, number: int) -> Path | Remote:
        """Return the path or URL of a file."""
        return self.root / self.files[number].name


class NoSuchSplit(Exception):  # noqa: N818 (the caller makes a NoSplitError of it)
    """A pattern has no split of that name; `splits` are those that exist."""

    def __init__(self, splits: Sequence[str]):
        super().__init__()
        self.splits = tuple(splits)


def find(pattern: str, split: str, suffix: str, where: str) -> Listing:
    """Return the files of a split.

    All files of a pattern are the split "train". In a folder, or its subfolder "data", the names of
    files may say the split ("validation-00000-of-00001.parquet"); those that say none are "train".

    Args:
        pattern: a file, a folder, or a path or URL with {00000..00041}, {a,b}, *, ? or [0-9]. Only
            braces may stand in the names of folders.
        split: the name of a split, without brackets.
        suffix: of the files in a folder, in lower case.
        where: begins every message.

    Raises:
        UserError: a file is missing, or there is none, or the pattern is not valid.
        NoSuchSplit: no split has that name.
    """
    pattern = pattern.strip()
    if not pattern:
        raise UserError(f"{where}: names no files; give a folder, or a pattern of files.")
    path = storage.locate(pattern)
    if not _MAGIC.search(pattern):
        if path.is_dir():
            return _folder(path, split, suffix, where)
        if not path.is_file():
            near = _similar(path) if isinstance(path, Path) else ""
            raise UserError(f"{where}: no such file or folder.{near}")
    root, names = _rooted(path, where)
    files = list(_matching(root, names, where))
    if split != TRAIN:
        raise NoSuchSplit([TRAIN])
    return Listing(root, _sized(root, files), (TRAIN,))


def _folder(path: Path | Remote, split: str, suffix: str, where: str) -> Listing:
    found = _with_suffix(path, suffix)
    if not found and (path / "data").is_dir():
        path = path / "data"
        found = _with_suffix(path, suffix)
    if not found:
        raise UserError(f"{where}: no file *{suffix} in it; name another folder or a pattern.")
    by_split: dict[str, list[File]] = {}
    for file in found:
        by_split.setdefault(_split_of(file.name), []).append(file)
    chosen = split if split in by_split else _ALIASES.get(split, "")
    if chosen not in by_split:
        raise NoSuchSplit(list(by_split))
    return Listing(path, _sized(path, by_split[chosen]), tuple(by_split))


def _with_suffix(folder: Path | Remote, suffix: str) -> list[File]:
    found = _entries(folder)
    return [found[name] for name in sorted(found) if name.lower().endswith(suffix)]


def _split_of(name: str) -> str:
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), TRAIN)


def _rooted(path: Path | Remote, where: str) -> tuple[Path | Remote, list[str]]:
    """Return the deepest folder of a pattern without braces, and the names below it."""
    parts = str(path).split("/")
    first = next((k for k, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    root, rest = "/".join(parts[:first]), "/".join(parts[first:])
    if isinstance(path, Remote):
        return Remote(root), _expanded(rest, where)
    return Path(root or ("/" if path.is_absolute() else ".")), _expanded(rest, where)


def _expanded(text: str, where: str) -> list[str]:
    """Return the texts that {00..41} and {a,b} stand for, in order."""
    literals = _BRACES.split(text)[::2]
    choices = [_choices(m[1], where) for m in _BRACES.finditer(text)]
    if math.prod(map(len, choices)) > MAX_FILES:
        raise UserError(f"{where}: names over {MAX_FILES} files.")
    return [
        "".join(itertools.chain(*itertools.zip_longest(literals, made, fillvalue="")))
        for made in itertools.product(*choices)
    ]


def _choices(text: str, where: str) -> Sequence[str]:
    if match := _RANGE.fullmatch(text):
        first, last = int(match[1]), int(match[2])
        if last - first >= MAX_FILES:
            raise UserError(f"{where}: names over {MAX_FILES} files.")
        if first <= last:
            return [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
    if "," in text:
        return text.split(",")
    raise UserError(f"{where}: {shown(text)} in braces; write {{00000..00041}} or {{a,b}}.")


def _matching(root: Path | Remote, names: Sequence[str], where: str) -> Iterator[File]:
    """Yield the files that names and globs below a folder stand for; each folder is listed once."""
    folders = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
    for folder in folders:
        if _GLOB.search(folder):
            raise UserError(f"{where}: has *, ? or [ in the name of a folder; use braces there.")
    with ThreadPoolExecutor(_THREADS) as threads:
        entries = threads.map(lambda folder: _entries(root / folder if folder else root), folders)
        found = dict(zip(folders, entries, strict=True))
    missing = []
    for name in names:
        folder, _, base = name.rpartition("/")
        matches = fnmatch.filter(sorted(found[folder]), base) if _GLOB.search(base) else [base]
        if not matches or matches[0] not in found[folder]:
            missing.append(name)
            continue
        prefix = f"{folder}/" if folder else ""
        for match in matches:
            file = found[folder][match]
            yield dataclasses.replace(file, name=prefix + file.name)
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(names)} names match no file, the first is "
            f"{missing[0]}; correct the pattern, or name the folder."
        )


def _sized(root: Path | Remote, files: Sequence[File]) -> tuple[File, ...]:
    """Return the files with their sizes; HTTP servers say them only when asked about each."""

    def sized(file: File) -> File:
        path = root / file.name
        if file.size >= 0 or isinstance(path, Path):
            return file
        info = path.info()
        return File(file.name, int(info["size"]), _remote_stamps(info), info)

    with ThreadPoolExecutor(_THREADS) as threads:
        return tuple(threads.map(sized, files))


def _entries(folder: Path | Remote) -> dict[str, File]:
    """Return the files of a folder by name, without hidden ones; the size is -1 if not listed."""
    if isinstance(folder, Remote):
        listed = {
            name: File(name, -1 if size is None else int(size), _remote_stamps(entry), entry)
            for name, entry in folder.files().items()
            for size in [entry.get("size")]
        }
    else:
        listed = _local_entries(folder)
    return {name: file for name, file in listed.items() if not name.startswith(".")}


def _local_entries(folder: Path) -> dict[str, File]:
    def read() -> dict[str, File]:
        with os.scandir(folder) as entries:
            files = ((e.name, e.stat()) for e in entries if e.is_file())
            return {name: File(name, s.st_size, local_stamps(s)) for name, s in files}

    try:
        return retried(read)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({why(error)}).") from error


def local_stamps(status: os.stat_result) -> tuple[str, ...]:
    """Return the stamps of a local file."""
    return (str(status.st_mtime_ns),)


def _remote_stamps(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name} {value}" for name, value in sorted(unchanged.stamps(entry).items()))


def _similar(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, names) if len(names) < 1000 else ""
