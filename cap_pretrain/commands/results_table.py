r"""Print evaluation results of several runs as a Markdown table.

    cap results runs/cap runs/cappa runs/clip \
        --figures linear_probe/top1 retrieval/image_to_text_r1 order:composition/accuracy

A row is a run, local or in a bucket (gs://); a folder that is none stands for all runs below it.
RUN/checkpoints/STEP is the run at that step. A column is the newest EVALUATOR/METRIC of the run, or
FOLDER:EVALUATOR/METRIC of a run in a subfolder, empty if missing. --titles renames columns;
--percent prints percentages.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cap_pretrain.checkpoints.open import run_at
from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.evals.suite import newest_result
from cap_pretrain.telemetry import tables


class Row(NamedTuple):
    """A row of the table: its name, the workdir of a run, and a step, None for the newest."""

    name: str
    folder: Path
    step: int | None


def rows_of(given: Sequence[str], columns: Sequence[str]) -> list[Row]:
    """Return the runs of a table; a folder that is none stands for the runs below it, by path.

    It stays one row if a column names a run in a subfolder, as FOLDER:EVALUATOR/METRIC, or if there
    are no runs below. Raises UserError if there is no such folder.
    """
    found: list[Row] = []
    for path in given:
        run = run_at(path)
        if not run.workdir.is_dir():
            raise UserError(f"{path}: there is no such folder.")
        name = run.workdir.name if run.step is None else f"{run.workdir.name}/{run.step}"
        below = [] if any(":" in column for column in columns) else list(_runs(run.workdir))
        if below in ([], [run.workdir]):
            found.append(Row(name, run.workdir, run.step))
        else:
            found += (Row(str(own.relative_to(run.workdir)), own, None) for own in below)
    return found


def _runs(folder: Path) -> Iterator[Path]:
    """Yield a folder if it is a run, else those below it, sorted; links are not followed."""
    if any((folder / name).exists() for name in ("evals", "metrics.jsonl", "checkpoints")):
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
            yield from _runs(child)


def look_up(runs: list[Row], column: str) -> list[float | None]:
    """Return `[FOLDER:]EVALUATOR/METRIC` by run, or None; raises UserError if no run has it."""
    folder, _, name = column.rpartition(":")
    evaluator, slash, metric = name.partition("/")
    if not slash:
        raise UserError(f"--figures: {column!r} is not of the form EVALUATOR/METRIC.")
    found = []
    for run in runs:
        _, result = newest_result(run.folder / folder, evaluator, run.step)
        found.append({k: v for k, v in result.items() if isinstance(v, int | float)})
    if not any(found):
        raise UserError(f"--figures: none of the runs has {column}; run its evaluator.")
    values = [metrics.get(metric) for metrics in found]
    if all(value is None for value in values):
        known = {key for metrics in found for key in metrics}
        raise UserError(
            f"--figures: {evaluator} has no metric {metric!r}.{did_you_mean(metric, known)}"
        )
    return values


def table(runs: list[Row], columns: list[str], titles: list[str], percent: bool) -> str:
    """Return a Markdown table, a row per run; columns and errors are those of `look_up`."""
    found = zip(*(look_up(runs, column) for column in columns), strict=True)

    def formatted(value: float | None) -> str:
        if value is None:
            return ""
        return f"{100 * value:.1f}" if percent else f"{value:.4g}"

    rows = [[run.name, *map(formatted, row)] for run, row in zip(runs, found, strict=True)]
    return tables.markdown(["", *titles], rows)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    parser = arguments.documented_parser(__doc__)
    what = "workdirs, checkpoints in them, or folders that contain some"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=what)
    parser.add_argument("--figures", nargs="+", required=True, help="[FOLDER:]EVALUATOR/METRIC …")
    parser.add_argument("--titles", nargs="+", help="column titles; default: as --figures")
    parser.add_argument("--percent", action="store_true", help="print fractions as percentages")
    return arguments.run(_run, parser.parse_args(argv), catch=(UserError,))


def _run(args: argparse.Namespace) -> int:
    titles = args.titles or args.figures
    if len(titles) != len(args.figures):
        raise UserError(f"--titles: {len(titles)} titles for {len(args.figures)} metrics.")
    runs = rows_of(args.runs, args.figures)
    print(table(runs, args.figures, titles, args.percent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
