"""Reading parts of a dataset's files by several threads, with few files open."""

import collections
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any, BinaryIO, Generic, TypeVar

from cap_pretrain.data.sources.listing import Listing, local_stamps
from cap_pretrain.data.sources.ranges import Ranges
from cap_pretrain.data.sources.storage import Remote, retried
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import open_regular

T = TypeVar("T")

Span = tuple[int, int, int]
"""Number of a file, first byte, and that after the last."""

OPEN_FILES = 64
"""Files that a source keeps open, far below the usual limit of 1024 of a process."""


class Recent(Generic[T]):
    """The values of the most recently used keys, up to a count and a size in all. Thread-safe.

    `make` makes the value of a key, once for all threads that ask for it at the same time. `size`
    is its size in bytes. A value that is dropped while it is used lives until then.
    """

    def __init__(
        self,
        make: Callable[[Hashable], T],
        count: int,
        size: Callable[[T], int] = lambda _: 0,
        most: int = 0,
    ):
        self._make, self._count, self._size, self._most = make, count, size, most
        self._lock = threading.Lock()
        self._values: collections.OrderedDict[Hashable, tuple[T, int]] = collections.OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._total = 0

    def __call__(self, key: Hashable) -> T:
        """Return the value of a key."""
        if (found := self._find(key)) is not None:
            return found[0]
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            if (found := self._find(key)) is not None:
                return found[0]
            try:
                value = self._make(key)
            finally:
                with self._lock:
                    self._making.pop(key, None)
            with self._lock:
                size = self._size(value)
                self._values[key] = value, size
                self._total += size
                while len(self._values) > 1 and (
                    len(self._values) > self._count or self._total > self._most
                ):
                    _, (_, dropped) = self._values.popitem(last=False)
                    self._total -= dropped
            return value

    def _find(self, key: Hashable) -> tuple[T, int] | None:
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
            return found


class Contents:
    """The bytes of the files of a listing. Thread-safe; pickled without what is open.

    Reading raises OSError, or UserError if a file was changed since it was listed.

    Args:
        listing: the files. Local ones are read in place; of remote ones, the ranges that are read
            or planned are fetched to the cache.
        cache: folder for parts of remote files; empty: the user's cache folder.
        budget: most bytes of the cache.
    """

    def __init__(self, listing: Listing, cache: str, budget: float):
        ranges = None
        if isinstance(listing.root, Remote):
            files = {file.name: file.info for file in listing.files}
            ranges = Ranges(listing.root, files, cache, budget)
        self._setup(listing, ranges)

    def _setup(self, listing: Listing, ranges: Ranges | None) -> None:
        self.listing, self._ranges = listing, ranges
        self._open = Recent(self._opened, OPEN_FILES)

    def __reduce__(self):
        return _contents, (self.listing, self._ranges)

    @property
    def remote(self) -> bool:
        """Whether the files are fetched."""
        return self._ranges is not None

    def read(
        self, number: int, start: int, stop: int, around: tuple[int, int] | None = None
    ) -> bytes:
        """Return exactly these bytes of a file.

        Remote ones that are not present are fetched with those `around` them, (start, stop).
        """
        if stop <= start:
            return b""
        if self._ranges is None:
            file = self._open(number)
            data = retried(lambda: os.pread(file.fileno(), stop - start, start))
        else:
            name = self.listing.files[number].name
            if around and not self._ranges.has(name, [(start, stop)]):
                self._ranges.fetch(name, [around])
            data = self._ranges.read(name, start, stop)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} bytes came instead of {stop - start}")
        return data

    def plan(self, spans: Iterable[Span | Callable[[], Iterable[Span]]]) -> None:
        """Fetch remote ranges in the background, in this order; see `Ranges.plan`."""
        if self._ranges is not None:
            self._ranges.plan(map(self._named, spans))

    def _named(self, span: Span | Callable[[], Iterable[Span]]) -> Any:
        """Return a range, or a function that returns ranges, by the names of files."""
        if callable(span):
            return lambda: map(self._named, span())
        file, start, stop = span
        return self.listing.files[file].name, start, stop

    def _opened(self, number: Hashable) -> BinaryIO:
        assert isinstance(number, int)
        path, listed = self.listing.path(number), self.listing.files[number]
        assert not isinstance(path, Remote)
        file = retried(lambda: open_regular(path))
        status = os.fstat(file.fileno())
        if (status.st_size, local_stamps(status)) != (listed.size, listed.stamps):
            file.close()
            raise UserError(f"{path}: was changed while it was in use; start again.")
        return file


def _contents(listing: Listing, ranges: Ranges | None) -> Contents:
    made = Contents.__new__(Contents)
    made._setup(listing, ranges)
    return made
