"""Sequential reading of tar archives, which skips damaged entries and needs no random access."""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders.files import MAX_BYTES

_END = 2 * tarfile.BLOCKSIZE  # bytes of zeros that end a tar
_GZIP = b"\x1f\x8b"


class CutOffError(Exception):
    """An archive ends early, or is not a tar; the files before that point are usable."""


def read_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the regular files in a tar, which may be gzipped.

    Bytes between valid headers are skipped, so a damaged header costs one file. Files larger than
    MAX_BYTES are skipped, too. Raises CutOffError after the last complete file if the tar ends
    early.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(len(_GZIP)) == _GZIP
        with (gzip.open if zipped else open)(path, "rb") as file:
            watched = _Watched(file)
            # The overloads of tarfile.open know nothing of minimal file objects.
            with tarfile.open(fileobj=watched, mode="r|", ignore_zeros=True) as tar:  # type: ignore[call-overload]
                while (info := tar.next()) is not None:
                    tar.members.clear()  # else tarfile would keep all of them in memory
                    if info.isfile() and info.size <= MAX_BYTES:
                        yield info.name, tar.extractfile(info).read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise CutOffError(str(error) or type(error).__name__) from error
    if watched.last.strip(b"\0") or len(watched.last) < _END:
        raise CutOffError("no mark of the end of a tar")


class _Watched:
    """A file that remembers the last bytes it has returned."""

    def __init__(self, file: Any):
        self._file, self.last = file, b""

    def read(self, size: int) -> bytes:
        # `read1` returns what is available, where `read` fails unless it gets all of it.
        data = self._file.read1(size)
        self.last = (self.last + data[-_END:])[-_END:]
        return data
