"""Local files of the size of remote ones, of which some pages are present and the rest are holes.

A `Slot` is a folder for the files of all datasets that one process and its workers read. It is
locked, so that a second run on the machine takes another, and left for the next run to use again.
Processes share it through a memory-mapped file for each dataset (`Sparse`):

- Present pages are marked after they were written. A page that is not marked is never read.
- A range of pages is locked while it is fetched or removed, so each is fetched once.
- Pages are removed by punching holes into the file, which frees their space. A reader looks up a
  count of removals before and after it reads, and reads again if pages were removed meanwhile.

Locks are those of open file descriptions, which hold between threads as between processes.
Markers are trusted only in the boot of the machine that made them, since after a crash of the
machine they could be on the disk without the pages.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import numpy as np

from cap_pretrain.data.sources.storage import why
from cap_pretrain.errors import UserError

PAGE = 4096
"""Bytes of a page, the unit that is present or not: a block of ext4 and xfs."""
ON_DEMAND = 256
"""Urgency of a range that is read now; planned ones have 1 (least) to 255, others 0."""

_FORMAT = 1  # of the files below a slot; other formats are deleted
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PRESENT, _USED, _REMOVALS = range(3)  # rows of `Sparse._table`
_LOCK = "hhqqi4x"  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_libc = ctypes.CDLL(None, use_errno=True)


class Slot:
    """A folder of sparse files; `acquire` finds one that no other run uses."""

    _held: ClassVar[dict[Path, "Slot"]] = {}  # by the cache folder

    def __init__(self, path: Path):
        self.path = path
        self._state = np.memmap(path / "state", np.int64, "r+", shape=(1,))
        self._datasets: dict[str, Sparse] = {}

    @classmethod
    def acquire(cls, cache: Path) -> "Slot":
        """Return the slot of this process in a cache folder; it is kept until the process ends.

        Raises UserError if the folder cannot be written, or its file system lacks holes.
        """
        cache = cache.expanduser().absolute()
        if cache not in cls._held:
            with writing(cache):
                cls._held[cache] = cls._free(cache)
        return cls._held[cache]

    @classmethod
    def _free(cls, cache: Path) -> "Slot":
        cache.mkdir(parents=True, exist_ok=True)
        for number in range(2**16):
            path = cache / f"ranges-{number}"
            path.mkdir(exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends
            except BlockingIOError:
                os.close(lock)
                continue
            _check_holes(path)
            _clear(path)
            slot = cls(path)
            slot._state[0] = sum(d.restore() for d in slot.datasets()) * PAGE
            return slot
        raise OSError(errno.EUSERS, "all slots are in use")

    @property
    def used(self) -> int:
        """Bytes of present pages and of those being fetched, of all datasets."""
        return int(self._state[0])

    def dataset(self, name: str, sizes: Mapping[str, int]) -> "Sparse":
        """Return the files of a dataset, created if there are none; sizes are in bytes."""
        folder = self.path / name
        with writing(folder):
            if not (folder / "files.json").exists():
                folder.mkdir(exist_ok=True)
                _write(folder / "files.json", json.dumps(dict(sizes)))
        return self._opened(name)

    def datasets(self) -> "list[Sparse]":
        """Return the files of all datasets."""
        return [self._opened(path.parent.name) for path in self.path.glob("*/files.json")]

    def _opened(self, name: str) -> "Sparse":
        if name not in self._datasets:
            self._datasets[name] = Sparse(self, self.path / name)
        return self._datasets[name]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude all other threads and processes that account for pages of this slot."""
        with _lock(self.path / "state", 0, 1):
            yield

    def reserve(self, size: int, budget: int, urgency: int) -> bool:
        """Account for `size` bytes to be fetched, and remove pages so that `budget` holds them.

        Pages that nobody planned are removed first, least recently used files first, then planned
        ones that are less urgent. Returns False if that is not enough, unless the bytes are needed
        now (`ON_DEMAND`).
        """
        with self.locked():
            over = self.used + size - budget
            if over > 0:
                # More than is needed, so that most calls remove nothing.
                self._remove(max(over, budget // 16), 1)
                for limit in (*range(2, urgency, 16), urgency):
                    if self.used + size <= budget:
                        break
                    self._remove(self.used + size - budget, limit)
            if self.used + size > budget and urgency < ON_DEMAND:
                return False
            self._state[0] += size
            return True

    def release(self, size: int) -> None:
        """Take back a reservation of bytes that were not fetched."""
        with self.locked():
            self._state[0] -= size

    def _remove(self, size: int, limit: int) -> None:
        """Remove `size` bytes of pages that are less urgent than `limit`."""
        files = [file for dataset in self.datasets() for file in dataset.files()]
        for _, dataset, index in sorted(files, key=lambda file: file[0]):
            if size <= 0:
                return
            removed = dataset.remove(index, -(-size // PAGE), limit) * PAGE
            self._state[0] -= removed
            size -= removed


class Sparse:
    """The sparse files of one dataset in a slot, a folder with a list of their sizes."""

    def __init__(self, slot: Slot, folder: Path):
        self.slot, self.folder = slot, folder
        self.sizes: dict[str, int] = json.loads((folder / "files.json").read_text())
        self._indices = {name: index for index, name in enumerate(self.sizes)}
        self._names = list(self.sizes)
        pages = [-(-size // PAGE) for size in self.sizes.values()]
        self._first = np.concatenate([[0], np.cumsum(pages, dtype=np.int64)])
        count, total = len(pages), int(self._first[-1])
        self._offset = 3 * 8 * count
        self._map = folder / "pages"
        with writing(folder), self._map.open("ab") as file:
            if file.tell() == 0:
                file.truncate(self._offset + 2 * total + 1)
        memory = np.memmap(self._map, np.uint8, "r+")
        self._table = memory[: self._offset].view(np.int64).reshape(3, count)
        self._marks = memory[self._offset : self._offset + total]
        self._urgency = memory[self._offset + total : self._offset + 2 * total]

    def path(self, name: str) -> Path:
        """Return the sparse file, created if there is none."""
        path = self.folder / quote(name, safe="")
        if not path.exists():
            with writing(self.folder), path.open("ab") as file:
                file.truncate(self.sizes[name])
        return path

    def pages(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """Return the first page of a range of bytes and that after its last, as all files' pages.

        Raises UserError if the range is not inside the file.
        """
        if not 0 <= start <= stop <= self.sizes[name]:
            raise UserError(
                f"{name}: bytes {start} to {stop} are asked for, but it has {self.sizes[name]}; "
                "copy or build it again."
            )
        first = int(self._first[self._indices[name]])
        return first + start // PAGE, first + -(-stop // PAGE)

    def bytes_of(self, name: str, pages: tuple[int, int]) -> tuple[int, int]:
        """Return the range of bytes of a range of pages."""
        first = int(self._first[self._indices[name]])
        return (pages[0] - first) * PAGE, min((pages[1] - first) * PAGE, self.sizes[name])

    def missing(self, pages: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the ranges of pages that are not present."""
        return [(pages[0] + a, pages[0] + b) for a, b in _runs(self._marks[slice(*pages)] == 0)]

    def removals(self, name: str) -> int:
        """Return how often pages of a file were removed, and count the file as used now."""
        index = self._indices[name]
        self._table[_USED, index] = time.monotonic_ns()
        return int(self._table[_REMOVALS, index])

    @contextlib.contextmanager
    def locked(self, pages: tuple[int, int]) -> Iterator[None]:
        """Exclude all others that fetch or remove these pages."""
        with _lock(self._map, self._offset + pages[0], pages[1] - pages[0]):
            yield

    def write(self, name: str, pages: tuple[int, int], data: bytes) -> None:
        """Write pages that are locked and reserved, and mark them as present."""
        with writing(self.folder):
            file = os.open(self.path(name), os.O_WRONLY)
            try:
                offset, view = self.bytes_of(name, pages)[0], memoryview(data)
                while view:
                    written = os.pwrite(file, view, offset)
                    offset, view = offset + written, view[written:]
            finally:
                os.close(file)
        with self.slot.locked():
            self._marks[slice(*pages)] = 1
            self._table[_PRESENT, self._indices[name]] += pages[1] - pages[0]
            self._table[_USED, self._indices[name]] = time.monotonic_ns()

    def set_urgency(self, old: list[tuple[int, int]], new: list[tuple[int, int, int]]) -> None:
        """Replace the urgency of the pages `old` by those of `new`: (first, last + 1, urgency)."""
        with self.slot.locked():
            for start, stop in old:
                self._urgency[start:stop] = 0
            for start, stop, urgency in new:
                np.maximum(self._urgency[start:stop], urgency, out=self._urgency[start:stop])

    def files(self) -> "list[tuple[int, Sparse, int]]":
        """Return (time of last use, self, index) of each file that has pages."""
        indices = np.flatnonzero(self._table[_PRESENT] > 0)
        return [(int(self._table[_USED, index]), self, int(index)) for index in indices]

    def remove(self, index: int, most: int, limit: int) -> int:
        """Remove up to `most` pages of a file that are less urgent than `limit`; return how many.

        Pages that are locked are left. The slot must be locked.
        """
        first, last = (int(page) for page in self._first[index : index + 2])
        marked = (self._marks[first:last] != 0) & (self._urgency[first:last] < limit)
        removed = 0
        for start, stop in _runs(marked):
            stop = min(stop, start + most - removed)
            if start >= stop:
                break
            pages = (first + start, first + stop)
            lock = _lock(self._map, self._offset + pages[0], pages[1] - pages[0], wait=False)
            with contextlib.suppress(BlockingIOError), lock:
                self._marks[slice(*pages)] = 0  # in this order: see `Ranges.using`
                self._table[_REMOVALS, index] += 1
                _punch(self.path(self._names[index]), start * PAGE, (stop - start) * PAGE)
                self._table[_PRESENT, index] -= stop - start
                removed += stop - start
        return removed

    def restore(self) -> int:
        """Make the files agree with the markers after an earlier run; return the present pages.

        A run that was killed may have left pages that it had not marked; they are removed.
        """
        self._urgency[:] = 0
        self._table[_PRESENT] = 0
        for index, name in enumerate(self._names):
            path = self.folder / quote(name, safe="")
            if path.exists() and path.stat().st_blocks:
                marks = self._marks[slice(*(int(p) for p in self._first[index : index + 2]))]
                for start, stop in _runs(marks == 0):
                    _punch(path, start * PAGE, (stop - start) * PAGE)
                self._table[_PRESENT, index] = np.count_nonzero(marks)
        return int(self._table[_PRESENT].sum())


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn errors of writing to the cache into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache: cannot write to {folder} ({why(error)}); make room or name another "
            "folder."
        ) from error


@contextlib.contextmanager
def _lock(path: Path, start: int, length: int, wait: bool = True) -> Iterator[None]:
    """Lock bytes of a file against all other threads and processes; raises BlockingIOError."""
    file = os.open(path, os.O_RDWR)
    try:
        request = struct.pack(_LOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
        yield
    finally:
        os.close(file)  # which unlocks


def _punch(path: Path, start: int, length: int) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        mode, offset, size = _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(length)
        if _libc.fallocate(file, mode, offset, size):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(file)


def _runs(chosen: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, last + 1) of each run of true elements."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _check_holes(folder: Path) -> None:
    path = folder / "holes"
    path.write_bytes(bytes([1]) * 2 * PAGE)
    try:
        _punch(path, 0, PAGE)
        _write(path, "")
        with _lock(path, 0, 1):
            pass
    except (OSError, AttributeError) as error:
        raise UserError(
            f"data.cache: the file system of {folder} cannot free parts of a file ({why(error)}); "
            "name a folder on a local disk (ext4, xfs, tmpfs), or set data.order=global."
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Delete what another boot of the machine, or another version of this module, left."""
    boot = f"{_FORMAT} {_BOOT.read_text().strip() if _BOOT.exists() else os.urandom(8).hex()}"
    known = path / "boot"
    if not (known.exists() and known.read_text() == boot):
        for folder in path.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)
        _write(known, boot)
    if not (path / "state").exists():
        (path / "state").write_bytes(bytes(8))


def _write(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
