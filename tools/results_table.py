r"""Puts what evaluators found in several runs side by side, as a Markdown table.

    python tools/results_table.py runs/cap runs/cappa runs/clip \\
        --figures linear_probe/top1 retrieval/image_to_text_r1 order:composition/accuracy

A row is a folder. A column is EVALUATOR/FIGURE of the run in it, or FOLDER:EVALUATOR/FIGURE of one
in a folder below; the newest result counts. `--titles` names the columns otherwise. What a run has
not is left empty. Figures are per cent with --percent, else as they are.
"""

import argparse
import json
import sys
from pathlib import Path

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.telemetry import tables


def newest_result(workdir: Path, evaluator: str) -> dict:
    """What an evaluator found last in a run; empty if it did not run.

    Raises:
      UserError: its result cannot be read.
    """
    folder = workdir / "evals" / evaluator
    steps = [path for path in folder.glob("*.json") if path.stem.isdecimal()]
    if not steps:
        return {}
    path = max(steps, key=lambda path: int(path.stem))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the evaluator again.") from error


def look_up(runs: list[Path], column: str) -> list[float | None]:
    """The figure that `[FOLDER:]EVALUATOR/FIGURE` names in each run; None where there is none.

    Raises:
      UserError: no run has it, or `column` is not of this form.
    """
    below, _, name = column.rpartition(":")
    evaluator, slash, figure = name.partition("/")
    if not slash:
        raise UserError(f"--figures: {column!r} is not of the form EVALUATOR/FIGURE.")
    found = []
    for run in runs:
        result = newest_result(run / below, evaluator)
        found.append({k: v for k, v in result.items() if isinstance(v, int | float)})
    if not any(found):
        raise UserError(f"--figures: none of the runs has {column}; run its evaluator.")
    values = [figures.get(figure) for figures in found]
    if all(value is None for value in values):
        there = {key for figures in found for key in figures}
        raise UserError(
            f"--figures: {evaluator} has no figure {figure!r}.{did_you_mean(figure, there)}"
        )
    return values


def table(runs: list[Path], columns: list[str], titles: list[str], percent: bool) -> str:
    """The figures in Markdown, a run a row.

    Raises:
      UserError: as `look_up`.
    """
    found = zip(*(look_up(runs, column) for column in columns), strict=True)

    def written(value: float | None) -> str:
        if value is None:
            return ""
        return f"{100 * value:.1f}" if percent else f"{value:.4g}"

    rows = [[run.name, *map(written, row)] for run, row in zip(runs, found, strict=True)]
    return tables.markdown(["", *titles], rows)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake."""
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or above such")
    parser.add_argument("--figures", nargs="+", required=True, help="[FOLDER:]EVALUATOR/FIGURE …")
    parser.add_argument("--titles", nargs="+", help="of the columns; default: as --figures")
    parser.add_argument("--percent", action="store_true", help="figures are shares; print per cent")
    args = parser.parse_args(argv)
    try:
        titles = args.titles or args.figures
        if len(titles) != len(args.figures):
            raise UserError(f"--titles: {len(titles)} for {len(args.figures)} figures.")
        for run in args.runs:
            if not run.is_dir():
                raise UserError(f"{run}: there is no such folder.")
        print(table(args.runs, args.figures, titles, args.percent))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
