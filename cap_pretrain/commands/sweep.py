"""Run the trials of a sweep, report their status, and tabulate or plot their results.

    cap sweep run configs/sweeps/recurrent.py:size=toy --out runs/sweep --slots 2
    cap sweep status runs/sweep
    cap sweep table runs/sweep --figures val/loss:min scores/CIDEr --sort val/loss:min
    cap sweep table runs/sweep --figures val/loss:min --pivot optim.lr learner.layers
    cap sweep table runs/sweep --figures val/loss linear_probe/top1 --over seed
    cap sweep plot runs/sweep --x parameters --y val/loss --by objective --out loss.svg
    cap sweep plot runs/sweep --pivot optim.lr batch_size --y val/loss:min --out a.png
    cap sweep plot runs/sweep --x model.keep_tokens --y val/loss --y linear_probe/top1 --out b.png

`run` starts each trial in OUT/TRIAL, with its output in log.txt. The same command resumes a sweep:
finished trials are skipped, interrupted ones resume exactly. Overrides after `--`, such as
--config.seed=1, apply to all trials. --print prints the command of each, to run it on a cluster.
`table` shows metrics of metrics.jsonl: the last value, or the best with ":min" or ":max"; 1-NAME is
the error of an accuracy, as in 1-accuracy/top1. --over seed shows means and standard deviations
over seeds. `plot` draws metrics, one in each panel, against parameters, parameters/PART, examples,
flops or any numeric field. Where x is a scale and has enough different values, it fits the power
law y = a x^-b, or y = a x^-b + c with --offset, on logarithmic axes; bands are 95% intervals from
the fit's covariance. Other points, as over learning rates, are joined by lines through their means.
`plot --pivot` draws a heat map over two fields, one for each value of the others. Exit status: 0
done; 1 trials failed after all retries; 2 the user's mistake; 75 the bucket of OUT could not be
reached; 143 stopped by SIGTERM after all trials saved a checkpoint (130 by Ctrl-C).
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from cap_pretrain.cli import arguments, figures
from cap_pretrain.errors import UserError
from cap_pretrain.sweeps import power_law, results, runner, trials
from cap_pretrain.sweeps.results import Row
from cap_pretrain.sweeps.trials import Trial
from cap_pretrain.telemetry import tables
from cap_pretrain.telemetry.progress import format_duration
from cap_pretrain.telemetry.tables import format_table

# What a loss can follow a power law of; parameters/PART as well.
SCALES = ("parameters", "examples", "flops", "total_examples", "total_steps", "total_epochs")
MIN_POINTS = 5  # of fewer points, the 95% band of an exponent is often wider than the exponent
WIDE = 10.0  # largest over smallest value that a linear axis still shows well
LUMA = (0.299, 0.587, 0.114)  # brightness of red, green and blue (ITU-R BT.601)


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
    names = list(dict.fromkeys(args.figures))
    rows = results.rows(_trials(args), args.out, names)
    if args.over:
        rows = results.over(rows, args.over, names)
    if args.sort:
        rows = results.ordered(rows, args.sort)
    if args.over and args.format in ("text", "markdown"):
        for row, name in itertools.product(rows, names):
            row[name] = tables.spread(row[name], row.pop(f"{name} sd"))
            if (count := row.pop(f"{name} n")) not in (0, row["trials"]):
                row[name] += f" (of {count})"
    if args.pivot:
        if len(names) > 1:
            raise UserError("--pivot: shows one metric; name only one in --figures.")
        if args.over:
            raise UserError("--over: --pivot shows means over seeds already; drop one of the two.")
        down, across = args.pivot
        rows = results.pivot(rows, down, across, names[0])
    print(tables.written(rows, args.format))
    return 0


def plot(args: argparse.Namespace) -> int:
    """Plot a metric: as heat maps over two fields, or over one x with lines or power laws."""
    figures.check_name(args.file)
    chosen = _trials(args)
    if args.pivot:
        figure = _heat_maps(chosen, args)
    elif args.x:
        figure = _curves(chosen, args)
    else:
        raise UserError("plot: needs --x, or --pivot for a heat map.")
    figures.save(figure, args.file)
    print(f"wrote {args.file}")
    return 0


def _curves(chosen: Sequence[Trial], args: argparse.Namespace) -> Any:
    """Return a figure with a panel for each metric, as `draw` makes it; report power laws."""
    rows = results.rows(chosen, args.out, args.y)
    for trial, field in itertools.product(chosen, args.by):
        if field not in trial.fields:
            raise UserError(f"--by: {trial.name} has no field {field!r}.")
    size = (7, 5) if len(args.y) == 1 else (4 * len(args.y), 4)
    figure = figures.new_figure(*size)
    panels = figure.subplots(1, len(args.y), squeeze=False).flat
    for axis, name in zip(panels, args.y, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for trial, row in zip(chosen, rows, strict=True):
            if row[name] is not None:
                group = " ".join(f"{trial.fields[field]}" for field in args.by)
                points.setdefault(group, []).append((_x(trial, args), row[name]))
        if not points:
            raise UserError(f"--y: no trial has {name} yet.")
        draw(axis, points, _laws(points, name, args), args.x, name)
    return figure


def _laws(
    points: dict[str, list[tuple[float, float]]], name: str, args: argparse.Namespace
) -> dict[str, power_law.PowerLaw]:
    """Return the power law of each group that has one, and report all groups."""
    laws = {}
    for group, xy in points.items():
        label = f"{name} {group}".rstrip()
        try:
            fitted = power_law.frontier(xy) if args.frontier else xy
            _check_scales(args.x, fitted, args.min_points)
            laws[group] = power_law.fit(*np.array(fitted).T, offset=args.offset)
            print(f"{label}: {laws[group]}")
        except UserError as error:
            print(f"{label}: no power law: {error}")
    return laws


def _check_scales(x_name: str, points: Sequence[tuple[float, float]], least: int) -> None:
    """Raise UserError unless a power law of these points (x, y) can mean something."""
    scales = x_name in SCALES or x_name.startswith("parameters/")
    if not scales:
        raise UserError(
            f"{x_name} is a setting with a best value, not a scale such as {', '.join(SCALES[:3])}."
        )
    different = len({x for x, _ in points})
    if different < least:
        raise UserError(f"{different} different x are too few; --min_points is {least}.")


def _heat_maps(chosen: Sequence[Trial], args: argparse.Namespace) -> Any:
    """Return a figure with a heat map for each combination of the fields besides the two."""
    if len(args.y) > 1:
        raise UserError("--pivot: shows one metric; name only one in --y.")
    (metric,) = args.y
    down, across = args.pivot
    rows = results.pivot(results.rows(chosen, args.out, args.y), down, across, metric)
    names = [name for name in rows[0] if name.startswith(f"{across}=")]
    others = [name for name in rows[0] if name not in (*names, down)]
    maps: dict[str, list[Row]] = {}
    for row in rows:
        maps.setdefault("  ".join(f"{name}={row[name]}" for name in others), []).append(row)
    every = [row[name] for row in rows for name in names if row[name] is not None]
    if not every:
        raise UserError(f"--y: no trial has {metric} yet.")
    best = max if metric.endswith(":max") else min
    columns = min(len(maps), 3)
    tall = -(-len(maps) // columns)
    height = max(len(part) for part in maps.values()) * 0.45 + 1.2
    figure = figures.new_figure(columns * (len(names) * 0.75 + 1.2) + 1, tall * height)
    axes = figure.subplots(tall, columns, squeeze=False)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    for axis, (title, part) in zip(axes.flat, maps.items(), strict=False):
        values = np.array([[row[name] for name in names] for row in part], np.float64)
        shown = axis.imshow(
            values,
            "viridis_r" if best is min else "viridis",
            vmin=min(every),
            vmax=max(every),
            aspect="auto",
        )
        _annotate(axis, shown, values, best(every))
        axis.set_xticks(range(len(names)), [name.removeprefix(f"{across}=") for name in names])
        axis.set_yticks(range(len(part)), [f"{row[down]}" for row in part])
        axis.set_xlabel(across)
        axis.set_ylabel(down)
        axis.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes, label=metric)
    return figure


def _annotate(axis: Any, shown: Any, values: np.ndarray, best: float) -> None:
    """Write values into the cells of a heat map `shown`, and draw a box around the best."""
    rectangle = figures.imported("matplotlib.patches").Rectangle
    centered = dict(ha="center", va="center", fontsize=8)
    for (y, x), value in np.ndenumerate(values):
        if np.isnan(value):
            axis.text(x, y, "–", **centered)
            continue
        bright = np.dot(shown.cmap(shown.norm(value))[:3], LUMA) > 0.5
        text = axis.text(x, y, f"{value:.3g}", color="black" if bright else "white", **centered)
        if value == best:
            text.set_weight("bold")
            box = (x - 0.48, y - 0.46), 0.96, 0.92
            axis.add_patch(rectangle(*box, fill=False, edgecolor="red", linewidth=2))


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
    axis: Any,
    points: dict[str, list[tuple[float, float]]],
    laws: dict[str, power_law.PowerLaw],
    x_name: str,
    y_name: str,
) -> None:
    """Draw each group's points (x, y), with its power law and 95% band.

    A group without a law has a line through the mean of the points at each x. The axes hold points,
    curves and bands. They are logarithmic for power laws and for positive values of which one is
    `WIDE` times another, so that a curve over shares or accuracies is not bent.
    """
    every = np.concatenate([np.array(xy) for xy in points.values()])
    for scale, values in zip((axis.set_xscale, axis.set_yscale), every.T, strict=True):
        wide = laws or values.max() >= WIDE * values.min()
        scale("log" if values.min() > 0 and wide else "linear")
    held = []
    for number, (group, xy) in enumerate(points.items()):
        x, y = np.array(xy).T
        color, label = f"C{number}", group
        held.append(y)
        if law := laws.get(group):
            grid = np.geomspace(x.min(), x.max(), 100)
            axis.plot(grid, law(grid), color=color)
            held.append(law(grid))
            if np.isfinite(law.spread):
                low, high = law.band(grid)
                axis.fill_between(grid, low, high, color=color, alpha=0.15, linewidth=0)
                held += [low, high]
            offset = f" + {law.c:.3g}" if len(law.covariance) == 3 else ""
            label = f"{label}: {law.a:.3g} x^{-law.b:.3g}{offset}".removeprefix(": ")
        else:
            steps = np.unique(x)
            axis.plot(steps, [y[x == step].mean() for step in steps], color=color, alpha=0.6)
        axis.scatter(x, y, s=20, color=color, label=label)
    _fit_y(axis, np.concatenate(held))
    axis.set_xlabel(x_name)
    axis.set_ylabel(y_name)
    axis.grid(True, which="both", alpha=0.2)
    if laws or any(points):
        axis.legend(fontsize=8)


def _fit_y(axis: Any, values: np.ndarray) -> None:
    """Let the y axis hold the values, and label both axes with plain numbers."""
    low, high = values.min(), values.max()
    if axis.get_yscale() == "log":
        axis.set_ylim(low / 1.1, high * 1.1)
    else:
        margin = 0.05 * (high - low) or 1.0
        axis.set_ylim(low - margin, high + margin)
    ticker = figures.imported("matplotlib.ticker")
    for own in (axis.xaxis, axis.yaxis):
        if own.get_scale() == "log":
            own.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
            own.set_minor_locator(ticker.LogLocator(subs=range(1, 10), numticks=99))
            own.set_minor_formatter(ticker.NullFormatter())
        own.set_major_formatter(lambda value, _: f"{value:g}")


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

    where = "folder of the sweep, or gs://BUCKET/FOLDER"
    sub = add(run)
    sub.add_argument("sweep", help="configs/sweeps/NAME.py[:key=value,…]")
    sub.add_argument("--out", required=True, type=arguments.run_path, help=where)
    sub.add_argument(
        "--slots", type=arguments.positive_int, default=1, help="parallel trials; default: 1"
    )
    sub.add_argument(
        "--retries", type=int, default=2, help="restarts of a trial that crashes; default: 2"
    )
    sub.add_argument("--print", action="store_true", help="print commands, start nothing")
    for command in (status, table, plot):
        sub = add(command)
        sub.add_argument("out", type=arguments.run_path, metavar="DIR", help=where)
        if command is table:
            sub.add_argument("--figures", nargs="+", required=True, help="NAME[:min|max|last] …")
            sub.add_argument("--sort", metavar="COLUMN", help='"-COLUMN" is descending')
            sub.add_argument("--pivot", nargs=2, metavar=("DOWN", "ACROSS"), help="two fields")
            over = "mean ± standard deviation of trials that differ only in this field, as seed"
            sub.add_argument("--over", metavar="FIELD", help=over)
            sub.add_argument("--format", choices=tables.FORMATS, default="text")
        if command is plot:
            sub.add_argument("--x", help="parameters, examples, flops or a field")
            sub.add_argument(
                "--pivot", nargs=2, metavar=("DOWN", "ACROSS"), help="heat map over two fields"
            )
            sub.add_argument(
                "--y",
                action="append",
                required=True,
                metavar="METRIC",
                help="NAME[:min|max|last]; several times for several panels",
            )
            sub.add_argument("--by", nargs="+", default=[], help="fields to group trials by")
            sub.add_argument("--offset", action="store_true", help="also fit an irreducible term")
            frontier = "fit only the lower envelope: points with no better one at smaller x"
            sub.add_argument("--frontier", action="store_true", help=frontier)
            sub.add_argument(
                "--min_points",
                type=arguments.positive_int,
                default=MIN_POINTS,
                help=f"different x that a power law is fitted to at least; default: {MIN_POINTS}",
            )
            local = arguments.local_path
            sub.add_argument("--out", dest="file", required=True, type=local, help="*.png or *.svg")
    args = parser.parse_args(argv[:cut])
    args.extra = argv[cut + 1 :]
    if args.extra and args.command is not run:
        parser.error("only run takes arguments after --.")
    return args


if __name__ == "__main__":
    sys.exit(main())
