r"""Check that a run that is killed and resumed repeatedly ends exactly like an uninterrupted one.

    cap rehearse --kills 5 --workdir runs/rehearsal -- \
        --config=configs/pretrain.py:objective=cap,model=mu/8 --config.total_steps=200 …

Runs `python -m cap_pretrain.main` with the arguments after `--` twice: without interruption in
WORKDIR/straight, and in WORKDIR/killed, restarted after each SIGKILL: at random moments between
steps, while a checkpoint is being saved (a third) and during startup (a sixth). Logs are
WORKDIR/straight.log and WORKDIR/killed.log, of further processes WORKDIR/killed.1.log and so on.

--processes 2 runs a cluster of CPU processes, and --devices 2 gives each two virtual devices. A
kill then hits one or all, and the others must exit by themselves. With --processes 1 2 4, each
start draws the number of processes; --signals KILL TERM draws the signal. Finally
`cap compare` compares the runs: bit for bit, or, if the number of processes changed, losses
to a relative 1e-4 and, with --config.log.ids=True, the examples of each step.

Exit status: 0 the runs agree; 1 they differ, or there were too few kills, or processes were left
running; 2 the command does not run, or the user's mistake.
"""

import argparse
import dataclasses
import itertools
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cap_pretrain.cli import arguments
from cap_pretrain.cli.processes import Kill, LostHostError, RehearsalError, Run, environment

POLL = 0.003
"""Seconds between two looks at a run."""

MAX_LOST = 3
"""How often processes may lose each other without a kill, on a slow machine."""

TOLERANCE = 1e-4
"""Relative difference of losses with another number of processes, whose sums round differently."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """Timing of the uninterrupted run, in seconds."""

    steps: int  # its last step
    start: float  # until the first step was logged
    line: float  # median, between logged steps
    save: float  # of the fastest save


def run_through(run: Run) -> Pace:
    """Wait for the end of a run and return its timing."""
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
        raise RehearsalError("the run logged nothing or saved nothing: nothing to compare.", 2)
    times = list(logged.values())
    return Pace(
        steps=run.step(),
        start=times[0],
        line=statistics.median(b - a for a, b in itertools.pairwise([0.0, *times])),
        save=min(seen[-1] - seen[0] for seen in saves.values()),
    )


def plan_kills(
    kills: int, pace: Pace, rng: random.Random, signals: Sequence[signal.Signals] = ()
) -> Iterator[Kill]:
    """Yield kills at random moments, spread over a run."""
    saves, starts = round(kills / 3), round(kills / 6)
    kinds = ["save"] * saves + ["start"] * starts + ["step"] * (kills - saves - starts)
    rng.shuffle(kinds)
    # A start in the middle of a run may take longer, because it restores a checkpoint.
    longest = {"save": pace.save, "start": 1.2 * pace.start, "step": pace.line}
    for number, kind in enumerate(kinds):
        spacing = 0.9 * pace.steps / kills  # so that the run does not end before the last kill
        step, latest = int(spacing * (number + rng.random())), spacing * (number + 1.5)
        which = rng.choice(list(signals)) if signals else signal.SIGKILL
        seconds, everyone = rng.random() * longest[kind], rng.random() < 0.5
        yield Kill(kind, step, seconds, latest, which, everyone)


def wait_for(run: Run, kill: Kill) -> bool:
    """Wait for the moment of a kill; return False if the run ends before."""
    before, due = run.step(), None
    while not run.ended():
        step, saving = max(before, run.step()), run.saving()
        happened = {
            "start": True,
            "step": step > before and step >= kill.step,
            "save": bool(saving) and step >= kill.step,
        }
        if due is None and happened[kill.after]:
            due = run.seconds() + kill.seconds
        if (due is not None and run.seconds() >= due) or (step > before and step >= kill.latest):
            return True
        time.sleep(POLL)
    return False


class Cluster:
    """Starts runs with a number of processes drawn from `processes`, the first one unless killed.

    Each has `devices` virtual devices (0: the default). `alone` is whether there is always one
    process; `size` is the number of processes of the latest run, in words.
    """

    def __init__(self, processes: Sequence[int], devices: int, rng: random.Random):
        self._processes, self._devices, self._rng = processes, devices, rng
        self.alone = tuple(processes) == (1,)
        self.size = ""

    def first(self, command: list[str], workdir: Path) -> Run:
        """Start the uninterrupted run."""
        return Run(command, workdir, self._processes[0], self._devices)

    def run(self, command: list[str], workdir: Path) -> Run:
        """Start a run that may be killed."""
        count = self._rng.choice(self._processes)
        self.size = f"of {count} processes" if count > 1 else "of one process"
        return Run(command, workdir, count, self._devices)


def kill_and_resume(
    command: list[str], workdir: Path, kills: Sequence[Kill], cluster: Cluster, pace: Pace
) -> int:
    """Run with kills and return their number; raises RehearsalError if it does not resume."""
    done, lost = 0, 0
    while True:
        try:
            with cluster.run(command, workdir) as run:
                if done == len(kills):
                    while not run.ended():
                        time.sleep(POLL)
                    run.check_nothing_left()
                    return done
                kill, before = kills[done], run.step()
                if not wait_for(run, kill):
                    return done
                after, saving = run.seconds(), sorted(run.saving())
                run.kill(kill)
                done += 1
                if saving := saving or sorted(run.saving()):
                    doing = f"while saving step {saving[0].partition('.')[0]}"
                elif run.step() > before:
                    doing = "between saves"
                else:
                    doing = "starting, or repeating steps"
                whom = "" if cluster.alone else f" {cluster.size} ({kill})"
                print(
                    f"kill {done} of {len(kills)}{whom}: at step {run.step()} of {pace.steps}, "
                    f"{doing}, {after:.1f} s after its start",
                    flush=True,
                )
                run.check_nothing_left()
        except LostHostError as error:
            lost += 1
            if lost > MAX_LOST:
                raise
            print(f"restarted: {str(error).splitlines()[1]}", flush=True)


def rehearse(args: argparse.Namespace) -> int:
    """Run everything, report progress and return the exit status; may raise RehearsalError."""
    command, workdir = args.arguments, args.workdir
    rng = random.Random(args.seed)
    straight, killed = workdir / "straight", workdir / "killed"
    for folder in (straight, killed):
        if folder.exists():
            raise RehearsalError(f"--workdir: {str(folder)!r} exists; name another folder.", 2)
    workdir.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(args.processes, args.devices, rng)
    try:
        with cluster.first(command, straight) as run:
            pace = run_through(run)
            print(f"straight through: {pace.steps} steps in {run.seconds():.1f} s", flush=True)
    except RehearsalError as error:
        raise RehearsalError(str(error), 2) from error
    signals = [signal.Signals[f"SIG{name}"] for name in args.signals]
    kills = list(plan_kills(args.kills, pace, rng, signals))
    done = kill_and_resume(command, killed, kills, cluster, pace)
    # In a subprocess, because this process leaves the devices to the runs.
    program = "cap_pretrain.commands.compare_runs"
    compare = [sys.executable, "-m", program, str(straight), str(killed)]
    if len(set(args.processes)) > 1:
        compare.append(f"--only_losses_within={TOLERANCE}")
    code = subprocess.call(compare, env=environment())
    if done < args.kills:
        raise RehearsalError(
            f"the run ended after {done} of {args.kills} kills; use a longer run or fewer kills.",
            code or 1,
        )
    return code


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    args = _parse(argv)
    try:
        return rehearse(args)
    except (RehearsalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", 2)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--kills", type=int, default=5, help="number of kills; default: 5")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments; default: 0")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1],
        help="processes on this machine; each start draws from several numbers; default: 1",
    )
    parser.add_argument(
        "--devices", type=int, default=0, help="virtual CPU devices of each process"
    )
    parser.add_argument(
        "--signals",
        nargs="+",
        choices=("KILL", "TERM"),
        default=["KILL"],
        help="signals to draw from; default: KILL",
    )
    parser.add_argument(
        "--workdir", required=True, type=arguments.local_path, help="new folder for both runs"
    )
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="-- ARGUMENT",
        help="arguments of cap_pretrain.main, without --workdir",
    )
    args = parser.parse_args(argv)
    if any(argument.startswith("--workdir") for argument in args.arguments):
        parser.error("--workdir goes before the --; each run gets a folder in it.")
    return args


if __name__ == "__main__":
    sys.exit(main())
