"""Locks of ranges of a file, and holes in it: what `sparse` needs of the operating system."""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cap_pretrain.data.sources.storage import why
from cap_pretrain.errors import UserError

_SIZE = 4096  # bytes of the hole that `check_holes` makes
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_LOCK = "hhqqi4x"  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_TRIES, _DELAY = 50, 0.1  # to hold a slot that workers have joined; seconds
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn errors of writing to the cache into a UserError, but not that others hold a lock."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(
            f"data.cache: cannot write to {folder} ({why(error)}); make room or name another "
            "folder."
        ) from error


@contextlib.contextmanager
def lock(
    path: Path, ranges: Iterable[tuple[int, int]], *, shared: bool = False, wait: bool = True
) -> Iterator[None]:
    """Lock ranges of bytes (start, stop) of a file against all other threads and processes.

    Shared locks exclude only those that are not. Without `wait`, raises BlockingIOError if one is
    locked. Raises UserError if the file cannot be opened or locked.
    """
    with writing(path.parent):
        file = _locked(path, ranges, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, wait=wait)
    try:
        yield
    finally:
        os.close(file)  # which unlocks


def _locked(path: Path, ranges: Iterable[tuple[int, int]], kind: int, *, wait: bool = True) -> int:
    """Return a file of which ranges are locked until it is closed."""
    file = os.open(path, os.O_RDWR)
    try:
        for start, stop in ranges:
            request = struct.pack(_LOCK, kind, os.SEEK_SET, start, stop - start, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
    except BaseException:
        os.close(file)
        raise
    return file


def punch(path: Path, start: int, length: int) -> None:
    """Free the space of whole pages of a file, which then read as zeros."""
    file = os.open(path, os.O_WRONLY)
    try:
        mode, offset, size = _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(length)
        if _libc.fallocate(file, mode, offset, size):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(file)


def runs(chosen: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, last + 1) of each run of true elements."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def hold(slot: Path) -> int:
    """Lock a slot until the returned file is closed; raises BlockingIOError if others use it.

    Workers of a run that was killed are waited for: they end by themselves.
    """
    file = _flocked(slot / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    for tries in range(_TRIES - 1, -1, -1):
        try:
            os.close(_flocked(slot / "workers", fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            if not tries:
                os.close(file)
                raise
            time.sleep(_DELAY)
        else:
            break
    return file


def join(slot: Path) -> int:
    """Keep others from holding a slot until the returned file is closed, too: for workers."""
    return _flocked(slot / "workers", fcntl.LOCK_SH)


def _flocked(path: Path, kind: int) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, kind)
    except BaseException:
        os.close(file)
        raise
    return file


def take(folder: Path, prefix: str = "") -> Path:
    """Return the first slot PREFIX0, PREFIX1, … in a folder that is free; hold it from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2**16):
        slot = folder / f"{prefix}{number}"
        slot.mkdir(exist_ok=True)
        with contextlib.suppress(BlockingIOError):
            hold(slot)  # until the process ends
            return slot
    raise OSError(errno.EUSERS, "all slots are in use")


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Write all bytes at a place in a file."""
    view, file = memoryview(data), os.open(path, os.O_WRONLY)
    try:
        while view:
            written = os.pwrite(file, view, offset)
            offset, view = offset + written, view[written:]
    finally:
        os.close(file)


def check_holes(folder: Path) -> None:
    """Raise UserError if the file system of a folder has no holes or locks."""
    path = folder / "holes"
    path.write_bytes(bytes([1]) * 2 * _SIZE)
    try:
        punch(path, 0, _SIZE)
        os.close(_locked(path, [(0, 1)], fcntl.F_WRLCK))
    except (OSError, AttributeError) as error:
        raise UserError(
            f"data.cache: the file system of {folder} cannot free parts of a file ({why(error)}); "
            "name a folder on a local disk (ext4, xfs, tmpfs), or set data.order=global."
        ) from error
    finally:
        path.unlink(missing_ok=True)
