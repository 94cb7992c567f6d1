"""Where the records of an ArrayRecord file lie, from its last bytes.

ArrayRecord is a file of Riegeli chunks, of one or more records each, followed by a chunk that lists
the offsets of all others, and by one of 64 KiB that says where the list is. Both hold protocol
buffers. Formats:
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md and
https://github.com/google/array_record/blob/main/cpp/layout.proto. Hashes are not checked here, but
by the reader of the records.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

BLOCK = 1 << 16
"""Bytes of a Riegeli block: a header interrupts the file at each multiple of it."""
_BLOCK_HEADER, _CHUNK_HEADER = 24, 40  # bytes
_SIMPLE = ord("r")  # type of a chunk of records that are not transposed
_CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}
_MAGIC = 0x71930E704FDAE05E  # of ArrayRecord
_POSTSCRIPT = 1 << 12  # bytes of the last block that are read; the rest is padding
_MOST_ENTRY = 48  # bytes of an entry of the list: six varints of at most ten bytes, three of one

Read = Callable[[int, int], bytes]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The chunks of an ArrayRecord file.

    `offsets`, int64 [chunks + 1], are where they begin and the last ends; each but the last holds
    `group` records. `index` is the range of bytes that a reader needs to open the file.
    """

    offsets: np.ndarray
    group: int
    records: int
    index: tuple[int, int]


def chunks_of(read: Read, size: int, records: int) -> Chunks:
    """Return the chunks of a file of `size` bytes, of which `read(start, stop)` returns ranges.

    `records` are expected, which bounds what is read. Raises ValueError if it is not an ArrayRecord
    file, or its list of records is too long for as many.
    """
    most = (records + 1) * _MOST_ENTRY + BLOCK
    if size < 2 * BLOCK or size % BLOCK:
        raise ValueError("it is truncated or no ArrayRecord file")
    last = size - BLOCK
    postscript = _chunk(read(last, last + _POSTSCRIPT), last, most)
    if postscript is None:
        raise ValueError("its last block is damaged")
    numbers = _varints(postscript)
    if len(numbers) < 4 or numbers[0] != 8 or numbers[2] != 16 or numbers[3] != _MAGIC:
        raise ValueError("its last block is not that of an ArrayRecord file")
    start = int(numbers[1])
    if not max(0, last - most - BLOCK) < start < last:
        raise ValueError("its list of records is not inside the file")
    listed = _chunk(read(start, last), start, most)  # and less than a block of padding
    if listed is None:
        raise ValueError("its list of records is not inside the file")
    return _parsed(listed, start, (start, last + _POSTSCRIPT))


def _parsed(listed: bytes, end: int, index: tuple[int, int]) -> Chunks:
    """Return what a list of records says: RiegeliFooterMetadata, and an ArrayRecordFooter each."""
    length = listed[1] if len(listed) > 1 and listed[0] == 0x0A else 0
    skip = 2
    if length >= 128:  # the message holds the options of the writer, some 100 bytes
        length, skip = length % 128 + 128 * listed[2], 3
    head = _varints(listed[skip : skip + length][:24])  # version, number of chunks, of records
    if len(head) < 6 or head[0] != 8 or head[1] != 1 or head[2] != 16 or head[4] != 24:
        raise ValueError("its list of records is damaged")
    chunks, records = int(head[3]), int(head[5])
    numbers = _varints(listed[skip + length :])
    if len(numbers) != 6 * chunks or any(
        (numbers[k::6] != 8 * (k // 2 + 1)).any() for k in (0, 2, 4)
    ):
        raise ValueError("its list of records is damaged")
    offsets = np.append(numbers[1::6].astype(np.int64), end)
    group = int(numbers[5]) if chunks else 1
    if (
        (np.diff(offsets) <= 0).any()
        or offsets[0] < 0
        or group < 1
        or -(-records // group) != chunks
    ):
        raise ValueError("its list of records is damaged")
    return Chunks(offsets, group, records, index)


def _chunk(data: bytes, start: int, most: int) -> bytes | None:
    """Return the concatenated records of the chunk that begins at byte `start` of the file.

    `data` are bytes of the file from `start` on. Returns None if they are too few. Raises
    ValueError if the records take over `most` bytes.
    """
    first = BLOCK - start % BLOCK if start % BLOCK else 0
    pieces = (data[at + _BLOCK_HEADER : at + BLOCK] for at in range(first, len(data), BLOCK))
    content = data[:first] + b"".join(pieces)
    if len(content) < _CHUNK_HEADER:
        return None
    size = int.from_bytes(content[8:16], "little")
    decoded = int.from_bytes(content[32:40], "little")
    if content[24] != _SIMPLE or decoded > most:
        raise ValueError("its list of records is damaged")
    if len(content) < _CHUNK_HEADER + size:
        return None
    return _values(content[_CHUNK_HEADER : _CHUNK_HEADER + size], decoded)


def _values(data: bytes, decoded: int) -> bytes:
    """Return the concatenated records of a simple chunk, which take `decoded` bytes."""
    codec = data[0]
    size, at = _varint(data, 1)
    values = data[at + size :]
    if not codec:
        return values
    if codec not in _CODECS:
        raise ValueError(f"its list of records has the unknown compression {codec}")
    import pyarrow as pa

    length, at = _varint(values, 0)
    if length != decoded:
        raise ValueError("its list of records is damaged")
    return pa.Codec(_CODECS[codec]).decompress(values[at:], length, asbytes=True)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at a position, and the position after it."""
    value = shift = 0
    while data[at] >= 128:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _varints(data: bytes) -> np.ndarray:
    """Return all varints of a buffer, uint64 [n]; what is not complete at its end is left out."""
    octets = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(octets < 128)
    starts = np.append(0, ends + 1)[:-1]
    lengths = ends - starts + 1
    if len(ends) and lengths.max() > 10:
        raise ValueError("a number in its list of records is too long")
    values = np.zeros(len(ends), np.uint64)
    for place in range(int(lengths.max(initial=0))):
        longer = lengths > place
        digits = octets[starts[longer] + place].astype(np.uint64) & np.uint64(127)
        values[longer] |= digits << np.uint64(7 * place)
    return values
