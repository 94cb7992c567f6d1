"""The evaluations of a run as tables, one row per evaluated step."""

import csv
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cap_pretrain import files
from cap_pretrain.telemetry.metrics import read_metrics
from cap_pretrain.telemetry.tables import markdown

Row = dict[str, float]


def evaluations(
    lines: Iterable[Mapping[str, Any]], names: Collection[str], epochs: Callable[[int], float]
) -> list[Row]:
    """Collect the metrics of the evaluators `names` from lines of metrics.jsonl, by step.

    Returns {"step": …, "epoch": …, "EVALUATOR/METRIC": …, …} for each evaluated step, ascending;
    `epochs` returns the epochs seen by a step.
    """
    rows: dict[int, Row] = {}
    for line in lines:
        found = {k: v for k, v in line.items() if k.partition("/")[0] in names}
        if found:
            step = int(line["step"])
            row = rows.setdefault(step, {"step": step, "epoch": round(epochs(step), 3)})
            row |= found
    return [rows[step] for step in sorted(rows)]


def keep(workdir: Path, names: Collection[str], epochs: Callable[[int], float]) -> list[Row]:
    """Write all evaluations of a run to evals/table.csv, and return them as `evaluations` does."""
    rows = evaluations(read_metrics(workdir), names, epochs)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(workdir / "evals" / "table.csv", text.getvalue())
    return rows


def tables(rows: Sequence[Row]) -> str:
    """Return a Markdown table for each evaluator that ran more than once."""
    names = dict.fromkeys(c.partition("/")[0] for row in rows for c in row if "/" in c)
    shown = []
    for name in names:
        columns = dict.fromkeys(c for row in rows for c in row if c.partition("/")[0] == name)
        own = [row for row in rows if columns.keys() & row.keys()]
        if len(own) < 2:
            continue
        head = ["step", "epoch", *(c.partition("/")[2] for c in columns)]
        cells = [[_written(row.get(c)) for c in ("step", "epoch", *columns)] for row in own]
        shown.append(f"{name}\n\n{markdown(head, cells)}")
    return "\n\n".join(shown)


def _written(value: float | None) -> str:
    return "" if value is None else f"{value:d}" if isinstance(value, int) else f"{value:.4g}"
