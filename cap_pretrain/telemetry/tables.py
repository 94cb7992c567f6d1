"""Formatting tables as aligned text, Markdown, CSV or JSON."""

import csv
import io
import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cap_pretrain import untrusted

Row = Mapping[str, Any]
"""Column -> value."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are already text."""
    cells = [header, ["---"] * len(header), *rows]
    cells = [[untrusted.printable(cell).replace("|", r"\|") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def written(rows: Sequence[Row], form: str) -> str:
    """Return a table in one of `FORMATS`; numbers have four digits in "text" and "markdown".

    The columns are those of all rows, in order of first appearance. Missing values are left empty.
    """
    return FORMATS[form](list(dict.fromkeys(column for row in rows for column in row)), rows)


def _cell(value: Any) -> str:
    """Return a value as text, floats with four digits."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spread(mean: float | None, deviation: float | None) -> str:
    """Return "mean ± deviation" with two digits of the deviation, or the mean if that is None."""
    if mean is None or not deviation or not math.isfinite(deviation):
        return _cell(mean)
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _text(columns: Sequence[str], rows: Sequence[Row]) -> str:
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    return format_table(cells, columns)


def _markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    return markdown(columns, [[_cell(row.get(column)) for column in columns] for row in rows])


def _csv(columns: Sequence[str], rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _json(columns: Sequence[str], rows: Sequence[Row]) -> str:
    return json.dumps([{column: row.get(column) for column in columns} for row in rows], indent=2)


FORMATS: dict[str, Callable[[Sequence[str], Sequence[Row]], str]] = {
    "text": _text,
    "markdown": _markdown,
    "csv": _csv,
    "json": _json,
}


def format_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Return a table of aligned text, the first column to the left, the others to the right.

    Integers get thousands separators; other numbers are shown with four digits.
    """

    def cell(value: Any) -> str:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return f"{value:,}" if isinstance(value, numbers.Integral) else f"{value:.4g}"
        return str(value)

    lines = [list(headers), *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in lines
    )
