"""Run the trials of a sweep, report their status, and tabulate or plot their results.

    python tools/sweep.py run configs/sweeps/recurrent.py:size=toy --out runs/sweep --slots 2
    python tools/sweep.py status runs/sweep
    python tools/sweep.py table runs/sweep --figures val/loss:min scores/CIDEr --sort val/loss:min
    python tools/sweep.py table runs/sweep --figures val/loss:min --pivot optim.lr learner.layers
    python tools/sweep.py plot runs/sweep --x parameters --y val/loss --by objective --out loss.svg

`run` starts each trial in OUT/TRIAL, with its output in log.txt. The same command resumes a sweep:
finished trials are skipped, interrupted ones resume exactly. Overrides after `--`, such as
--config.seed=1, apply to all trials. --print prints the command of each, to run it on a cluster.
`table` shows metrics of metrics.jsonl: the last value, or the best with ":min" or ":max"; 1-NAME is
the error of an accuracy, as in 1-accuracy/top1. `plot` draws a metric against parameters,
parameters/PART, examples, flops or any numeric field on logarithmic axes, and fits the power law y
= a x^-b, or y = a x^-b + c with --offset; bands are 95% intervals from the fit's covariance. Exit
status: 0 done; 1 trials failed after all retries; 2 the user's mistake; 143 stopped by SIGTERM
after all trials saved a checkpoint (130 by Ctrl-C).
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cap_pretrain.cli import arguments, figures
from cap_pretrain.errors import UserError
from cap_pretrain.sweeps import power_law, results, runner, trials
from cap_pretrain.sweeps.trials import Trial
from cap_pretrain.telemetry import tables
from cap_pretrain.telemetry.progress import format_duration
from cap_pretrain.telemetry.tables import format_table


def run(args: argparse.Namespace) -> int:
    """Run the unfinished trials, or print their commands."""
    extra = trials.parse_overrides(args.extra)
    everything = trials.load(args.sweep, extra)
    chosen = trials.matching(everything, args.only)
    with runner.lock(args.out) as lock_file:
        trials.prepare(everything, args.out)
        if not args.print:
            options = dict(slots=args.slots, retries=args.retries, program=runner.PROGRAM, say=_say)
            return runner.run(chosen, args.out, lock_file, **options)
        for trial in chosen:
            command = ["python", "-m", "cap_pretrain.main", *trial.arguments(args.out / trial.name)]
            print(shlex.join(command))
    return 0


def status(args: argparse.Namespace) -> int:
    """Print one line per trial."""
    running = runner.is_locked(args.out)
    rows: list[tuple[str, ...]] = []
    count: dict[str, int] = {}
    for trial in _trials(args):
        now = results.status(trial, args.out, running)
        count[now.state] = count.get(now.state, 0) + 1
        step = f"{now.step:,} of {now.total:,}" if now.total else f"{now.step:,}"
        left = "" if now.left_s is None else format_duration(now.left_s)
        rows.append((trial.name, now.state, step if now.step else "", left, now.reason))
    print(format_table(rows, ("trial", "state", "step", "time left", "reason")))
    print(", ".join(f"{number} {state}" for state, number in count.items()))
    return 0


def table(args: argparse.Namespace) -> int:
    """Print metrics of the trials, sorted, or one metric by two fields."""
    rows = results.rows(_trials(args), args.out, args.figures)
    if args.sort:
        rows = results.ordered(rows, args.sort)
    if args.pivot:
        if len(args.figures) > 1:
            raise UserError("--pivot: shows one metric; name only one in --figures.")
        down, across = args.pivot
        rows = results.pivot(rows, down, across, args.figures[0])
    print(tables.written(rows, args.format))
    return 0


def plot(args: argparse.Namespace) -> int:
    """Plot a metric with a fitted power law and its band for each group."""
    figures.check_name(args.file)
    chosen = _trials(args)
    points: dict[str, list[tuple[float, float]]] = {}
    for trial, row in zip(chosen, results.rows(chosen, args.out, [args.y]), strict=True):
        if row[args.y] is not None:
            for field in args.by:
                if field not in trial.fields:
                    raise UserError(f"--by: {trial.name} has no field {field!r}.")
            group = " ".join(f"{trial.fields[field]}" for field in args.by)
            points.setdefault(group, []).append((_x(trial, args), row[args.y]))
    laws = {}
    for group, xy in points.items():
        try:
            fitted = power_law.frontier(xy) if args.frontier else xy
            laws[group] = power_law.fit(*np.array(fitted).T, offset=args.offset)
            print(f"{group or args.y}: {laws[group]}")
        except UserError as error:
            print(f"{group or args.y}: no power law: {error}")
    figures.save(draw(points, laws, args.x, args.y), args.file)
    print(f"wrote {args.file}")
    return 0


def _x(trial: Trial, args: argparse.Namespace) -> float:
    value = trial.fields.get(args.x)
    if value is None:
        costs = results.costs(args.out / trial.name)
        if args.x not in costs:
            choices = ", ".join([*costs, *trial.fields])
            raise UserError(f"--x: there is no {args.x!r}. Choose from: {choices}.")
        return costs[args.x]
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"--x: {args.x} of {trial.name} is {value!r}, not a number.") from error


def draw(
    points: dict[str, list[tuple[float, float]]],
    laws: dict[str, power_law.PowerLaw],
    x_name: str,
    y_name: str,
) -> Any:
    """Return a figure of each group's points (x, y), power law, if fitted, and 95% band."""
    figure = figures.new_figure(7, 5)
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_yscale("log")
    for number, (group, xy) in enumerate(points.items()):
        x, y = np.array(xy).T
        color, label = f"C{number}", group or y_name
        if law := laws.get(group):
            grid = np.geomspace(x.min(), x.max(), 100)
            axis.plot(grid, law(grid), color=color)
            if np.isfinite(law.spread):
                axis.fill_between(grid, *law.band(grid), color=color, alpha=0.15, linewidth=0)
            offset = f" + {law.c:.3g}" if len(law.covariance) == 3 else ""
            label += f": {law.a:.3g} x^{-law.b:.3g}{offset}"
        axis.scatter(x, y, s=20, color=color, label=label)
    every = [y for xy in points.values() for _, y in xy]
    axis.set_ylim(0.9 * min(every), 1.1 * max(every))
    for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatter(lambda y, _: f"{y:g}")
    axis.set_xlabel(x_name)
    axis.set_ylabel(y_name)
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize=8)
    return figure


def _trials(args: argparse.Namespace) -> Sequence[Trial]:
    return trials.matching(trials.read(args.out), args.only)


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    args = _parse(argv)
    return arguments.run(args.command, args)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = arguments.documented_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="run|status|table|plot")

    def add(command: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("--only", default="*", metavar="PATTERN", help="trial names, as b=32_*")
        return sub

    sub = add(run)
    sub.add_argument("sweep", help="configs/sweeps/NAME.py[:key=value,…]")
    sub.add_argument("--out", required=True, type=Path, help="folder of the sweep")
    sub.add_argument(
        "--slots", type=arguments.positive_int, default=1, help="parallel trials; default: 1"
    )
    sub.add_argument(
        "--retries", type=int, default=2, help="restarts of a trial that crashes; default: 2"
    )
    sub.add_argument("--print", action="store_true", help="print commands, start nothing")
    for command in (status, table, plot):
        sub = add(command)
        sub.add_argument("out", type=Path, metavar="DIR", help="folder of the sweep")
        if command is table:
            sub.add_argument("--figures", nargs="+", required=True, help="NAME[:min|max|last] …")
            sub.add_argument("--sort", metavar="COLUMN", help='"-COLUMN" is descending')
            sub.add_argument("--pivot", nargs=2, metavar=("DOWN", "ACROSS"), help="two fields")
            sub.add_argument("--format", choices=tables.FORMATS, default="text")
        if command is plot:
            sub.add_argument("--x", required=True, help="parameters, examples, flops or a field")
            sub.add_argument("--y", required=True, help="metric: NAME[:min|max|last]")
            sub.add_argument("--by", nargs="+", default=[], help="fields to group trials by")
            sub.add_argument("--offset", action="store_true", help="also fit an irreducible term")
            frontier = "fit only the lower envelope: points with no better one at smaller x"
            sub.add_argument("--frontier", action="store_true", help=frontier)
            sub.add_argument("--out", dest="file", required=True, type=Path, help="*.png or *.svg")
    args = parser.parse_args(argv[:cut])
    args.extra = argv[cut + 1 :]
    if args.extra and args.command is not run:
        parser.error("only run takes arguments after --.")
    return args


if __name__ == "__main__":
    sys.exit(main())
