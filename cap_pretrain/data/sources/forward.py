"""Files that are read forward, local or remote, in few requests."""

import io
from pathlib import Path
from typing import Any, BinaryIO

from cap_pretrain.data.sources import storage, unchanged
from cap_pretrain.data.sources.listing import File
from cap_pretrain.data.sources.storage import Remote, retried
from cap_pretrain.untrusted import open_regular

_JUMP = 2**20  # bytes; after a longer jump in a remote file, little is read ahead
_LITTLE = 2**16  # bytes


def opened(path: Path | Remote, file: File) -> BinaryIO:
    """Open a local or remote file for reading forward."""
    if isinstance(path, Path):
        return retried(lambda: open_regular(path))
    return io.BufferedReader(_Forward(path, file), 1)


class _Forward(io.RawIOBase):
    """A remote file that is read forward: in large requests, or after long jumps in small ones."""

    def __init__(self, remote: Remote, file: File):
        self._remote, self._file, self._size = remote, file, file.size
        self._at, self._start, self._data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset if whence == 0 else (self._at if whence == 1 else self._size) + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = self._start + len(self._data)
        if not self._start <= self._at < end:
            jump = self._at - end if self._data else 0
            most = _LITTLE if jump > _JUMP or self._at < self._start else storage.CHUNK
            stop = min(self._at + most, self._size)
            if stop <= self._at:
                return 0
            data = unchanged.read_range(self._remote, self._at, stop, self._file.info)
            self._start, self._data = self._at, data
        place = self._at - self._start
        part = self._data[place : place + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
