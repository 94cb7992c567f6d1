"""Ranges of remote files, fetched into sparse local files when they are needed or planned.

The local files have the size of the remote ones and holes where nothing was fetched, so readers of
any format can open them, as long as `Ranges` fetches what they read. Space on the disk is bounded:
what is neither planned nor was used lately is removed (see `sparse`).
"""

import collections
import contextlib
import dataclasses
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cap_pretrain.data.sources import storage, unchanged
from cap_pretrain.data.sources.slots import ON_DEMAND, Slot
from cap_pretrain.data.sources.sparse import PAGE, Pages, Sparse
from cap_pretrain.errors import UserError

T = TypeVar("T")

Span = tuple[str, int, int]
"""Name of a file, first byte, and that after the last."""

THREADS = 16
"""Most requests at the same time of those that are planned; each holds `storage.CHUNK` bytes."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """Where blocks of remote datasets are kept: `block` examples each, in `budget` bytes in all.

    `folder` is empty for the user's cache folder. The budget is that of a process and its workers,
    for all datasets in the folder; the largest one holds.
    """

    folder: str = ""
    block: int = 256
    budget: float = 64e9


class Ranges:
    """The files of a remote folder, of which ranges of bytes are present in sparse local files.

    Pickling keeps the listing and the local folder, so worker processes share what was fetched.
    Only the process that made this object should plan.

    Args:
        folder: the remote folder, or one above the files.
        files: info of each file by its name, which may contain "/", as from `Remote.files`; "size"
            in bytes is required. A file that no longer has the other stamps is never read.
        cache: folder for the local files; empty: the user's cache folder.
        budget: most bytes of all datasets in the cache of this process and its workers; the
            largest one holds. If the disk has no room for it, it is less, and planning is refused.

    Raises:
        UserError: the cache cannot be written, or its file system cannot free parts of a file.
    """

    def __init__(
        self,
        folder: storage.Remote,
        files: Mapping[str, Mapping[str, Any]],
        cache: str = "",
        budget: float = 64e9,
    ):
        slot = Slot.acquire(storage.cache_folder(cache))
        slot.allow(int(budget))
        self._setup(folder, files, slot, int(budget))

    def _setup(
        self,
        folder: storage.Remote,
        files: Mapping[str, Mapping[str, Any]],
        slot: Slot,
        budget: int,
    ) -> None:
        self.folder, self._slot, self._budget = folder, slot, budget
        self._files = {name: dict(entry) for name, entry in files.items()}
        sizes = {name: int(entry["size"]) for name, entry in self._files.items()}
        listed = sorted((name, *unchanged.stamps(e).items()) for name, e in self._files.items())
        digest = hashlib.sha256(repr((folder.url, listed)).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]+", "_", folder.url)[-100:]
        self._sparse: Sparse = slot.dataset(f"{name}-{digest}", sizes)
        self._planner = _Planner(self, self._sparse)

    def __reduce__(self):
        return _attached, (self.folder, self._files, self._slot.path, self._budget)

    def __str__(self) -> str:
        return str(self.folder)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Return the names of all files."""
        return list(self._files)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return self._sparse.sizes[name]

    def path(self, name: str) -> Path:
        """Return the sparse local file. What was not fetched reads as zeros; see `using`."""
        return self._sparse.path(name)

    def has(self, name: str, spans: Iterable[tuple[int, int]]) -> bool:
        """Return whether these ranges of bytes (start, stop) of a file are present."""
        return not any(self._sparse.missing(self._sparse.pages(name, *span)) for span in spans)

    def fetch(self, name: str, spans: Iterable[tuple[int, int]]) -> None:
        """Return when these ranges of bytes (start, stop) of a file are present.

        They may be removed again at any time unless they are planned; see `using`.

        Raises:
            UserError: they cannot be read, the file has changed, or the cache cannot be written.
        """
        pieces = self.requests(name, spans)
        if len(pieces) < 2:
            for piece in pieces:
                self.fetch_pages(name, piece, ON_DEMAND)
            return
        with ThreadPoolExecutor(min(len(pieces), THREADS)) as threads:
            for _ in threads.map(lambda piece: self.fetch_pages(name, piece, ON_DEMAND), pieces):
                pass

    def using(self, name: str, spans: Sequence[tuple[int, int]], read: Callable[[], T]) -> T:
        """Return `read()`, which reads no more than these ranges of a file.

        They are fetched before. If some were removed meanwhile, they are fetched and read again, so
        the result never holds zeros in place of bytes that are missing, and errors that the zeros
        caused are ignored.
        """
        # Removing takes marks away, then counts, then frees pages. So if the count is the same
        # after reading, pages that are marked after the first look at it were there.
        before = self._sparse.removals(name)
        if self.has(name, spans):
            try:
                result = read()
            except Exception:
                if self._sparse.removals(name) == before:
                    raise
            else:
                if self._sparse.removals(name) == before:
                    return result
        with self._sparse.held([self._sparse.pages(name, *span) for span in spans]):
            self.fetch(name, spans)
            return read()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes of a file, fetched if they are not present."""

        def read() -> bytes:
            with self.path(name).open("rb", buffering=0) as file:
                file.seek(start)
                return file.read(stop - start)

        return self.using(name, [(start, stop)], read)

    def plan(self, spans: "Iterable[Span | Callable[[], Iterable[Span]]]") -> None:
        """Fetch ranges in the background, in this order; this replaces the plan before.

        Planned ranges are not removed to make room for others, but for what is needed now. Those
        that the budget does not hold are left out until the next plan. Errors are not raised here,
        but when the ranges are used. A function in place of a range is called in the background and
        returns ranges; it may itself fetch, such as the index of a file.

        Raises:
            UserError: the disk has less room than the budget, or than the files if they are less.
        """
        self._slot.check_room(min(self._budget, sum(self._sparse.sizes.values())))
        self._planner.plan(spans)

    def requests(self, name: str, spans: Iterable[tuple[int, int]]) -> list[Pages]:
        """Return the missing pages of ranges of bytes, joined and divided into requests."""
        missing = sorted(
            run
            for start, stop in spans
            for run in self._sparse.missing(self._sparse.pages(name, start, stop))
        )
        joined: list[Pages] = []
        for start, stop in missing:
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
            else:
                joined.append((start, stop))
        most = max(1, storage.CHUNK // PAGE)
        return [(at, min(at + most, b)) for a, b in joined for at in range(a, b, most)]

    def fetch_pages(self, name: str, pages: Pages, urgency: int) -> bool:
        """Fetch pages unless they are present; return False if the budget does not hold them."""
        sparse = self._sparse
        with sparse.locked(pages):  # another thread or process may have fetched them meanwhile
            for run in sparse.missing(pages):
                start, stop = sparse.bytes_of(name, run)
                size = (run[1] - run[0]) * PAGE
                if not self._slot.reserve(size, urgency):
                    return False
                try:
                    remote = self.folder / name
                    data = unchanged.read_range(remote, start, stop, self._files[name])
                    sparse.write(name, run, data)
                except BaseException:
                    self._slot.release(size)
                    raise
        return True


def _attached(
    folder: storage.Remote, files: Mapping[str, Mapping[str, Any]], slot: Path, budget: int
) -> Ranges:
    """Return the `Ranges` of a worker process, whose parent holds the slot."""
    ranges = Ranges.__new__(Ranges)
    ranges._setup(folder, files, Slot.join(slot), budget)
    return ranges


class _Planner:
    """The plan of some `Ranges`, and the threads that fetch it, which end when it is done."""

    def __init__(self, ranges: Ranges, sparse: Sparse):
        self._ranges, self._sparse = ranges, sparse
        self._lock = threading.Lock()
        self._items: collections.deque[tuple[int, Any]] = collections.deque()
        self._urgent: list[tuple[int, int, int]] = []  # first page, last + 1, urgency
        self._number = self._running = 0  # of the plan; threads

    def plan(self, items: "Iterable[Span | Callable[[], Iterable[Span]]]") -> None:
        """Replace the plan."""
        listed = list(items)
        steps = [255 - 254 * place // max(1, len(listed)) for place in range(len(listed))]
        new = list(zip(steps, listed, strict=True))
        with self._lock:
            self._number += 1
            self._items = collections.deque(new)
            old = [(start, stop) for start, stop, _ in self._urgent]
            self._urgent = [
                (*self._sparse.pages(*item), urgency) for urgency, item in new if not callable(item)
            ]
            self._sparse.set_urgency(old, self._urgent)
            for _ in range(min(len(listed), THREADS) - self._running):
                self._running += 1
                threading.Thread(target=self._run, name="ranges", daemon=True).start()

    def _run(self) -> None:
        try:
            while self._next():
                pass
        except BaseException:
            with self._lock:
                self._running -= 1
            raise

    def _next(self) -> bool:
        """Fetch the next item; return False, and count the thread as ended, if there is none."""
        with self._lock:
            number = self._number
            if not self._items:
                self._running -= 1
                return False
            urgency, item = self._items.popleft()
        with contextlib.suppress(UserError):  # raised where the range is used
            if not self._fetch(number, urgency, item):
                with self._lock:  # the budget is used up; what is left is less urgent
                    if number == self._number:
                        self._items.clear()
        return True

    def _fetch(self, number: int, urgency: int, item: Any) -> bool:
        """Fetch a part of an item and put the rest back; return False if the budget is used up."""
        if callable(item):
            found = list(item())
            with self._lock:
                if number != self._number:
                    return True
                urgent = [(*self._sparse.pages(*span), urgency) for span in found]
                self._urgent += urgent
                self._sparse.set_urgency([], urgent)
                self._items.extendleft((urgency, span) for span in reversed(found))
            return True
        name, *span = item
        requests = self._ranges.requests(name, [tuple(span)])
        if not requests:
            return True
        if len(requests) > 1:  # the others are for other threads
            _, stop = self._sparse.bytes_of(name, requests[0])
            with self._lock:
                if number == self._number:
                    self._items.appendleft((urgency, (name, stop, span[1])))
        return self._ranges.fetch_pages(name, requests[0], urgency)
