"""Detecting lost hosts: when one host of a run dies, the others exit and report which one.

A process that is killed leaves the others waiting in the next collective until the devices' own
timeout. So every process sends a heartbeat every few seconds to host 0, the coordinator. When a
host has been silent for `SILENCE` seconds, host 0 publishes a verdict, and every host that reads it
exits. A process that fails with an exception publishes a verdict at once.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from cap_pretrain.distributed import ahead, cluster
from cap_pretrain.distributed.cluster import EXIT_LOST
from cap_pretrain.errors import UserError

# Seconds between two heartbeats, and of silence after which a host counts as lost.
BEAT, SILENCE = 2.0, 35.0
# Seconds that a host with an exception of its own has to finish after the others are gone.
LAST = 30.0

_ALIVE, _VERDICT = "cap_pretrain/alive/", "cap_pretrain/verdict"


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Exit this process within about a minute if another host is lost inside the context.

    The reason goes to stderr. The exit, through `os._exit`, has status `EXIT_LOST`, or 2 if the
    other host failed with a UserError. A single process is not watched.
    """
    global _watch
    if jax.process_count() == 1:
        yield
        return
    _watch = _Watch()
    try:
        yield
    except BaseException as e:
        ending(e)
        _watch.leave(e)
        raise
    else:
        _watch.leave()
    finally:
        _watch = None


def leave(code: int) -> NoReturn:
    """Exit with `code`; if this host failed by itself, do not wait for the others.

    Nor for a program that is still being compiled, which nothing can interrupt, nor, after a
    failure or a signal, for a tracker that hangs.
    """
    hangs = any(thread.name.startswith("tracker ") for thread in threading.enumerate())
    if _broken or ahead.compiling() or (code and hangs):
        _exit(code)
    sys.exit(code)


def ending(error: BaseException) -> None:
    """Announce to the other hosts that this one ends with an error of its own.

    Call it early, because closing files may wait for the other hosts.
    """
    if _watch is not None:
        _watch.announce(error)


class _Watch:
    """A thread that sends this host's heartbeat and reads verdicts about the others."""

    def __init__(self) -> None:
        self._client, self._coordinator = cluster.client(), cluster.state().coordinator_address
        self._me = jax.process_index()
        self._failed: BaseException | None = None
        self._left = threading.Event()
        self._beats = 0
        # By host: its name, its last heartbeat, and the time when that was seen.
        started = time.monotonic()
        self._heard = dict.fromkeys(range(jax.process_count()), ("", "", started))
        self._beat()
        self._thread = threading.Thread(target=self._run, name="cluster watch", daemon=True)
        self._thread.start()
        # If the coordinator is lost, JAX aborts the process from one of its own threads, where
        # Python's signal handlers do not run.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        cluster.connect_devices()

    def announce(self, error: BaseException) -> None:
        """Publish a verdict about this host, unless all hosts stop or another host is the cause."""
        all_hosts_stop = hasattr(error, "exit_code")  # watch.Stopped: all save, then stop
        if all_hosts_stop or self._failed is not None:
            return
        self._failed = error
        code = 2 if isinstance(error, UserError) else EXIT_LOST
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        verdict = {"host": self._me, "name": socket.gethostname(), "code": code, "why": reason}
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in reason:
            # Probably a collective failed because another host was lost. The coordinator should
            # name that host, so this verdict is published only if none comes.
            timer = threading.Timer(SILENCE + 5 * BEAT, self._publish, (verdict,))
            timer.daemon = True
            timer.start()
        else:
            self._publish(verdict)

    def leave(self, error: BaseException | None = None) -> None:
        """Stop watching; after an error, wait until the other hosts could read the verdict."""
        global _broken
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._thread.join(SILENCE + 10 * BEAT)  # a verdict most likely ends the process here
        if error is not None and not hasattr(error, "exit_code"):
            _broken = True
            if self._me == 0:
                time.sleep(3 * BEAT)  # the other hosts read the verdict from this one
        self._left.set()
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_ALIVE}{self._me}", "left", allow_overwrite=True)
        self._thread.join(2 * BEAT)

    def _beat(self) -> None:
        """Send one heartbeat."""
        self._beats += 1
        value = f"{self._beats} {socket.gethostname()}"
        self._client.key_value_set(f"{_ALIVE}{self._me}", value, allow_overwrite=True)

    def _run(self) -> None:
        """Send heartbeats and act on verdicts until this host leaves."""
        silent_since = None
        while not self._left.wait(BEAT):
            try:
                self._beat()
                verdict = dict(self._client.key_value_dir_get(_VERDICT)).get(f"{_VERDICT}/0")
                if self._me == 0 and not verdict:
                    self._find_lost_host()
                silent_since = None
            except Exception:
                if self._left.is_set():
                    return
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > 3 * BEAT:
                    self._obey(self._coordinator_lost())
                continue
            if verdict:
                self._obey(json.loads(verdict))

    def _find_lost_host(self) -> None:
        """On host 0, publish a verdict about the first host that has been silent for too long."""
        now = time.monotonic()
        for key, value in self._client.key_value_dir_get(_ALIVE):
            host = int(key.rpartition("/")[2])
            beat, _, name = value.partition(" ")
            if self._heard[host][1] != beat:
                self._heard[host] = (name, beat, now)
        for host, (name, beat, when) in sorted(self._heard.items()):
            if beat != "left" and now - when > SILENCE:
                self._publish({"host": host, "name": name, "code": EXIT_LOST, "why": ""})
                return

    def _coordinator_lost(self) -> dict[str, Any]:
        """Return the verdict that host 0 is lost."""
        return {"host": 0, "name": self._coordinator, "code": EXIT_LOST, "why": ""}

    def _publish(self, verdict: dict[str, Any]) -> None:
        """Publish a verdict to all hosts; only the first one takes effect."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_VERDICT}/0", json.dumps(verdict))

    def _aborted(self, number: int) -> None:
        """Handle SIGABRT: exit cleanly if the coordinator is gone, abort as usual otherwise."""
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            self._obey(self._coordinator_lost())
        faulthandler.dump_traceback()
        ctypes.CDLL(None).signal(number, None)  # restores the default action, which aborts

    def _obey(self, verdict: dict[str, Any]) -> None:
        """Print why the run ends and exit; an exception of this host's own takes precedence."""
        own = self._failed is not None and not isinstance(self._failed, jax.errors.JaxRuntimeError)
        if own and self._left.wait(LAST):
            return  # it has ended by itself
        who = f"host {verdict['host']} ({verdict['name']})"
        if own:
            message = str(self._failed)
        elif verdict["why"]:
            message = f"{who} failed: {verdict['why']}\nHost {self._me} therefore exits, too."
        else:
            message = (
                f"{who} is lost: it sent no heartbeat. Host {self._me} therefore exits, too."
                "\nThe checkpoints are intact: start again, on any number of hosts."
            )
        print(f"cap_pretrain: {message}", file=sys.stderr)
        if self._me == 0:
            time.sleep(3 * BEAT)  # the other hosts read the verdict from this one
        _exit(verdict["code"])


def _exit(code: int) -> NoReturn:
    """Flush the output and exit at once, without running cleanup handlers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# The watch of this process while `watched` is entered, and whether this host failed by itself.
_watch: _Watch | None = None
_broken = False
