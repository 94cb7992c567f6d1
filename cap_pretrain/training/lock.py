"""One run at a time in a workdir."""

import contextlib
import datetime as dt
import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cap_pretrain import untrusted
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError

LOCK_FILE = "run.lock"

# Seconds after which a network file system has released the locks of a host that was lost; NFS 4
# servers commonly grant leases of 90 s (RFC 7530, section 9.5, has clients renew them).
LEASE = 120.0

# Of file systems without locks, such as some mounts of network disks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(workdir: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Keep other runs out of a workdir. All hosts of a cluster call it; host 0 holds the lock.

    The lock is the operating system's, on the file run.lock, and ends with the process, however
    that ends; a file that is left behind locks nothing. Where the file system has no locks, a line
    says so.

    Raises:
        UserError: another process holds the lock; the message names it. Or run.lock is no file.
    """
    with contextlib.ExitStack() as stack:
        cluster.decided(None, lambda _: _acquire(workdir / LOCK_FILE, stack, say))
        yield


def _acquire(path: Path, stack: contextlib.ExitStack, say: Callable[[str], None]) -> None:
    """Lock the file until `stack` unwinds, and write into it who holds it."""
    # The workdir may come from a stranger, so links are not followed.
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise UserError(f"{path}: is not a regular file; remove it.") from error
    stack.callback(os.close, descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UserError(f"{path}: is not a regular file; remove it.")
    try:
        _wait(path, descriptor, say)
    except BlockingIOError as error:
        holder, _ = _holder(os.pread(descriptor, 2000, 0))
        raise UserError(
            f"--workdir: {path.parent} is in use by {holder}; wait for that run, stop it, or give "
            f"another folder. If its host no longer exists, remove {path}."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        say(f"{path}: the file system has no locks, so nothing keeps a second run out.")
        return
    now = dt.datetime.now().astimezone().isoformat(" ", "seconds")
    about = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(about).encode() + b"\n")


def _wait(path: Path, descriptor: int, say: Callable[[str], None]) -> None:
    """Lock the file, waiting for LEASE if another host holds it; raises BlockingIOError."""
    end = None
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, host = _holder(os.pread(descriptor, 2000, 0))
            end = end or time.monotonic() + (LEASE if host != socket.gethostname() else 0)
            if time.monotonic() >= end:
                raise
            say(f"{path.parent} is in use by {holder}; waiting, in case that host is lost.")
            time.sleep(min(10, LEASE))


def _holder(content: bytes) -> tuple[str, str]:
    """Return in words who wrote this content of the file, which may be anything, and the host."""
    try:
        about = untrusted.parse_json(content, LOCK_FILE)
        host, since = (untrusted.entry(about, name, str, LOCK_FILE) for name in ("host", "since"))
        process = untrusted.entry(about, "process", int, LOCK_FILE)
    except UserError:
        return "another process", socket.gethostname()
    return f"process {process} on host {host[:100]!r} since {since[:40]}", host
