"""Rehearses the worst: a run that is killed at any moment, again and again, goes on exactly.

    python tools/kill_and_resume.py --kills 5 --workdir runs/rehearsal -- \\
        --config=configs/pretrain.py:objective=cap,model=mu/8 --config.total_steps=200 …

Runs `python -m cap_pretrain.main` with the arguments after `--` twice: straight through in
WORKDIR/straight, and in WORKDIR/killed, where SIGKILL ends it at random moments: between steps,
while a checkpoint is being saved (a third), while it starts (a sixth). Each time it is started
again. What it printed is in WORKDIR/straight.log and WORKDIR/killed.log.

At the end tools/compare_runs.py compares the two. Exit status: 0 the same; 1 not, or not killed as
often as asked, or processes left behind; 2 the command does not run, or the user's mistake.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds between two looks at what a run does.
POLL = 0.003
# Seconds that the worker processes of a killed run may take to notice.
GRACE = 20


class Failed(Exception):
    """The rehearsal ends here; the message says why, `code` is the exit status."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class Run:
    """One process of the training program, and what its workdir shows of it.

    A context manager: nothing of it runs any more afterwards.
    """

    def __init__(self, arguments: list[str], workdir: Path):
        self._workdir = workdir
        self._log = workdir.with_name(workdir.name + ".log")
        self._of_earlier_runs = self._temporary_folders()
        self._began = time.monotonic()
        command = [sys.executable, "-m", "cap_pretrain.main", *arguments, f"--workdir={workdir}"]
        with self._log.open("ab") as log:
            # In a session of its own, its worker processes can be told from others.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def ended(self) -> bool:
        """Whether it has come to its end; raises Failed if that was not the end it should have."""
        code = self._process.poll()
        if code:
            last = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-2:]
            said = "\n".join(last)
            raise Failed(f"a run ended with exit status {code} ({self._log}):\n{said}")
        return code is not None

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

    def kill(self) -> None:
        """SIGKILL, to the main process alone."""
        self._process.kill()
        self._process.wait()

    def check_nothing_left(self) -> None:
        """Raises Failed unless the worker processes of an ended run end as well."""
        deadline = time.monotonic() + GRACE
        while left := _running(self._process.pid):
            if time.monotonic() > deadline:
                raise Failed(f"processes {left} were still running {GRACE} s after the run.")
            time.sleep(0.05)

    def _temporary_folders(self) -> set[str]:
        folders = (self._workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
        return {folder.name for folder in folders}


def _environment() -> dict[str, str]:
    """What is rehearsed is the code beside this file, installed or not."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


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
class Moment:
    """When to kill: so many seconds after something has happened, once a step was reached.

    Attributes:
      after: "start" of the process, a "step" that the run has not done before, or the beginning
        of a "save".
      step: the step; it does not matter for "start".
      seconds: how long to wait then.
    """

    after: str
    step: int
    seconds: float


def moments(kills: int, pace: Pace, rng: random.Random) -> Iterator[Moment]:
    """Yields random moments, spread over a run."""
    saves, starts = round(kills / 3), round(kills / 6)
    kinds = ["save"] * saves + ["start"] * starts + ["step"] * (kills - saves - starts)
    rng.shuffle(kinds)
    # A start that begins in the middle of a run may take longer: it restores.
    longest = {"save": pace.save, "start": 1.2 * pace.start, "step": pace.line}
    for number, kind in enumerate(kinds):
        # The last tenth of the run is left, so that it does not end before its last kill.
        step = int(0.9 * pace.steps * (number + rng.random()) / kills)
        yield Moment(kind, step, rng.random() * longest[kind])


def wait_for(run: Run, moment: Moment) -> bool:
    """Waits until it is time to kill a run; returns False if it has ended before."""
    before, due = run.step(), None
    while not run.ended():
        step, saving = max(before, run.step()), run.saving()
        happened = {
            "start": True,
            "step": step > before and step >= moment.step,
            "save": bool(saving) and step >= moment.step,
        }
        if due is None and happened[moment.after]:
            due = run.seconds() + moment.seconds
        if due is not None and run.seconds() >= due:
            return True
        time.sleep(POLL)
    return False


def kill_and_resume(arguments: list[str], workdir: Path, kills: int, pace: Pace, seed: int) -> int:
    """Runs in `workdir` until it is done, killed on the way; returns how often that was.

    Raises:
      Failed: it did not go on, or worker processes stayed behind.
    """
    done = 0
    for moment in moments(kills, pace, random.Random(seed)):
        with Run(arguments, workdir) as run:
            before = run.step()
            if not wait_for(run, moment):
                return done
            after = run.seconds()
            run.kill()
            done += 1
            if saving := sorted(run.saving()):
                doing = f"while saving step {saving[0].partition('.')[0]}"
            elif run.step() > before:
                doing = "between saves"
            else:
                doing = "starting, or doing steps again"
            print(
                f"kill {done} of {kills}: at step {run.step()} of {pace.steps}, {doing}, "
                f"{after:.1f} s after its start",
                flush=True,
            )
            run.check_nothing_left()
    with Run(arguments, workdir) as run:
        while not run.ended():
            time.sleep(POLL)
        run.check_nothing_left()
    return done


def rehearse(arguments: list[str], workdir: Path, kills: int, seed: int) -> int:
    """Runs all, and says what happens; returns the exit status. Raises Failed."""
    straight, killed = workdir / "straight", workdir / "killed"
    for folder in (straight, killed):
        if folder.exists():
            raise Failed(f"--workdir: there is {str(folder)!r} already; name another folder.", 2)
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        with Run(arguments, straight) as run:
            pace = run_through(run)
            print(f"straight through: {pace.steps} steps in {run.seconds():.1f} s", flush=True)
    except Failed as error:
        raise Failed(str(error), 2) from error
    done = kill_and_resume(arguments, killed, kills, pace, seed)
    # By a process of its own: this one leaves the devices to the runs.
    compare = ROOT / "tools" / "compare_runs.py"
    code = subprocess.call(
        [sys.executable, str(compare), str(straight), str(killed)], env=_environment()
    )
    if done < kills:
        raise Failed(
            f"the run ended after {done} of {kills} kills; make it longer, or ask for fewer.",
            code or 1,
        )
    return code


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 the same, 1 not, 2 it could not be tried."""
    args = _parse(argv)
    try:
        return rehearse(args.arguments, args.workdir, args.kills, args.seed)
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
