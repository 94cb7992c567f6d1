"""Slots: folders of sparse files, each held by one process and its workers, with one budget."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from cap_pretrain import files
from cap_pretrain.data.sources.holes import check_holes, hold, join, take, writing
from cap_pretrain.data.sources.sparse import PAGE, Sparse, accounting
from cap_pretrain.errors import UserError

ON_DEMAND = 256
"""Urgency of a range that is read now; planned ones have 1 (least) to 255, others 0."""

_FORMAT = 6  # of the files below a slot; other formats are deleted
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_USED_BYTES, _BUDGET = range(_STATE := 2)  # elements of `Slot._state`
_WAIT, _WAITS = 0.01, 300  # seconds, and how often, until the budget is exceeded


class Slot:
    """A folder of sparse files; `acquire` finds one that no other run uses."""

    _held: ClassVar[dict[Path, "Slot"]] = {}  # by the cache folder
    _joined: ClassVar[dict[Path, "Slot"]] = {}  # by their own, in worker processes

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
    def join(cls, path: Path) -> "Slot":
        """Return the slot of the process that started this one; others cannot have it meanwhile."""
        if path not in cls._joined:
            with writing(path):
                join(path)  # until the process ends
            cls._joined[path] = cls(path)
        return cls._joined[path]

    @classmethod
    def _free(cls, cache: Path) -> "Slot":
        path = take(cache, "ranges-")
        check_holes(path)
        _clear(path)
        slot = cls(path)
        slot._state[:] = sum(d.restore() for d in slot.datasets()) * PAGE, 0
        return slot

    @property
    def budget(self) -> int:
        """Most bytes of all datasets, for this process and its workers."""
        return int(self._state[_BUDGET])

    def allow(self, budget: int) -> bool:
        """Raise the budget to this one if it is less; return whether the disk has room for that.

        If it has none, slots that no process holds are emptied. If that does not help, the budget
        is at least half of the room that there is.
        """
        with self.locked():
            if budget > max(self.budget, self._room()):
                for other in self.path.parent.glob("ranges-*"):
                    with contextlib.suppress(BlockingIOError, FileNotFoundError):
                        held = hold(other)
                        _empty(other)
                        os.close(held)
            room = self._room()
            self._state[_BUDGET] = max(self.budget, budget if budget <= room else room // 2)
            return budget <= self.budget

    def check_room(self, budget: int) -> None:
        """Raise UserError if the budget is smaller, and the disk has no room for this one."""
        if budget > self.budget and not self.allow(budget):
            raise UserError(
                f"data.cache: {self.path} has to hold {_size(budget)} of blocks, but its disk has "
                f"room for {_size(self._room())}; name a folder on a larger disk, or lower "
                "data.cache_gb."
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
            self._datasets[name] = Sparse(self.path / name)
        return self._datasets[name]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude all other threads and processes that account for pages of this slot."""
        with accounting(self.path):
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
        found = [file for dataset in self.datasets() for file in dataset.files(limit)]
        for _, dataset, index in sorted(found, key=lambda file: file[0]):
            if size <= 0:
                return
            removed = dataset.remove(index, -(-size // PAGE), limit) * PAGE
            self._state[_USED_BYTES] -= removed
            size -= removed


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


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
