"""Sequential reading of tar archives, which skips damaged entries and needs no random access.

tarfile reads names of any length into memory and steps through any size that a header claims, so
only its parser of headers is used here.
"""

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cap_pretrain.data.image_files import MAX_BYTES
from cap_pretrain.untrusted import open_bounded

MAX_HEADER = 2**20
"""Longest extended header in bytes (a long name, PAX); files with a longer one are not read."""

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_CHECKSUM = re.compile(rb"[0-7 \0]{8}")  # of a header, in bytes 148 to 155
_FIELD = re.compile(rb"(\d{1,9}) ([^=]+)=")  # begins a field of PAX: its length and name
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE, *_PAX)
_PLAIN = set(tarfile.REGULAR_TYPES) - {tarfile.GNUTYPE_SPARSE}
_WITHOUT_DATA = set(tarfile.SUPPORTED_TYPES) - set(tarfile.REGULAR_TYPES)


class CutOffError(Exception):
    """An archive ends early, or is not a tar; the files before that point are usable."""


class Member(NamedTuple):
    """A regular file in a tar; `data` is None if it was not read."""

    name: str
    start: int  # offset of the content
    size: int  # of the content, in bytes
    readable: bool  # whether the content is stored as it is, not sparse
    data: bytes | None


def read_members(
    path: Path, limit: Callable[[str], int] = lambda _: MAX_BYTES
) -> Iterator[tuple[str, bytes | None]]:
    """Yield (name, content) of the regular files in a tar, which may be gzipped.

    Bytes between valid headers are skipped, so a damaged header costs one file.

    Args:
        path: the tar.
        limit: maps a name to the number of bytes up to which its content is read.

    Yields:
        Each name with its content; None if that exceeds its limit, or is stored as sparse.

    Raises:
        CutOffError: the archive ends early, decompresses to too much, or is not a regular file;
            raised after the last complete file.
    """
    try:
        with open_bounded(path) as file:
            yield from ((m.name, m.data) for m in _members(_Stream(file), limit))
    except (OSError, EOFError, zlib.error) as error:
        raise CutOffError(str(error) or type(error).__name__) from error


def find_members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Yield the regular files in a tar of `size` bytes without their contents, as `read_members`.

    `file` is seekable and not compressed. Raises CutOffError as `read_members` does, and whatever
    reading the file raises.
    """
    return _members(_Stream(file, size), lambda _: -1)


class _Stream:
    """A tar that is read forward; with its `size`, contents are skipped without reading them."""

    def __init__(self, file: BinaryIO, size: int | None = None):
        self._file, self._size = file, size
        self.position = 0

    def block(self) -> bytes:
        """Return the next block, which is shorter only at the end."""
        return self._read(_BLOCK)

    def content(self, size: int, limit: int) -> bytes | None:
        """Read the content of a member and the padding after it; None, unread, above the limit."""
        padded = -(-size // _BLOCK) * _BLOCK
        data = None
        if size <= limit:
            data = self._read(size)
            padded -= len(data)
            if len(data) < size:
                raise CutOffError("unexpected end of data")
        if self._size is not None:
            if self.position + padded > self._size:
                raise CutOffError("unexpected end of data")
            self.position += padded
            self._file.seek(padded, 1)
            return data
        while padded:
            if not (skipped := self._read(min(padded, 2**20))):
                raise CutOffError("unexpected end of data")
            padded -= len(skipped)
        return data

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.position += len(data)
        return data


def _members(file: _Stream, limit: Callable[[str], int]) -> Iterator[Member]:
    zeros = 0  # blocks of zeros since the last header; two of them end a tar
    fields: dict[str, bytes] = {}  # of the extended headers before a file
    while len(block := file.block()) == _BLOCK:
        if block == _ZEROS:
            zeros += 1
            continue
        zeros = 0
        if (info := _header(block)) is None:
            continue
        if info.type in _EXTENDED:
            fields |= _fields(info.type, file.content(info.size, MAX_HEADER))
            continue
        extended, fields = fields, {}
        more = info.type == tarfile.GNUTYPE_SPARSE and block[482]
        while more and len(block := file.block()) == _BLOCK:  # the map of a sparse file
            more = block[504]
        if info.type in _WITHOUT_DATA:
            continue
        name = extended.get("path", b"").decode("utf-8", "surrogateescape") or info.name
        readable = info.type in _PLAIN and "unread" not in extended
        start, size = file.position, int(extended.get("size", info.size))
        data = file.content(size, limit(name) if readable else -1)
        if info.isfile():
            yield Member(name, start, size, readable, data)
    if zeros < 2 or block.strip(b"\0"):
        raise CutOffError("no mark of the end of a tar")


def _header(block: bytes) -> tarfile.TarInfo | None:
    """Return the header in a block, or None if there is none."""
    if not _CHECKSUM.fullmatch(block, 148, 156):  # faster than tarfile, for long damaged parts
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    return info if info.size >= 0 else None


def _fields(kind: bytes, data: bytes | None) -> dict[str, bytes]:
    """Return "path" and "size" from an extended header; "unread" if the file cannot be read."""
    if data is None:
        return {"unread": b""}
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0]}
    fields: dict[str, bytes] = {}
    position = 0
    while kind in _PAX and (match := _FIELD.match(data, position)):
        end = position + int(match[1])
        if end <= match.end():
            break
        value = data[match.end() : end - 1]
        if match[2] == b"path" or (match[2] == b"size" and re.fullmatch(rb"\d{1,20}", value)):
            fields[match[2].decode()] = value
        elif match[2].startswith(b"GNU.sparse."):
            fields["unread"] = b""
        position = end
    return fields
