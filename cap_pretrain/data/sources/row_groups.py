"""Decoded row groups of Parquet files: decoded once, the latest kept in memory, all on the disk.

A row group is compressed as a whole, so reading one of its rows means decoding all. Shuffled
reading returns to a group for each of its rows. So decoded groups are kept as Arrow files, which
hold the values as they are in memory, so that a row is read from a map of the file.
"""

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

from cap_pretrain.data.sources.contents import Recent
from cap_pretrain.data.sources.holes import take
from cap_pretrain.telemetry import console

MEMORY = 2**29
"""Bytes of decoded row groups in the memory of a process, if one has no more than that."""

MAPPED = 64
"""Row groups whose files are open at a time."""

_FILLED = 0.9  # part of the disk's free space that may be used
_EVERY = 32  # files after which the folder's size is looked up; other processes write there, too
_SUFFIX = ".arrow"

_taken: dict[Path, Path] = {}  # the folder that this process writes to, by that of the dataset


class Group(NamedTuple):
    """A row group of a file."""

    file: int
    number: int
    image: bool  # with the column of images


def own_folder(folder: Path) -> Path:
    """Return a part of a dataset's folder for this process and its workers.

    Each process on a machine reads other row groups, and bounds its folder by its own share of the
    budget. Where folders cannot be locked, all processes share one.
    """
    if folder not in _taken:
        _taken[folder] = folder
        with contextlib.suppress(OSError):  # writing reports what is wrong
            _taken[folder] = take(folder)
    return _taken[folder]


class RowGroups:
    """The tables of row groups. Thread-safe.

    Args:
        decode: returns the table of a group.
        folder: for decoded groups with images, shared by worker processes; None: memory is enough.
        budget: most bytes of this folder. The groups that were not used for longest are removed.
    """

    def __init__(self, decode: Callable[[Group], Any], folder: Path | None, budget: float):
        self._decode, self._folder, self._budget = decode, folder, budget
        self._lock, self._written = threading.Lock(), 0
        self._recent: Recent[tuple[Any, int]] = Recent(
            self._table, MAPPED, lambda value: value[1], MEMORY
        )

    def __call__(self, group: Group) -> Any:
        """Return the table of a row group."""
        return self._recent(group)[0]

    def kept(self, group: Group) -> bool:
        """Return whether a row group is decoded on the disk."""
        return self._folder is not None and self._path(self._folder, group).exists()

    def _path(self, folder: Path, group: Group) -> Path:
        return folder / f"{group.file}-{group.number}{_SUFFIX}"

    def _table(self, key: Hashable) -> tuple[Any, int]:
        """Return the table of a group, and its bytes in memory."""
        assert isinstance(key, Group)
        folder = self._folder if key.image else None
        if folder and (table := _mapped(self._path(folder, key))) is not None:
            return table, 0
        table = self._decode(key)
        if folder:
            try:
                _write(self._path(folder, key), table)
                self._bound(folder)
            except OSError as error:
                self._folder = None
                console.say(
                    f"data.cache: cannot write to {folder} ({error.strerror}), so row groups are "
                    "decoded again and again; make room or name another folder."
                )
                return table, table.nbytes
            if (mapped := _mapped(self._path(folder, key))) is not None:
                return mapped, 0
        return table, table.nbytes

    def _bound(self, folder: Path) -> None:
        """Remove the oldest files if the folder exceeds the budget."""
        with self._lock:
            self._written += 1
            if self._written % _EVERY != 1:
                return
            files = sorted(_files(folder), reverse=True)  # by age
            room = _FILLED * (shutil.disk_usage(folder).free + sum(size for _, size, _ in files))
            total = 0
            for _, size, path in files:
                total += size
                if total > min(self._budget, room):
                    path.unlink(missing_ok=True)


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith((_SUFFIX, ".tmp")):
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # removed by another process
                continue
            found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
    return found


def _write(path: Path, table: Any) -> None:
    """Write a table as an Arrow file, atomically, whoever else writes it at the same time."""
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _mapped(path: Path) -> Any | None:
    """Return the table in an Arrow file without reading it; None if there is no whole file."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        os.utime(path)  # used now
    except (OSError, pa.ArrowInvalid):
        return None
    return table
