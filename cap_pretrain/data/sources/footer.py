"""Where the row groups of a Parquet file lie, from its footer.

PyArrow knows it too, but ends the process if such metadata are damaged. The footer is a struct in
Thrift's compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/
thrift-compact-protocol.md); the fields are those of parquet.thrift in apache/parquet-format.
"""

from typing import Any

TAIL = 8
"""Bytes after the footer: its size, and the magic number PAR1."""

_DEEPEST = 16  # structs and lists inside each other
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
_INTEGERS = (4, 5, 6)
# Numbers of fields in FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
_ROW_GROUPS, _COLUMNS, _META = 4, 1, 3
_COMPRESSED, _DATA_PAGE, _DICTIONARY_PAGE = 7, 9, 11


def size(tail: bytes) -> int:
    """Return the size of the footer from the last TAIL bytes of a file; ValueError if not any."""
    if len(tail) != TAIL or tail[4:] != b"PAR1":
        raise ValueError("no mark of the end of a Parquet file")
    return int.from_bytes(tail[:4], "little")


def row_groups(footer: bytes) -> list[tuple[int, int]]:
    """Return the first byte and the one after the last of each row group.

    Raises ValueError if the footer is damaged.
    """
    try:
        fields, _ = _struct(footer, 0, _DEEPEST)
        return [_span(group) for group in fields[_ROW_GROUPS]]
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its footer is damaged") from error


def _span(group: dict[int, Any]) -> tuple[int, int]:
    chunks = [column[_META] for column in group[_COLUMNS]]
    starts = [min(c[_DATA_PAGE], c.get(_DICTIONARY_PAGE) or c[_DATA_PAGE]) for c in chunks]
    stops = [start + c[_COMPRESSED] for start, c in zip(starts, chunks, strict=True)]
    if not (0 <= min(starts) <= max(stops)):
        raise ValueError("its footer is damaged")
    return min(starts), max(stops)


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the struct at an offset by number, and the offset after it."""
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at] & 15:
        step, at = data[at] >> 4, at + 1
        if step:
            number += step
        else:
            number, at = _zigzag(data, at)
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], at = _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if not depth:
        raise ValueError("its footer is nested too deeply")
    if kind in _INTEGERS:
        return _zigzag(data, at)
    if kind in (_BYTE, _TRUE, _FALSE):  # the last two as elements of a list
        return data[at], at + 1
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _BINARY:
        count, at = _varint(data, at)
        return None, _within(data, at + count)
    if kind in (_LIST, _SET):
        count, inner, at = data[at] >> 4, data[at] & 15, at + 1
        if count == 15:
            count, at = _varint(data, at)
        _within(data, at + count)  # an element has at least a byte
        values = []
        for _ in range(count):
            value, at = _value(data, at, inner, depth - 1)
            values.append(value)
        return values, at
    if kind == _MAP:
        raise ValueError("its footer has a map")  # Parquet has none
    if kind == _STRUCT:
        return _struct(data, at, depth - 1)
    raise ValueError("its footer is damaged")


def _within(data: bytes, at: int) -> int:
    if at > len(data):
        raise ValueError("its footer is cut off")
    return at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("its footer is damaged")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
