"""Files of tar archives, in the order they come: without random access, over damage, to the end."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders.files import MAX_BYTES

_END = 2 * tarfile.BLOCKSIZE  # zeros
_GZIP = b"\x1f\x8b"


class CutOff(Exception):
    """An archive ends early, or is none; what came before it can be used."""


def read_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the files in a tar, which may be gzipped.

    What stands between headers that are whole is passed over, so a damaged header costs one file.
    So do files above MAX_BYTES.

    Raises:
        CutOff: after the last file that is whole.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(len(_GZIP)) == _GZIP
        with (gzip.open if zipped else open)(path, "rb") as file:
            watched = _Watched(file)
            with tarfile.open(fileobj=watched, mode="r|", ignore_zeros=True) as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # it would remember all of them
                    if info.isfile() and info.size <= MAX_BYTES:
                        yield info.name, tar.extractfile(info).read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise CutOff(str(error) or type(error).__name__) from error
    if watched.last.strip(b"\0") or len(watched.last) < _END:
        raise CutOff("no mark of the end of a tar")


class _Watched:
    """A file that remembers what it has given last."""

    def __init__(self, file: Any):
        self._file, self.last = file, b""

    def read(self, size: int) -> bytes:
        data = self._file.read1(size)  # what there is, where `read` would want all of it or fail
        self.last = (self.last + data[-_END:])[-_END:]
        return data
