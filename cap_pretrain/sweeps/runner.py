"""Running trials as processes of the training program, several at a time, until all are done.

A sweep may be in a bucket (gs://). Its lock, and the output of its trials while they run, are then
in a local folder of the user's cache; the output is copied to the bucket when a trial ends. So that
lock keeps out runners on this machine alone; the lock of each run keeps others out of its workdir.
"""

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
POLL = 0.1  # Seconds between checks of the processes
USER_ERROR = 2  # The exit status of a user error, which a retry does not fix

Say = Callable[[str], None]


@contextlib.contextmanager
def lock(out: Path) -> Iterator[IO[str]]:
    """Lock the folder of a sweep against other runners; yield the lock file.

    Processes that inherit the file hold the lock, too: if a runner is killed, its surviving trials
    keep other runners out. Raises UserError if another runner, or a trial that it left, holds it.
    """
    files.make_workdir(out)
    here = files.local_folder(out)
    here.mkdir(parents=True, exist_ok=True)
    with (here / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--out: the sweep in {str(out)!r} is running already, or trials of it are; wait "
                "for them, or stop them."
            ) from error
        yield file


def is_locked(out: Path) -> bool:
    """Return whether the sweep in a folder is running."""
    try:
        with (files.local_folder(out) / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class _Process:
    """A process that runs a trial; construction starts it. It holds the lock of the sweep, too.

    If the record or the log cannot be written to the sweep's folder, `say` gets a line, and all
    trials run on.
    """

    def __init__(
        self, trial: Trial, out: Path, program: Sequence[str], lock_file: IO[str], say: Say
    ):
        self.trial, self._folder, self._say = trial, out / trial.name, say
        before = record(self._folder)
        self._seconds, self._starts = before.get("seconds", 0.0), before.get("starts", 0) + 1
        self._started = time.monotonic()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._log = files.local_folder(out) / trial.name / LOG_FILE
        if self._is_elsewhere:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            path = self._folder / LOG_FILE  # of earlier starts, perhaps on another machine
            kept = path.read_bytes() if path.exists() else b""
            # A runner that was killed has not copied the local log, which is longer then.
            if not self._log.exists() or self._log.stat().st_size < len(kept):
                self._log.write_bytes(kept)
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            # In a new session, so that Ctrl-C reaches only the runner, which signals each trial
            # once: a second signal would kill a trial before it has saved.
            self._process = subprocess.Popen(
                [*program, *trial.arguments(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
                pass_fds=[lock_file.fileno()],
            )
        self._write("running")

    def code(self) -> int | None:
        """Return the exit status: None while it runs, 128 + the number if a signal killed it."""
        code = self._process.poll()
        return code if code is None else _shell_status(code)

    def stop(self) -> None:
        """Ask the trial to save and exit."""
        self._process.terminate()

    def wait(self) -> int:
        """Wait until the trial exits; return its exit status, as `code`."""
        return _shell_status(self._process.wait())

    def finish(self, state: str) -> str:
        """Record the final state; return the reason if the trial did not finish, else ""."""
        reason = "" if state == "finished" else self._last_line()
        if self._is_elsewhere:
            with self._reporting():
                files.write_bytes(self._folder / LOG_FILE, self._log.read_bytes())
        self._write(state, reason)
        return reason

    def _write(self, state: str, reason: str = "") -> None:
        status = dict(state=state, starts=self._starts, code=self.code(), reason=reason)
        status["seconds"] = round(self._seconds + time.monotonic() - self._started, 1)
        with self._reporting():
            files.write_text(self._folder / RECORD_FILE, json.dumps(status, indent=2) + "\n")

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Report an error of writing, as while a bucket cannot be reached, and continue."""
        try:
            yield
        except OSError as error:
            self._say(f"{self.trial.name}: {error.filename} was not written: {error.strerror}")

    @property
    def _is_elsewhere(self) -> bool:
        return self._log.parent != self._folder

    def _last_line(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _shell_status(code: int) -> int:
    """Return an exit status as shells do: 128 + the number of a signal that killed the process."""
    return 128 - code if code < 0 else code


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
    """Run all trials that are not finished, in their order, and report how each ends.

    A trial that crashes is retried after the others, `retries` times; it resumes from its last
    checkpoint. SIGTERM or SIGINT stops all trials, each after saving. The trials' folders exist in
    `out`. `slots` trials run at a time; `program` is the training program without its arguments.
    Returns the exit status: 0 if all are finished, 1 if some failed, 143 or 130 if a signal stopped
    it.
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
                    try:
                        running.append(_Process(waiting[0], out, program, lock_file, say))
                    except OSError as error:
                        if not (running and files.is_url(str(error.filename))):
                            raise
                        say(f"{waiting[0].name}: waits: {error.filename}: {error.strerror}")
                        break  # the bucket may be reached again while the others run
                    waiting.popleft()
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
                    if code == USER_ERROR or crashes[name] > retries:
                        failed.append(name)
                        say(f"{name}: failed, exit status {code}: {reason}")
                    else:
                        waiting.append(process.trial)
                        say(f"{name}: exit status {code}, will be retried: {reason}")
                time.sleep(POLL)
        finally:
            for process in running:
                process.stop()
            for process in running:
                # It may have finished just before the signal.
                process.finish("finished" if process.wait() == 0 else "stopped")
    if stop.signal is not None:
        say(f"{stop.signal.name}: stopped; run again to resume.")
        return 128 + stop.signal
    if failed:
        say(f"{len(failed)} of {len(trials)} trials failed: {', '.join(failed)}")
    return 1 if failed else 0
