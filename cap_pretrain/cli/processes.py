"""Run the training program in subprocesses, observe its workdir and kill it."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

GRACE = 20
"""Seconds that the data workers of a killed run have to exit."""

HOST_GRACE = 60
"""Seconds that the other processes of a cluster have to exit after one was killed."""

PATIENCE = 300
"""Seconds more before all processes have connected (cluster.PATIENCE)."""

EXIT_LOST = 75
"""Exit status of a process that lost another one."""


class RehearsalError(Exception):
    """The rehearsal failed; `code` is the exit status of the tool."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class LostHostError(RehearsalError):
    """A process exited because it lost another one without a kill; the run can be restarted."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """A signal to send, and the moment: some seconds after an event.

    The event is the "start" of the process, a "step" that the run has not done before, or the
    beginning of a "save".
    """

    after: str
    step: int  # earliest step of a "step" or "save"
    seconds: float  # time to wait after the event
    latest: float = float("inf")  # step of the signal in any case, if the machine is faster now
    which: signal.Signals = signal.SIGKILL
    everyone: bool = True  # to all processes of a cluster instead of one

    def __str__(self) -> str:
        return f"{self.which.name} to {'all' if self.everyone else 'one'}"


class Run:
    """The training program as one process or a cluster.

    As a context manager, it kills all of its processes on exit. `arguments` are those of
    cap_pretrain.main, without --workdir; `devices` the virtual CPU devices of each process, 0 keeps
    the default. Output goes to WORKDIR.log and, of further processes, to WORKDIR.1.log and so on.
    """

    def __init__(self, arguments: list[str], workdir: Path, processes: int = 1, devices: int = 0):
        self._workdir = workdir
        self._log = workdir.with_name(workdir.name + ".log")
        self._of_earlier_runs = self._temporary_folders()
        self._step_before = self.step()
        self._began = time.monotonic()
        command = [sys.executable, "-m", "cap_pretrain.main", *arguments, f"--workdir={workdir}"]
        address = _free_address() if processes > 1 else ""
        self._processes = []
        for number in range(processes):
            path = self._log.with_name(f"{workdir.name}.{number}.log") if number else self._log
            with path.open("ab") as log:
                # A new session identifies the worker processes of each process.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(address, processes, number, devices),
                    start_new_session=True,
                )
            self._processes.append(process)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._began

    def ended(self) -> bool:
        """Return whether all processes have exited; raise RehearsalError if one has failed."""
        codes = [process.poll() for process in self._processes]
        if bad := [code for code in codes if code]:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-2:]
            output = "\n".join(lines)
            kind = LostHostError if set(bad) == {EXIT_LOST} else RehearsalError
            raise kind(f"a run ended with exit status {bad[0]} ({self._log}):\n{output}")
        return None not in codes

    def step(self) -> int:
        """Return the step of the last whole line in metrics.jsonl, or 0."""
        try:
            with (self._workdir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                return json.loads(file.read().split(b"\n")[:-1][-1])["step"]
        except (FileNotFoundError, IndexError):
            return 0

    def saving(self) -> set[str]:
        """Return the folder names of checkpoints that this run is writing."""
        now = self._temporary_folders()
        self._of_earlier_runs &= now  # until they are deleted
        return now - self._of_earlier_runs

    def kill(self, kill: Kill) -> None:
        """Send the signal to main processes, not to data workers, and wait until all have exited.

        Raises RehearsalError if one does not exit in time, or not with the exit status of SIGTERM
        although it was in its training loop.
        """
        in_loop = self.step() != self._step_before
        one = int(1e6 * kill.seconds) % len(self._processes)  # an arbitrary process
        for process in self._processes if kill.everyone else [self._processes[one]]:
            process.send_signal(kill.which)
        # After SIGTERM a run continues up to its training loop, which may take a while.
        bounded = len(self._processes) > 1 and kill.which == signal.SIGKILL
        grace = HOST_GRACE + (0 if in_loop else PATIENCE)
        try:
            for process in self._processes:
                process.wait(grace if bounded else None)
        except subprocess.TimeoutExpired as error:
            raise RehearsalError(f"a process ran for {grace} s after another's end.") from error
        codes = {process.returncode for process in self._processes}
        if kill.which == signal.SIGTERM and in_loop and not codes <= {0, 128 + signal.SIGTERM}:
            raise RehearsalError(f"after SIGTERM the processes ended with {codes} ({self._log}).")

    def check_nothing_left(self) -> None:
        """Raise RehearsalError unless the data workers of an ended run exit as well."""
        deadline = time.monotonic() + GRACE
        while left := [pid for process in self._processes for pid in _running(process.pid)]:
            if time.monotonic() > deadline:
                raise RehearsalError(
                    f"processes {left} were still running {GRACE} s after the run."
                )
            time.sleep(0.05)

    def _temporary_folders(self) -> set[str]:
        folders = (self._workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
        return {folder.name for folder in folders}


def environment(
    address: str = "", processes: int = 1, number: int = 0, devices: int = 0
) -> dict[str, str]:
    """Return environment variables of a process that runs the code in ROOT, installed or not.

    `address` is that of a cluster's coordinator, `number` the index of the process; 1 of
    `processes` is no cluster, and 0 virtual CPU `devices` keep the default.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    if devices:
        virtual = f"--xla_force_host_platform_device_count={devices}"
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {virtual}".strip()
    if processes > 1:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        variables |= zip(names, (address, str(processes), str(number)), strict=True)
    return variables


def _free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _running(group: int) -> list[int]:
    """Return the ids of running processes in a process group (Linux only; [] elsewhere)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just exited
            continue
        if int(its_group) == group and state not in "ZX":  # zombies have exited
            found.append(int(stat.parent.name))
    return found
