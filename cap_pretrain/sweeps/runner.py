"""Runs trials as processes of the training program, several at a time, until all are done."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from cap_pretrain import files
from cap_pretrain.errors import UserError
from cap_pretrain.sweeps.trials import LOG_FILE, RECORD_FILE, Trial, record
from cap_pretrain.training.watch import StopRequest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = (sys.executable, "-m", "cap_pretrain.main")
LOCK_FILE = "sweep.lock"
# Seconds between two looks at what the trials do.
POLL = 0.1
# The exit status of a mistake of the user's, which trying again does not mend.
MISTAKE = 2

Say = Callable[[str], None]


@contextlib.contextmanager
def lock(out: Path) -> Iterator[IO[str]]:
    """Keeps other runners out of the folder of a sweep.

    Processes that inherit the file hold the lock, too: of a runner that was killed, the trials that
    live on keep out the next one.

    Raises:
      UserError: another one runs there.
    """
    files.make_workdir(out)
    with (out / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--out: the sweep in {str(out)!r} is running already, or trials of it are; wait "
                "for it, or end it."
            ) from error
        yield file


def is_locked(out: Path) -> bool:
    """Whether somebody runs the sweep in a folder."""
    try:
        with (out / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class _Process:
    """A start of a trial."""

    def __init__(self, trial: Trial, out: Path, program: Sequence[str], lock_file: IO[str]):
        self.trial, self._folder = trial, out / trial.name
        before = record(self._folder)
        self._seconds, self._starts = before.get("seconds", 0.0), before.get("starts", 0) + 1
        self._began = time.monotonic()
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with (self._folder / LOG_FILE).open("ab") as log:
            self._log_begins = log.tell()
            # In a session of its own, so that Ctrl-C comes to the runner alone, which asks each
            # trial once to stop: a second signal would end it before it has saved.
            self._process = subprocess.Popen(
                [*program, *trial.arguments(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                start_new_session=True,
                pass_fds=[lock_file.fileno()],
            )
        self._write("running")

    def code(self) -> int | None:
        """The exit status, None while it runs; of what a signal killed 128 + its number."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def stop(self) -> None:
        """Asks it to save and end."""
        self._process.terminate()

    def wait(self) -> int:
        """Waits for its end; returns `code`."""
        self._process.wait()
        return self.code()

    def finish(self, state: str) -> str:
        """Writes down how it ended; returns the reason if it did not finish."""
        reason = "" if state == "finished" else self._last_line()
        self._write(state, reason)
        return reason

    def _write(self, state: str, reason: str = "") -> None:
        told = dict(state=state, starts=self._starts, code=self.code(), reason=reason)
        told["seconds"] = round(self._seconds + time.monotonic() - self._began, 1)
        files.write_text(self._folder / RECORD_FILE, json.dumps(told, indent=2) + "\n")

    def _last_line(self) -> str:
        with (self._folder / LOG_FILE).open("rb") as log:
            log.seek(self._log_begins)
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def run(
    trials: Sequence[Trial],
    out: Path,
    lock_file: IO[str],
    *,
    slots: int,
    retries: int,
    program: Sequence[str],
    say: Say,
) -> int:
    """Runs all trials that are not finished, in the order they have, and tells how each ends.

    A trial that crashes is tried again, after the others, where the run itself goes on from its
    last checkpoint. SIGTERM or SIGINT ends all of them, each after saving.

    Args:
      trials: which; the folder of each is there.
      out: the folder of the sweep.
      lock_file: what `lock` gave.
      slots: how many run at a time.
      retries: how often a trial is started again that crashed.
      program: the training program, without its arguments.
      say: is told what happens.

    Returns:
      The exit status: 0 all are finished, 1 some failed for good, 143 or 130 a signal stopped it.
    """
    waiting = deque(t for t in trials if record(out / t.name).get("state") != "finished")
    if done := len(trials) - len(waiting):
        say(f"{done} of {len(trials)} trials are finished already.")
    crashes: dict[str, int] = {}
    running: list[_Process] = []
    failed = []
    with StopRequest() as stop:
        try:
            while (waiting or running) and not stop.is_set():
                while waiting and len(running) < slots:
                    running.append(_Process(waiting.popleft(), out, program, lock_file))
                for process in [p for p in running if p.code() is not None]:
                    running.remove(process)
                    name, code = process.trial.name, process.code()
                    if code == 0:
                        process.finish("finished")
                        done += 1
                        say(f"{name}: finished ({done} of {len(trials)})")
                        continue
                    reason = process.finish("failed")
                    crashes[name] = crashes.get(name, 0) + 1
                    if code == MISTAKE or crashes[name] > retries:
                        failed.append(name)
                        say(f"{name}: failed, exit status {code}: {reason}")
                    else:
                        waiting.append(process.trial)
                        say(f"{name}: exit status {code}, will be tried again: {reason}")
                time.sleep(POLL)
        finally:
            for process in running:
                process.stop()
            for process in running:
                # One that was done at this very moment is.
                process.finish("finished" if process.wait() == 0 else "stopped")
    if stop.is_set():
        say(f"{stop.signal.name}: stopped; run again to go on.")
        return 128 + stop.signal
    if failed:
        say(f"{len(failed)} of {len(trials)} trials failed: {', '.join(failed)}")
    return 1 if failed else 0
