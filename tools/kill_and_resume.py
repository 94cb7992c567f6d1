r"""Rehearses the worst: a run that is killed at any moment, again and again, goes on exactly.

    python tools/kill_and_resume.py --kills 5 --workdir runs/rehearsal -- \\
        --config=configs/pretrain.py:objective=cap,model=mu/8 --config.total_steps=200 …

Runs `python -m cap_pretrain.main` with the arguments after `--` twice: straight through in
WORKDIR/straight, and in WORKDIR/killed, where SIGKILL ends it at random moments: between steps,
while a checkpoint is being saved (a third), while it starts (a sixth). Each time it is started
again. What it printed is in WORKDIR/straight.log and WORKDIR/killed.log, of further processes in
WORKDIR/killed.1.log ….

As a cluster on this machine, with --processes 2 (on CPUs; --devices 2 gives each two virtual
ones): then one process of the run or all are hit, and the others have to end by themselves. With
--processes 1 2 4, each start draws how many there are. --signals KILL TERM draws the signal, too.

At the end tools/compare_runs.py compares the two: every bit where the number of processes stayed
the same, otherwise the losses to a ten-thousandth and, with --config.log.ids=True, which examples
each step saw. Exit status: 0 the same; 1 not, or not killed as often as asked, or processes left
behind; 2 the command does not run, or the user's mistake.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds between two looks at what a run does.
POLL = 0.003
# Seconds that the worker processes of a killed run may take to notice, and the other processes of
# a cluster. Before they have met, hosts wait for one that does not come (cluster.PATIENCE).
GRACE, GRACE_OF_HOSTS, PATIENCE = 20, 60, 300
# How a host ends that has lost another, and how often that may be for no reason but a slow machine.
EXIT_LOST, MAY_LOSE = 75, 3
# Losses of other numbers of processes, whose sums round differently, may differ so much.
TOLERANCE = 1e-4


class Failed(Exception):
    """The rehearsal ends here; the message says why, `code` is the exit status."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class Lost(Failed):
    """A host ended since it lost another one, unprovoked: to be started again."""


class Run:
    """The training program, in one process or as a cluster, and what its workdir shows of it.

    A context manager: nothing of it runs any more afterwards.
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
                # In a session of its own, its worker processes can be told from others.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(address, processes, number, devices),
                    start_new_session=True,
                )
            self._processes.append(process)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def ended(self) -> bool:
        """Whether it has come to its end; raises Failed if that was not the end it should have."""
        codes = [process.poll() for process in self._processes]
        if bad := [code for code in codes if code]:
            last = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-2:]
            said = "\n".join(last)
            kind = Lost if set(bad) == {EXIT_LOST} else Failed
            raise kind(f"a run ended with exit status {bad[0]} ({self._log}):\n{said}")
        return None not in codes

    def step(self) -> int:
        """The step of the last whole line in metrics.jsonl; 0 without one."""
        try:
            with (self._workdir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                return json.loads(file.read().split(b"\n")[:-1][-1])["step"]
        except (FileNotFoundError, IndexError):
            return 0

    def saving(self) -> set[str]:
        """The unfinished checkpoints of this process, by the names of their folders."""
        now = self._temporary_folders()
        self._of_earlier_runs &= now  # until they are cleared away
        return now - self._of_earlier_runs

    def hit(self, blow: "Blow") -> None:
        """Sends the signal, to the main processes alone, and waits until all have ended.

        Raises:
          Failed: one did not end in time, or SIGTERM found it in its loop and it did not stop well.
        """
        in_loop = self.step() != self._step_before
        one = int(1e6 * blow.seconds) % len(self._processes)  # as good as any
        for process in self._processes if blow.everyone else [self._processes[one]]:
            process.send_signal(blow.which)
        # After SIGTERM a run first has to come as far as its loop, which may take a while.
        bounded = len(self._processes) > 1 and blow.which == signal.SIGKILL
        grace = GRACE_OF_HOSTS + (0 if in_loop else PATIENCE)
        try:
            for process in self._processes:
                process.wait(grace if bounded else None)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"a process still ran {grace} s after another's end.") from error
        codes = {process.returncode for process in self._processes}
        if blow.which == signal.SIGTERM and in_loop and not codes <= {0, 128 + signal.SIGTERM}:
            raise Failed(f"after SIGTERM the processes ended with {codes} ({self._log}).")

    def check_nothing_left(self) -> None:
        """Raises Failed unless the worker processes of an ended run end as well."""
        deadline = time.monotonic() + GRACE
        while left := [pid for process in self._processes for pid in _running(process.pid)]:
            if time.monotonic() > deadline:
                raise Failed(f"processes {left} were still running {GRACE} s after the run.")
            time.sleep(0.05)

    def _temporary_folders(self) -> set[str]:
        folders = (self._workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
        return {folder.name for folder in folders}


def _environment(address: str, processes: int, number: int, devices: int) -> dict[str, str]:
    """What is rehearsed is the code beside this file, installed or not."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    if devices:
        virtual = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {virtual}".strip()
    if processes > 1:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        environment |= zip(names, (address, str(processes), str(number)), strict=True)
    return environment


def _free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _running(group: int) -> list[int]:
    """The running processes of a process group (on Linux; elsewhere none are found)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(its_group) == group and state not in "ZX":  # ended, but nobody has asked how
            found.append(int(stat.parent.name))
    return found


@dataclasses.dataclass(frozen=True)
class Pace:
    """How the straight run went.

    Attributes:
      steps: its last step.
      start: seconds until the first step was logged.
      line: seconds from one logged step to the next, in the median.
      save: seconds that the quickest save took.
    """

    steps: int
    start: float
    line: float
    save: float


def run_through(run: Run) -> Pace:
    """Lets a run come to its end."""
    logged: dict[int, float] = {}
    saves: dict[str, list[float]] = {}
    while not run.ended():
        now = run.seconds()
        if step := run.step():
            logged.setdefault(step, now)
        for name in run.saving():
            saves.setdefault(name, []).append(now)
        time.sleep(POLL)
    run.check_nothing_left()
    if not logged or not saves:
        raise Failed("the run logged nothing or saved nothing: nothing to compare.", 2)
    times = list(logged.values())
    return Pace(
        steps=run.step(),
        start=times[0],
        line=statistics.median(b - a for a, b in itertools.pairwise([0.0, *times])),
        save=min(seen[-1] - seen[0] for seen in saves.values()),
    )


@dataclasses.dataclass(frozen=True)
class Blow:
    """A signal, and when it comes: so many seconds after something has happened, once a step was
    reached.

    Attributes:
      after: "start" of the process, a "step" that the run has not done before, or the beginning
        of a "save".
      step: the step; it does not matter for "start".
      seconds: how long to wait then.
      latest: the step at which it comes anyway, on a machine that has become faster.
      which: the signal.
      everyone: whether it hits all processes of a cluster, or one.
    """

    after: str
    step: int
    seconds: float
    latest: float = float("inf")
    which: signal.Signals = signal.SIGKILL
    everyone: bool = True

    @property
    def told(self) -> str:
        """In words."""
        return f"{self.which.name} to {'all' if self.everyone else 'one'}"


def blows(
    kills: int, pace: Pace, rng: random.Random, signals: Sequence[signal.Signals] = ()
) -> Iterator[Blow]:
    """Yields blows at random moments, spread over a run."""
    saves, starts = round(kills / 3), round(kills / 6)
    kinds = ["save"] * saves + ["start"] * starts + ["step"] * (kills - saves - starts)
    rng.shuffle(kinds)
    # A start that begins in the middle of a run may take longer: it restores.
    longest = {"save": pace.save, "start": 1.2 * pace.start, "step": pace.line}
    for number, kind in enumerate(kinds):
        # The last tenth of the run is left, so that it does not end before its last kill.
        share = 0.9 * pace.steps / kills
        step, latest = int(share * (number + rng.random())), share * (number + 1.5)
        which = rng.choice(list(signals)) if signals else signal.SIGKILL
        seconds, everyone = rng.random() * longest[kind], rng.random() < 0.5
        yield Blow(kind, step, seconds, latest, which, everyone)


def wait_for(run: Run, blow: Blow) -> bool:
    """Waits until it is time to kill a run; returns False if it has ended before."""
    before, due = run.step(), None
    while not run.ended():
        step, saving = max(before, run.step()), run.saving()
        happened = {
            "start": True,
            "step": step > before and step >= blow.step,
            "save": bool(saving) and step >= blow.step,
        }
        if due is None and happened[blow.after]:
            due = run.seconds() + blow.seconds
        if (due is not None and run.seconds() >= due) or (step > before and step >= blow.latest):
            return True
        time.sleep(POLL)
    return False


def kill_and_resume(
    arguments: list[str], workdir: Path, blows: Sequence[Blow], cluster: "Cluster", pace: Pace
) -> int:
    """Runs in `workdir` until it is done, hit on the way; returns how often that was.

    Raises:
      Failed: it did not go on, or processes stayed behind.
    """
    done, again = 0, 0
    while True:
        try:
            with cluster.run(arguments, workdir) as run:
                if done == len(blows):
                    while not run.ended():
                        time.sleep(POLL)
                    run.check_nothing_left()
                    return done
                blow, before = blows[done], run.step()
                if not wait_for(run, blow):
                    return done
                after, saving = run.seconds(), sorted(run.saving())
                run.hit(blow)
                done += 1
                if saving := saving or sorted(run.saving()):
                    doing = f"while saving step {saving[0].partition('.')[0]}"
                elif run.step() > before:
                    doing = "between saves"
                else:
                    doing = "starting, or doing steps again"
                told = "" if cluster.alone else f" {cluster.told} ({blow.told})"
                print(
                    f"kill {done} of {len(blows)}{told}: at step {run.step()} of {pace.steps}, "
                    f"{doing}, {after:.1f} s after its start",
                    flush=True,
                )
                run.check_nothing_left()
        except Lost as error:
            again += 1
            if again > MAY_LOSE:
                raise
            print(f"started again: {str(error).splitlines()[1]}", flush=True)


class Cluster:
    """How many processes there are at each start.

    Args:
      processes: what is drawn from; the first is that of the straight run.
      devices: virtual ones of each process; 0: as they are.
      rng: draws.
    """

    def __init__(self, processes: Sequence[int], devices: int, rng: random.Random):
        self._processes, self._devices, self._rng = processes, devices, rng
        self.alone = tuple(processes) == (1,)
        self.told = ""

    def first(self, arguments: list[str], workdir: Path) -> Run:
        """Starts the straight run."""
        return Run(arguments, workdir, self._processes[0], self._devices)

    def run(self, arguments: list[str], workdir: Path) -> Run:
        """Starts one that may be hit."""
        count = self._rng.choice(self._processes)
        self.told = f"of {count} processes" if count > 1 else "of one process"
        return Run(arguments, workdir, count, self._devices)


def rehearse(args: argparse.Namespace) -> int:
    """Runs all, and says what happens; returns the exit status. Raises Failed."""
    arguments, workdir = args.arguments, args.workdir
    rng = random.Random(args.seed)
    straight, killed = workdir / "straight", workdir / "killed"
    for folder in (straight, killed):
        if folder.exists():
            raise Failed(f"--workdir: there is {str(folder)!r} already; name another folder.", 2)
    workdir.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(args.processes, args.devices, rng)
    try:
        with cluster.first(arguments, straight) as run:
            pace = run_through(run)
            print(f"straight through: {pace.steps} steps in {run.seconds():.1f} s", flush=True)
    except Failed as error:
        raise Failed(str(error), 2) from error
    signals = [signal.Signals[f"SIG{name}"] for name in args.signals]
    hits = list(blows(args.kills, pace, rng, signals))
    done = kill_and_resume(arguments, killed, hits, cluster, pace)
    # By a process of its own: this one leaves the devices to the runs.
    compare = [sys.executable, str(ROOT / "tools" / "compare_runs.py"), str(straight), str(killed)]
    if len(set(args.processes)) > 1:
        compare.append(f"--only_losses_within={TOLERANCE}")
    code = subprocess.call(compare, env=_environment("", 1, 0, 0))
    if done < args.kills:
        raise Failed(
            f"the run ended after {done} of {args.kills} kills; make it longer, or ask for fewer.",
            code or 1,
        )
    return code


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 the same, 1 not, 2 it could not be tried."""
    args = _parse(argv)
    try:
        return rehearse(args)
    except (Failed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", 2)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5, help="how often; default: 5")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments; default: 0")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1],
        help="of a cluster on this machine; of several numbers each start draws one; default: 1",
    )
    parser.add_argument(
        "--devices", type=int, default=0, help="virtual CPU devices of each process"
    )
    parser.add_argument(
        "--signals",
        nargs="+",
        choices=("KILL", "TERM"),
        default=["KILL"],
        help="that are drawn from; default: KILL",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="a new folder for both runs")
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="-- ARGUMENT",
        help="of cap_pretrain.main, without --workdir",
    )
    args = parser.parse_args(argv)
    if any(argument.startswith("--workdir") for argument in args.arguments):
        parser.error("--workdir goes before the --; the runs get folders of their own in it.")
    return args


if __name__ == "__main__":
    sys.exit(main())
