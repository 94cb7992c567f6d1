"""How the hosts of a run end together: a host that is lost ends the others, and they say which.

A process that is killed leaves the others waiting for it in the next collective, for as long as
the devices' own time limit. So every process says every few seconds that it is alive; host 0, the
coordinator, watches, and once another has been silent for `SILENCE` seconds tells the rest, which
end. A process that ends of an error of its own says so at once.
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

from cap_pretrain.distributed import cluster
from cap_pretrain.distributed.cluster import EXIT_LOST
from cap_pretrain.errors import UserError

# Seconds between two signs of life, and without one until a host counts as lost.
BEAT, SILENCE = 2.0, 35.0
# Seconds in which a host that has met an error of its own may finish, when the others are gone.
LAST = 30.0

_ALIVE, _VERDICT = "cap_pretrain/alive/", "cap_pretrain/verdict"


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """While it is entered, a host that is lost ends the others, a minute later at most.

    They end by `os._exit` with `EXIT_LOST`, or 2 where the other one ended of the user's mistake,
    and say why on stderr. With one process it does nothing.
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
    """Ends the process, without waiting for the others if this one failed by itself."""
    if _broken:
        _exit(code)
    sys.exit(code)


def ending(error: BaseException) -> None:
    """Tells the other hosts that this one ends of an error that they may not have met.

    Call it as soon as possible: closing files may wait for the others.
    """
    if _watch is not None:
        _watch.tell(error)


class _Watch:
    """The thread by which a host says that it is alive, and learns that another is not."""

    def __init__(self):
        self._client, self._coordinator = cluster.client(), cluster.state().coordinator_address
        self._me = jax.process_index()
        self._failed: BaseException | None = None
        self._left = threading.Event()
        self._beats = 0
        # Of each host its name, its last sign of life, and when that came.
        began = time.monotonic()
        self._heard = dict.fromkeys(range(jax.process_count()), ("", "", began))
        self._beat()
        self._thread = threading.Thread(target=self._run, name="cluster watch", daemon=True)
        self._thread.start()
        # Without the coordinator, JAX aborts the process from a thread of its own, where Python's
        # handlers of signals do not run.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        cluster.meet()

    def tell(self, error: BaseException) -> None:
        """Tells the others of an error, unless they know, or it may be the echo of a loss."""
        agreed = hasattr(error, "exit_code")  # watch.Stopped: all hosts stop, and save before
        if agreed or self._failed is not None:
            return
        self._failed = error
        code = 2 if isinstance(error, UserError) else EXIT_LOST
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        verdict = {"host": self._me, "name": socket.gethostname(), "code": code, "why": reason}
        echo = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in reason
        if echo:
            # A collective fails where another host was lost: it is for the coordinator to say.
            late = threading.Timer(SILENCE + 5 * BEAT, self._condemn, (verdict,))
            late.daemon = True
            late.start()
        else:
            self._condemn(verdict)

    def leave(self, error: BaseException | None = None) -> None:
        """Ends the watch; after an error, once all hosts know what to do."""
        global _broken
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._thread.join(SILENCE + 10 * BEAT)  # which, most likely, ends the process
        if error is not None and not hasattr(error, "exit_code"):
            _broken = True
            if self._me == 0:
                time.sleep(3 * BEAT)  # the others read the verdict from here
        self._left.set()
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_ALIVE}{self._me}", "left", allow_overwrite=True)
        self._thread.join(2 * BEAT)

    def _beat(self) -> None:
        self._beats += 1
        sign = f"{self._beats} {socket.gethostname()}"
        self._client.key_value_set(f"{_ALIVE}{self._me}", sign, allow_overwrite=True)

    def _run(self) -> None:
        silent_since = None
        while not self._left.wait(BEAT):
            try:
                self._beat()
                verdict = dict(self._client.key_value_dir_get(_VERDICT)).get(f"{_VERDICT}/0")
                if self._me == 0 and not verdict:
                    self._look()
                silent_since = None
            except Exception:
                if self._left.is_set():
                    return
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > 3 * BEAT:
                    lost = {"host": 0, "name": self._coordinator, "code": EXIT_LOST, "why": ""}
                    self._end(lost)
                continue
            if verdict:
                self._end(json.loads(verdict))

    def _look(self) -> None:
        """On host 0: finds the host that has been silent for too long."""
        now = time.monotonic()
        for key, sign in self._client.key_value_dir_get(_ALIVE):
            host = int(key.rpartition("/")[2])
            beat, _, name = sign.partition(" ")
            if self._heard[host][1] != beat:
                self._heard[host] = (name, beat, now)
        for host, (name, beat, when) in sorted(self._heard.items()):
            if beat != "left" and now - when > SILENCE:
                self._condemn({"host": host, "name": name, "code": EXIT_LOST, "why": ""})
                return

    def _condemn(self, verdict: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # the first one counts
            self._client.key_value_set(f"{_VERDICT}/0", json.dumps(verdict))

    def _aborted(self, number: int) -> None:
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            self._end({"host": 0, "name": self._coordinator, "code": EXIT_LOST, "why": ""})
        faulthandler.dump_traceback()
        ctypes.CDLL(None).signal(number, None)  # the default: it aborts

    def _end(self, verdict: dict[str, Any]) -> None:
        """Does what the verdict means for this host."""
        own = self._failed is not None and not isinstance(self._failed, jax.errors.JaxRuntimeError)
        if own and self._left.wait(LAST):
            return  # it has ended by itself
        who = f"host {verdict['host']} ({verdict['name']})"
        if own:
            message = str(self._failed)
        elif verdict["why"]:
            message = f"{who} ended: {verdict['why']}\nSo this one, host {self._me}, ends, too."
        else:
            message = (
                f"{who} is lost: no sign of life of it. So this one, host {self._me}, ends, too."
                "\nThe checkpoints are intact: start again, on as many hosts as there are."
            )
        print(f"cap_pretrain: {message}", file=sys.stderr)
        if self._me == 0:
            time.sleep(3 * BEAT)  # the others read the verdict from here
        _exit(verdict["code"])


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_watch: _Watch | None = None
_broken = False
