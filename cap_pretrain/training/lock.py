"""One run at a time in a workdir."""

import contextlib
import datetime as dt
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from cap_pretrain import untrusted
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError

LOCK_FILE = "run.lock"

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
    try:  # of a workdir that may come from a stranger, so no link is followed
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise UserError(f"{path}: is not a regular file; remove it.") from error
    stack.callback(os.close, descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UserError(f"{path}: is not a regular file; remove it.")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"--workdir: {path.parent} is in use by {_holder(os.read(descriptor, 2000))}; wait for "
            "that run, stop it, or give another folder."
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


def _holder(content: bytes) -> str:
    """Return in words who wrote this content of the file; it may be anything."""
    try:
        about = untrusted.parse_json(content, LOCK_FILE)
        host, since = (untrusted.entry(about, name, str, LOCK_FILE) for name in ("host", "since"))
        process = untrusted.entry(about, "process", int, LOCK_FILE)
    except UserError:
        return "another process"
    return f"process {process} on host {host[:100]!r} since {since[:40]}"
