"""The records of ArrayRecord files, local or fetched in ranges, through few readers at a time.

TFDS's own data source opens all files at once, so a thousand files exceed the usual limit.
"""

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import resource
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cap_pretrain.data.sources.base import INFO_FILE
from cap_pretrain.data.sources.ranges import Ranges, Span
from cap_pretrain.data.sources.riegeli import Chunks, chunks_of
from cap_pretrain.errors import UserError

_LEAST_READERS = 16  # open at a time, however few files a process may open
# Options of TFDS's data source: nothing is read ahead, in either of two layers.
_OPTIONS: dict[str, Any] = {
    "options": "readahead_buffer_size:0",
    "file_reader_buffer_size": 32768,
}


def count_records(path: Path) -> int:
    """Return the number of records of a file; raises RuntimeError if it is not an ArrayRecord."""
    reader = _open(path)
    try:
        return reader.num_records()
    finally:
        reader.close()


def _open(path: Path | str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), **_OPTIONS)


@functools.cache
def _most_readers() -> int:
    """Raise the limit of open files as far as is allowed, and return how many are for readers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        soft = 1 << 20
    return max(_LEAST_READERS, soft // 4)  # the rest is for JAX, workers, checkpoints


class _Readers:
    """Open readers of a source by path.

    The least recently used one of all sources is closed when the process has too many.
    """

    # The keys in the order of use. It holds no reader, so those of a source end with the source.
    _order: ClassVar[collections.OrderedDict[tuple[Any, str], None]] = collections.OrderedDict()
    _lock: ClassVar = threading.Lock()

    def __init__(self) -> None:
        self._open: dict[str, Any] = {}
        self._self = weakref.ref(self)

    def read(self, path: str, position: int) -> bytes:
        """Return a record of a file. Raises RuntimeError if it cannot be read."""
        with self._lock:
            reader = self._open.get(path)
            if reader is not None:
                self._order.move_to_end((self._self, path))
        if reader is None:
            reader = _open(path)
            with self._lock:
                self._open[path] = reader
                self._order[self._self, path] = None
                while len(self._order) > _most_readers():
                    (source, oldest), _ = self._order.popitem(last=False)
                    if owner := source():  # closed when the last thread that reads lets it go
                        owner._open.pop(oldest, None)
        try:
            return reader.read([position])[0]
        except RuntimeError:
            with self._lock:
                self._open.pop(path, None)  # readers do not recover
                self._order.pop((self._self, path), None)
            raise


class ArrayRecords(Sequence[bytes]):
    """The records of files on a local disk, one file after another.

    `shards` are the instructions of TFDS: of each file its name, and which of its records to read.
    """

    def __init__(self, shards: Sequence[Any]):
        self.shards = shards
        self.ends = list(itertools.accumulate(shard.take for shard in shards))
        self._readers = _Readers()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        number, position = self._place(index)
        return self._readers.read(self.shards[number].filename, position)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of the file of a record, and its position in the file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.ends, index)
        shard = self.shards[number]
        return number, shard.skip + shard.take - (self.ends[number] - index)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Which bytes of a file the blocks of its records take, int64 [blocks] each.

    `index` are those that a reader needs to open the file.
    """

    starts: np.ndarray
    stops: np.ndarray
    index: tuple[int, int]

    def span(self, block: int) -> tuple[int, int]:
        """Return the range of bytes of a block."""
        return int(self.starts[block]), int(self.stops[block])


class RangedRecords(ArrayRecords):
    """The records of remote files, of which whole blocks are fetched when they are read.

    Blocks are `size` consecutive records of a file, as in `base.file_bounds`. Of each file only
    the bounds of its blocks are kept in memory.
    """

    def __init__(self, shards: Sequence[Any], ranges: Ranges, size: int):
        super().__init__(shards)
        self._ranges, self._size = ranges, size
        self._blocks: dict[int, _Blocks] = {}
        self._locks = [threading.Lock() for _ in shards]
        self._names = [Path(shard.filename).name for shard in shards]

    def __getitem__(self, index: Any) -> Any:
        number, position = self._place(index)
        name, blocks = self._names[number], self._blocks_of(number)
        span = blocks.span((position - self.shards[number].skip) // self._size)
        path = str(self._ranges.path(name))
        spans = [blocks.index, span]  # the index also for a file that is open: it may be closed
        return self._ranges.using(name, spans, lambda: self._readers.read(path, position))

    def read_ahead(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch the blocks of ranges of records in the background, in this order."""
        self._ranges.plan([item for start, stop in ranges for item in self._planned(start, stop)])

    def _planned(self, start: int, stop: int) -> "Iterable[Span | Callable[[], Iterable[Span]]]":
        """Yield what to fetch for a range of records: ranges of bytes, where they are known."""
        number = bisect.bisect_right(self.ends, start)
        while start < stop:
            shard, end = self.shards[number], min(stop, self.ends[number])
            first = self.ends[number] - shard.take
            blocks = range((start - first) // self._size, -(-(end - first) // self._size))
            spans = functools.partial(self._spans, number, blocks)
            if number in self._blocks:
                yield from spans()
            elif end > start:
                yield spans
            number, start = number + 1, end

    def _spans(self, number: int, blocks: Iterable[int]) -> list[Span]:
        name, found = self._names[number], self._blocks_of(number)
        spans = [found.index, *(found.span(block) for block in blocks)]
        return [(name, *span) for span in spans]

    def _blocks_of(self, number: int) -> _Blocks:
        """Return the blocks of a file, whose list of records is fetched when it is first needed."""
        if number in self._blocks:
            return self._blocks[number]
        with self._locks[number]:
            if number not in self._blocks:
                shard = self.shards[number]
                chunks = self._chunks_of(self._names[number], shard.examples_in_shard)
                at = np.arange(shard.skip, shard.skip + shard.take, self._size)
                ends = np.minimum(at + self._size, shard.skip + shard.take)
                starts, stops = at // chunks.group, -(-ends // chunks.group)
                self._blocks[number] = _Blocks(
                    chunks.offsets[starts], chunks.offsets[stops], chunks.index
                )
            return self._blocks[number]

    def _chunks_of(self, name: str, expected: int) -> Chunks:
        read = functools.partial(self._ranges.read, name)
        try:
            chunks = chunks_of(read, self._ranges.size(name), expected)
        except (ValueError, IndexError, OSError) as error:  # OSError: of pyarrow, on damaged bytes
            raise UserError(
                f"{self._ranges}: {name} cannot be read ({error or 'it is damaged'}); copy or "
                "build it again."
            ) from error
        if chunks.records != expected:
            raise UserError(
                f"{self._ranges}: {name} holds {chunks.records} examples, but {INFO_FILE} says "
                f"{expected}; copy or build the dataset again."
            )
        return chunks
