"""Local files of the size of remote ones, of which some pages are present and the rest are holes.

A slot (`slots.Slot`) is a folder for the files of all datasets that one process and its workers
read. It is locked, so that a second run on the machine takes another, and left for the next run to
use again. Processes share it through a memory-mapped file for each dataset (`Sparse`):

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
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np

from cap_pretrain.data.sources.holes import lock, punch, runs, write_at, writing
from cap_pretrain.errors import UserError

PAGE = 4096
"""Bytes of a page, the unit that is present or not: a block of ext4 and xfs."""

Pages = tuple[int, int]
"""First page of a range, and that after its last, numbered through all files of a dataset."""

_LEAST_PART = 16  # pages that are removed together or not at all, some of them being locked
_MAP_PART = 1 << 16  # bytes of a map that get disk space together, the marks of 256 MB
# Rows of `Sparse._table`, with an element for each file: present pages, or more if a process was
# killed; the time of the last use; a count of removals; and a lower bound of the urgency of all
# present pages.
_PRESENT, _USED, _REMOVALS, _LEAST = range(_ROWS := 4)


@contextlib.contextmanager
def accounting(slot: Path) -> Iterator[None]:
    """Exclude all other threads and processes that account for pages of a slot."""
    with lock(slot / "state", [(0, 1)]):
        yield


class Sparse:
    """The sparse files of one dataset in a slot, a folder with a list of their sizes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sizes: dict[str, int] = json.loads((folder / "files.json").read_text())
        self._indices = {name: index for index, name in enumerate(self.sizes)}
        self._names = list(self.sizes)
        self._paths: dict[str, Path] = {}
        pages = [-(-size // PAGE) for size in self.sizes.values()]
        self._first = np.concatenate([[0], np.cumsum(pages, dtype=np.int64)])
        count, total = len(pages), int(self._first[-1])
        self._offset = _ROWS * 8 * count
        self._map = folder / "pages"
        with writing(folder), self._map.open("ab") as file:
            if file.tell() == 0:
                file.truncate(self._offset + 2 * total + 1)
        self._allocated: set[int] = set()
        self._allocate(0, self._offset)
        memory = np.asarray(np.memmap(self._map, np.uint8, "r+"))  # a plain array indexes faster
        self._table = memory[: self._offset].view(np.int64).reshape(_ROWS, count)
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
            present = self._table[_PRESENT, self._indices[name]]  # looked up first: it may be new
            if not path.exists():
                if present:
                    raise UserError(f"data.cache: {path} was deleted while in use; start again.")
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
        with accounting(self.folder.parent):
            index = self._indices[name]
            if not self._table[_PRESENT, index]:
                self._table[_LEAST, index] = 255
            self._table[_PRESENT, index] += pages[1] - pages[0]  # before: see `_restored`
            self._marks[slice(*pages)] = 1
            self._table[_USED, index] = time.monotonic_ns()
            self._lower(pages)

    def set_urgency(self, old: list[Pages], new: list[tuple[int, int, int]]) -> None:
        """Replace the urgency of the pages `old` by those of `new`: (first, last + 1, urgency)."""
        for start, stop, _ in new:
            first = self._offset + len(self._marks)
            self._allocate(first + start, first + stop)
        with accounting(self.folder.parent):
            for start, stop in old:
                self._urgency[start:stop] = 0
            for start, stop, urgency in new:
                np.maximum(self._urgency[start:stop], urgency, out=self._urgency[start:stop])
            for start, stop in (*old, *((start, stop) for start, stop, _ in new)):
                self._lower((start, stop))

    def _lower(self, pages: Pages) -> None:
        """Keep the bound of a file's urgency, of which pages became present or less urgent."""
        if pages[0] < pages[1]:
            index = np.searchsorted(self._first, pages[0], side="right") - 1
            least = self._urgency[slice(*pages)].min()
            self._table[_LEAST, index] = min(self._table[_LEAST, index], least)

    def files(self, limit: int) -> "list[tuple[int, Sparse, int]]":
        """Return (time of last use, self, index) of each file that may have pages to `remove`."""
        table = self._table
        indices = np.flatnonzero((table[_PRESENT] > 0) & (table[_LEAST] < limit))
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
                with writing(self.folder), lock(self._map, locks, wait=False):
                    self._marks[slice(*pages)] = 0  # in this order: see `Ranges.using`
                    self._table[_REMOVALS, index] += 1
                    punch(self.path(self._names[index]), start * PAGE, (stop - start) * PAGE)
                    self._table[_PRESENT, index] -= stop - start
                    removed += stop - start
            except BlockingIOError:  # perhaps only a part of them is locked
                middle = (start + stop) // 2
                if stop - start >= _LEAST_PART:
                    left += [(middle, stop), (start, middle)]
        kept = self._urgency[first:last][self._marks[first:last] != 0]
        self._table[_LEAST, index] = kept.min(initial=255)
        return removed

    def restore(self) -> int:
        """Make the files agree with the markers after an earlier run; return the present pages.

        A run that was killed may have left pages that it had not marked; they are removed.
        """
        start, length = self._offset + len(self._marks), len(self._urgency)
        if length:
            punch(self._map, start, length)  # reads as zeros
        self._table[_LEAST] = 0
        for index in range(len(self._names)):
            self._table[_PRESENT, index] = self._restored(index)
        return int(self._table[_PRESENT].sum())

    def _restored(self, index: int) -> int:
        """Make a file agree with its markers; return the present pages.

        Something may have deleted the file, whose markers are then removed.
        """
        name, path = self._names[index], self._local(self._names[index])
        marks = self._marks[slice(*(int(page) for page in self._first[index : index + 2]))]
        found = path.stat() if path.exists() else None
        if found and found.st_size == self.sizes[name] and found.st_blocks:
            for start, stop in runs(marks == 0):
                punch(path, start * PAGE, (stop - start) * PAGE)
            return int(np.count_nonzero(marks))
        path.unlink(missing_ok=True)
        if self._table[_PRESENT, index]:  # at least as many as there are markers
            marks[marks != 0] = 0  # others may be in parts of the map without disk space
        return 0
