"""Local files of the size of remote ones, of which some pages are present and the rest are holes.

A `Slot` is a folder for the files of all datasets that one process and its workers read. It is
locked, so that a second run on the machine takes another, and left for the next run to use again.
Processes share it through a memory-mapped file for each dataset (`Sparse`):

- Present pages are marked after they were written. A page that is not marked is never read.
- A range of pages is locked while it is fetched or removed, so each is fetched once. Pages that a
  reader has to wait for are also held until it has read them.
- Pages are removed by punching holes into the file, which frees their space. A reader looks up a
  count of removals before and after it reads, and reads again if pages were removed meanwhile.

Locks are those of open file descriptions, which hold between threads as between processes.
Markers are trusted only in the boot of the machine that made them, since after a crash of the
machine they could be on the disk without the pages.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import numpy as np

from cap_pretrain import files
from cap_pretrain.data.sources.holes import (
    check_holes,
    hold,
    lock,
    punch,
    runs,
    take,
    write_at,
    writing,
)
from cap_pretrain.errors import UserError

PAGE = 4096
"""Bytes of a page, the unit that is present or not: a block of ext4 and xfs."""
ON_DEMAND = 256
"""Urgency of a range that is read now; planned ones have 1 (least) to 255, others 0."""

Pages = tuple[int, int]
"""First page of a range, and that after its last, numbered through all files of a dataset."""

_FORMAT = 5  # of the files below a slot; other formats are deleted
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_LEAST_PART = 16  # pages that are removed together or not at all, some of them being locked
_MAP_PART = 1 << 16  # bytes of a map that get disk space together, the marks of 256 MB
_PRESENT, _USED, _REMOVALS = range(3)  # rows of `Sparse._table`
_USED_BYTES, _BUDGET, _ASKED = range(_STATE := 3)  # elements of `Slot._state`
_WAIT, _WAITS = 0.01, 300  # seconds, and how often, until the budget is exceeded


class Slot:
    """A folder of sparse files; `acquire` finds one that no other run uses."""

    _held: ClassVar[dict[Path, "Slot"]] = {}  # by the cache folder

    def __init__(self, path: Path):
        self.path = path
        self._state = np.memmap(path / "state", np.int64, "r+", shape=(_STATE,))
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
        path = take(cache, "ranges-")
        check_holes(path)
        _clear(path)
        slot = cls(path)
        slot._state[:] = sum(d.restore() for d in slot.datasets()) * PAGE, 0, 0
        return slot

    @property
    def budget(self) -> int:
        """Most bytes of all datasets, for this process and its workers."""
        return int(self._state[_BUDGET])

    def allow(self, budget: int) -> None:
        """Set the budget, unless an earlier dataset of this run has.

        If the disk has no room for it, slots that no process holds are emptied. If that does not
        help, the budget is half of the room that there is.
        """
        with self.locked():
            if self.budget:
                return
            if budget > self._room():
                for other in self.path.parent.glob("ranges-*"):
                    with contextlib.suppress(BlockingIOError, FileNotFoundError):
                        held = hold(other)
                        _empty(other)
                        os.close(held)
            room = self._room()
            self._state[_BUDGET] = budget if budget <= room else room // 2
            self._state[_ASKED] = budget

    def check_room(self, size: int) -> None:
        """Raise UserError if `allow` had to set a smaller budget, which does not hold `size`."""
        if self.budget < min(size, int(self._state[_ASKED])):
            raise UserError(
                f"data.cache: two windows of blocks need {size / 1e9:,.1f} GB in {self.path}, "
                f"where {self._room() / 1e9:,.1f} GB are free; name a folder on a larger disk, or "
                "lower data.cache_gb."
            )

    def _room(self) -> int:
        return shutil.disk_usage(self.path).free + self.used

    @property
    def used(self) -> int:
        """Bytes of present pages and of those being fetched, of all datasets."""
        return int(self._state[_USED_BYTES])

    def dataset(self, name: str, sizes: Mapping[str, int]) -> "Sparse":
        """Return the files of a dataset, created if there are none; sizes are in bytes."""
        folder = self.path / name
        with writing(folder):
            if not (folder / "files.json").exists():
                (folder / "data").mkdir(parents=True, exist_ok=True)
                files.write_text(folder / "files.json", json.dumps(dict(sizes)))
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
        with lock(self.path / "state", [(0, 1)]):
            yield

    def reserve(self, size: int, urgency: int) -> bool:
        """Account for `size` bytes to be fetched, and remove pages so that the budget holds them.

        Pages that nobody planned are removed first, least recently used files first, then planned
        ones that are less urgent. Returns False if that is not enough. Bytes that are needed now
        (`ON_DEMAND`) wait for a while until others are fetched, and then exceed the budget.
        """
        for _ in range(_WAITS if urgency == ON_DEMAND else 1):
            with self.locked():
                if self._make_room(size, urgency):
                    self._state[_USED_BYTES] += size
                    return True
            if urgency == ON_DEMAND:
                time.sleep(_WAIT)
        if urgency == ON_DEMAND:
            with self.locked():
                self._state[_USED_BYTES] += size
        return urgency == ON_DEMAND

    def _make_room(self, size: int, urgency: int) -> bool:
        """Remove pages that are less urgent than `size` bytes; return whether that is enough."""
        budget = self.budget
        if self.used + size > budget:
            # More than is needed, so that most calls remove nothing.
            self._remove(max(self.used + size - budget, budget // 16), 1)
        for limit in (*range(2, urgency, 16), urgency):
            if self.used + size <= budget:
                return True
            self._remove(self.used + size - budget, limit)
        return self.used + size <= budget

    def release(self, size: int) -> None:
        """Take back a reservation of bytes that were not fetched."""
        with self.locked():
            self._state[_USED_BYTES] -= size

    def _remove(self, size: int, limit: int) -> None:
        """Remove `size` bytes of pages that are less urgent than `limit`."""
        found = [file for dataset in self.datasets() for file in dataset.files()]
        for _, dataset, index in sorted(found, key=lambda file: file[0]):
            if size <= 0:
                return
            removed = dataset.remove(index, -(-size // PAGE), limit) * PAGE
            self._state[_USED_BYTES] -= removed
            size -= removed


class Sparse:
    """The sparse files of one dataset in a slot, a folder with a list of their sizes."""

    def __init__(self, slot: Slot, folder: Path):
        self.slot, self.folder = slot, folder
        self.sizes: dict[str, int] = json.loads((folder / "files.json").read_text())
        self._indices = {name: index for index, name in enumerate(self.sizes)}
        self._names = list(self.sizes)
        self._paths: dict[str, Path] = {}
        pages = [-(-size // PAGE) for size in self.sizes.values()]
        self._first = np.concatenate([[0], np.cumsum(pages, dtype=np.int64)])
        count, total = len(pages), int(self._first[-1])
        self._offset = 3 * 8 * count
        self._map = folder / "pages"
        with writing(folder), self._map.open("ab") as file:
            if file.tell() == 0:
                file.truncate(self._offset + 2 * total + 1)
        self._allocated: set[int] = set()
        self._allocate(0, self._offset)
        memory = np.asarray(np.memmap(self._map, np.uint8, "r+"))  # a plain array indexes faster
        self._table = memory[: self._offset].view(np.int64).reshape(3, count)
        self._marks = memory[self._offset : self._offset + total]
        self._urgency = memory[self._offset + total : self._offset + 2 * total]

    def _allocate(self, start: int, stop: int) -> None:
        """Give bytes of the map disk space, or writing to the mapped memory could end in SIGBUS."""
        parts = range(start // _MAP_PART, -(-stop // _MAP_PART))
        new = [part for part in parts if part not in self._allocated]
        if new:
            length = self._map.stat().st_size
            with writing(self.folder), self._map.open("r+b") as file:
                for part in new:
                    at = part * _MAP_PART
                    os.posix_fallocate(file.fileno(), at, min(_MAP_PART, length - at))
            self._allocated.update(new)

    def path(self, name: str) -> Path:
        """Return the sparse file, created if there is none."""
        path = self._paths.get(name)
        if path is None:
            path = self._local(name)
            if not path.exists():
                with writing(self.folder), path.open("ab") as file:
                    file.truncate(self.sizes[name])
            self._paths[name] = path
        return path

    def _local(self, name: str) -> Path:
        return self.folder / "data" / quote(name, safe="").replace("..", "%2E%2E")

    def pages(self, name: str, start: int, stop: int) -> Pages:
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

    def bytes_of(self, name: str, pages: Pages) -> Pages:
        """Return the range of bytes of a range of pages."""
        first = int(self._first[self._indices[name]])
        return (pages[0] - first) * PAGE, min((pages[1] - first) * PAGE, self.sizes[name])

    def missing(self, pages: Pages) -> list[Pages]:
        """Return the ranges of pages that are not present."""
        marks = self._marks[slice(*pages)]
        if marks.all():
            return []
        return [(pages[0] + a, pages[0] + b) for a, b in runs(marks == 0)]

    def removals(self, name: str) -> int:
        """Return how often pages of a file were removed, and count the file as used now."""
        index = self._indices[name]
        self._table[_USED, index] = time.monotonic_ns()
        return int(self._table[_REMOVALS, index])

    @contextlib.contextmanager
    def locked(self, pages: Pages) -> Iterator[None]:
        """Exclude all others that fetch or remove these pages."""
        with lock(self._map, [self._bytes(pages)]):
            yield

    @contextlib.contextmanager
    def held(self, pages: Iterable[Pages]) -> Iterator[None]:
        """Keep pages from being removed. A thread may fetch pages that it or others hold."""
        with lock(self._map, map(self._bytes_held, pages), shared=True):
            yield

    def _bytes(self, pages: Pages) -> Pages:
        """Return the range of bytes of the map that is locked to fetch or remove pages."""
        return self._offset + pages[0], self._offset + pages[1]

    def _bytes_held(self, pages: Pages) -> Pages:
        """Return the range of bytes of the map that is locked to keep pages."""
        first = self._offset + len(self._marks)
        return first + pages[0], first + pages[1]

    def write(self, name: str, pages: Pages, data: bytes) -> None:
        """Write pages that are locked and reserved, and mark them as present."""
        self._allocate(self._offset + pages[0], self._offset + pages[1])
        path, (start, stop) = self.path(name), self.bytes_of(name, pages)
        with writing(self.folder):
            try:
                write_at(path, start, data)
            except OSError:
                punch(path, start, stop - start)
                raise
        with self.slot.locked():
            self._marks[slice(*pages)] = 1
            self._table[_PRESENT, self._indices[name]] += pages[1] - pages[0]
            self._table[_USED, self._indices[name]] = time.monotonic_ns()

    def set_urgency(self, old: list[Pages], new: list[tuple[int, int, int]]) -> None:
        """Replace the urgency of the pages `old` by those of `new`: (first, last + 1, urgency)."""
        for start, stop, _ in new:
            first = self._offset + len(self._marks)
            self._allocate(first + start, first + stop)
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

        Pages that are fetched or held are left. The slot must be locked.
        """
        first, last = (int(page) for page in self._first[index : index + 2])
        marked = (self._marks[first:last] != 0) & (self._urgency[first:last] < limit)
        removed, left = 0, runs(marked)[::-1]
        while left and removed < most:
            start, stop = left.pop()
            stop = min(stop, start + most - removed)
            pages = (first + start, first + stop)
            locks = [self._bytes(pages), self._bytes_held(pages)]
            try:
                with lock(self._map, locks, wait=False):
                    self._marks[slice(*pages)] = 0  # in this order: see `Ranges.using`
                    self._table[_REMOVALS, index] += 1
                    punch(self.path(self._names[index]), start * PAGE, (stop - start) * PAGE)
                    self._table[_PRESENT, index] -= stop - start
                    removed += stop - start
            except BlockingIOError:  # perhaps only a part of them is locked
                middle = (start + stop) // 2
                if stop - start >= _LEAST_PART:
                    left += [(middle, stop), (start, middle)]
        return removed

    def restore(self) -> int:
        """Make the files agree with the markers after an earlier run; return the present pages.

        A run that was killed may have left pages that it had not marked; they are removed.
        """
        start, length = self._offset + len(self._marks), len(self._urgency)
        if length:
            punch(self._map, start, length)  # reads as zeros
        self._table[_PRESENT] = 0
        for index, name in enumerate(self._names):
            path = self._local(name)
            if path.exists() and path.stat().st_blocks:
                marks = self._marks[slice(*(int(p) for p in self._first[index : index + 2]))]
                for start, stop in runs(marks == 0):
                    punch(path, start * PAGE, (stop - start) * PAGE)
                self._table[_PRESENT, index] = np.count_nonzero(marks)
        return int(self._table[_PRESENT].sum())


def _empty(slot: Path) -> None:
    for folder in slot.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)


def _clear(path: Path) -> None:
    """Delete what another boot of the machine, or another version of this module, left."""
    boot = f"{_FORMAT} {_BOOT.read_text().strip() if _BOOT.exists() else os.urandom(8).hex()}"
    known = path / "boot"
    if not (known.exists() and known.read_text() == boot):
        _empty(path)
        files.write_text(known, boot)
    if not (path / "state").exists():
        (path / "state").write_bytes(bytes(8 * _STATE))
