"""The lock of a run whose workdir is in a bucket, where a lock does not end with its process.

The object run.lock says who holds it. It is created on the condition that it does not exist, and
its holder rewrites it several times within a lease, on the condition that no one else has. So one
of two runs that start at once gets it, and a run that was lost keeps it for a lease at most. Ages
are by the server's clock.
"""

import contextlib
import datetime as dt
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from absl import logging

from cap_pretrain import untrusted
from cap_pretrain.distributed.cluster import EXIT_LOST
from cap_pretrain.errors import UserError

RENEWALS = 6
"""A lease is renewed so many times before it would expire, so that a few of them may fail."""


class Holder(NamedTuple):
    """Who holds a lock, as the file says, which may contain anything."""

    host: str
    process: int  # 0 if unknown
    since: str

    @staticmethod
    def read(content: bytes, where: object) -> "Holder":
        """Read what a lock contains."""
        try:
            about = untrusted.parse_json(content, where)
            host, since = (untrusted.entry(about, name, str, where) for name in ("host", "since"))
            process = untrusted.entry(about, "process", int, where)
        except UserError:
            return Holder(socket.gethostname(), 0, "")
        return Holder(host[:100], process, since[:40])

    def __str__(self) -> str:
        if not self.process:
            return "another process"
        return f"process {self.process} on host {self.host!r} since {self.since}"


def present() -> dict[str, Any]:
    """Return what a lock contains that this process holds from now on."""
    now = dt.datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": now}


def in_use(path: Path, content: bytes) -> UserError:
    """Return the message for a lock that another run holds."""
    return UserError(
        f"--workdir: {path.parent} is in use by {Holder.read(content, path.name)}; wait for that "
        f"run, stop it, or give another folder. If its host no longer exists, remove {path}."
    )


def acquire(
    path: Path, stack: contextlib.ExitStack, say: Callable[[str], None], lease: float
) -> None:
    """Lock the object until `stack` unwinds.

    A holder on this machine whose process is gone is replaced at once, one elsewhere when it has
    not renewed the lock for `lease` seconds, for which `say` says that this run waits.

    Raises UserError if another run holds the lock.
    """
    content = json.dumps(present() | {"id": secrets.token_hex(8), **_here(os.getpid())}).encode()
    content += b"\n"
    generation = _put(path, content, 0) or _replaced(path, content, say, lease)
    held = _Held(path, content, generation, lease)
    stack.callback(held.release)


def _replaced(path: Path, content: bytes, say: Callable[[str], None], lease: float) -> int:
    """Take over the lock from a holder that is lost; return its generation."""
    from cap_pretrain.files import buckets

    seen, begun = None, time.monotonic()
    while True:
        try:
            version = buckets.get(cast(Any, path))
        except FileNotFoundError:
            generation = _put(path, content, 0)
        else:
            if seen not in (None, version.generation):  # it was renewed, or another was faster
                raise in_use(path, version.data)
            alive = _alive(version.data)
            if alive:
                raise in_use(path, version.data)
            age = max(version.age, time.monotonic() - begun if seen else 0)
            if alive is None and age < lease:
                if seen is None:
                    holder = Holder.read(version.data, path.name)
                    say(
                        f"{path.parent} is in use by {holder}; waiting up to "
                        f"{lease - age:.0f} s, in case that host is lost."
                    )
                seen = version.generation
                time.sleep(min(5.0, lease / RENEWALS / 2))
                continue
            generation = _put(path, content, version.generation)
            seen = seen or version.generation
        if generation:
            return generation


def _put(path: Path, content: bytes, generation: int) -> int:
    """Write the lock if it is of this generation, 0 if there must be none; return the new one.

    Returns 0 if it is of another.
    """
    from cap_pretrain.files import buckets

    place = cast(Any, path)
    try:
        return buckets.put(place, content, generation)
    except FileExistsError:
        # Perhaps it is ours: an earlier try may have succeeded, and its answer have been lost.
        with contextlib.suppress(FileNotFoundError):
            version = buckets.get(place)
            if version.data == content:
                return version.generation
    return 0


def _here(process: int) -> dict[str, str]:
    """Return what identifies a process of this machine: boot, namespace and start; {} if unknown.

    Containers of one machine may have the same host name, and give their processes equal numbers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
        # The 22nd field of proc(5)'s stat; the second, a name, may contain spaces.
        start = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return {}
    return {"boot": boot, "space": space, "start": start}


def _alive(content: bytes) -> bool | None:
    """Return whether the holder's process exists; None if it is of another machine."""
    own = _here(os.getpid())
    with contextlib.suppress(UserError):
        about = untrusted.checked(untrusted.parse_json(content, "run.lock"), "lock", dict, "lock")
        holder = Holder.read(content, "run.lock")
        same = all(about.get(name) == own[name] for name in ("boot", "space") if own)
        if own and same and holder.host == socket.gethostname() and holder.process > 0:
            return _here(holder.process).get("start") == about.get("start")
    return None


class _Held:
    """A lock that a thread renews until it is released."""

    def __init__(self, path: Path, content: bytes, generation: int, lease: float):
        self._path, self._content, self._generation = path, content, generation
        self._period = lease / RENEWALS
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock of a run", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing, and remove the lock."""
        from cap_pretrain.files import buckets

        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it expires
            buckets.remove(cast(Any, self._path), self._generation)

    def _run(self) -> None:
        while not self._released.wait(self._period):
            try:
                new = _put(self._path, self._content, self._generation)
                new = new or self._again()
            except Exception as error:  # an end of this thread would let the lease expire
                reason = getattr(error, "strerror", None) or repr(error)
                logging.warning("%s could not be renewed: %s", self._path, reason)
                continue
            if not new:
                self._lost()
            self._generation = new

    def _again(self) -> int:
        """Create the lock anew if someone has removed it; return its generation, or 0."""
        return _put(self._path, self._content, 0)

    def _lost(self) -> NoReturn:
        """End the process: another run writes to the workdir now."""
        print(
            f"cap_pretrain: another run has taken over {self._path.parent}, since this one could "
            f"not renew {self._path.name} in time; it ends without saving.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_LOST)
