"""One run at a time in a workdir."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cap_pretrain import files
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError
from cap_pretrain.training import lease

LOCK_FILE = "run.lock"

# Seconds after which a network file system has released the locks of a host that was lost; NFS 4
# servers commonly grant leases of 90 s (RFC 7530, section 9.5, has clients renew them). In a bucket
# we release them after as long.
LEASE = 120.0

# Of file systems without locks, such as some mounts of network disks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(workdir: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Keep other runs out of a workdir. All hosts of a cluster call it; host 0 holds the lock.

    The lock is the operating system's, on the file run.lock, and ends with the process, however
    that ends; a file that is left behind locks nothing. Where the file system has no locks, a line
    says so. In a bucket it is an object that is renewed, see `lease`.

    Raises:
        UserError: another process holds the lock; the message names it. Or run.lock is no file.
    """
    with contextlib.ExitStack() as stack:
        path = workdir / LOCK_FILE

        def acquire(_: list[None]) -> None:
            if files.is_url(path):
                lease.acquire(path, stack, say, LEASE)
            else:
                _acquire(path, stack, say)

        cluster.decided(None, acquire)
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
        raise lease.in_use(path, os.pread(descriptor, 2000, 0)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        say(f"{path}: the file system has no locks, so nothing keeps a second run out.")
        return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(lease.present()).encode() + b"\n")


def _wait(path: Path, descriptor: int, say: Callable[[str], None]) -> None:
    """Lock the file, waiting for LEASE if another host holds it; raises BlockingIOError."""
    end = None
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = lease.Holder.read(os.pread(descriptor, 2000, 0), path.name)
            other = holder.host != socket.gethostname()
            end = end or time.monotonic() + (LEASE if other else 0)
            if time.monotonic() >= end:
                raise
            say(f"{path.parent} is in use by {holder}; waiting, in case that host is lost.")
            time.sleep(min(10, LEASE))
