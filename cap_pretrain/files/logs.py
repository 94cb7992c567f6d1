"""Files that grow by appending."""

import contextlib
import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from cap_pretrain.files.places import is_url

PERIOD = 30.0
"""Seconds between two uploads of a log; Google allows one a second for each object."""

SHARE = 0.05
"""Share of the time at most that uploads of a log take: a slow one waits so much longer."""

# Errors that the next upload would meet again.
_LASTING = (errno.EACCES, errno.ENOENT)


class Appended:
    """An append-only file: when `write` returns, the operating system has the data.

    An object of a bucket cannot be appended to. There, the content is kept in memory, with what
    the object holds before, and uploaded as a whole every PERIOD seconds, by `flush` and at the
    end. An upload that fails for a moment is repeated; a lasting failure is raised by the next
    call.

    A call that fails raises OSError, with the name of the file, and its data is dropped.
    """

    def __init__(self, path: Path):
        self._log = _Uploaded(path) if is_url(path) else _Local(path)

    def write(self, data: bytes) -> None:
        """Append all of `data`; if the disk is full, as much of it as fits."""
        self._log.write(data)

    def flush(self) -> None:
        """Return when others can read what was written."""
        self._log.flush()

    def close(self) -> None:
        """Close the file."""
        self._log.close()


class _Local:
    """An unbuffered file on a disk."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        with naming(self._path):
            while data:
                data = data[self._file.write(data) :]

    def flush(self) -> None:
        """Do nothing: the file is not buffered."""

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


class _Uploaded:
    """An object of a bucket, uploaded by a thread."""

    def __init__(self, path: Path):
        self._path = path
        self._data = bytearray()
        with contextlib.suppress(FileNotFoundError):
            self._data += path.read_bytes()
        self._sent = len(self._data)
        self._error: OSError | None = None
        self._sending, self._closed = threading.Lock(), threading.Event()
        self._seconds = 0.0  # that the last upload took
        self._thread = threading.Thread(target=self._run, name="upload of a log", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        self._raise()
        self._data += data

    def flush(self) -> None:
        self._raise()
        self._upload()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._raise()
        self._upload()

    def _raise(self) -> None:
        if self._error:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        while not self._closed.wait(max(PERIOD, self._seconds / SHARE)):
            try:
                self._upload()
            except Exception as error:  # an end of this thread would end the uploads
                if isinstance(error, OSError) and error.errno in _LASTING:
                    self._error = error
                reason = getattr(error, "strerror", None) or repr(error)
                logging.warning("%s could not be uploaded: %s", self._path, reason)

    def _upload(self) -> None:
        with self._sending:  # so that no older content replaces a newer one
            data = bytes(self._data)
            if len(data) != self._sent:
                began = time.monotonic()
                self._path.write_bytes(data)
                self._sent, self._seconds = len(data), time.monotonic() - began


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to every OSError inside the context; Python adds it only when opening fails."""
    try:
        yield
    except OSError as e:
        e.filename, e.filename2 = str(path), None
        raise
