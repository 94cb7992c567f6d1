"""Tables for people and for programs: rows of a header and values, as text in several formats."""

import csv
import io
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are text already."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def written(rows: Sequence[Row], form: str) -> str:
    """Rows in one of FORMATS; what a row lacks is left empty, numbers have four digits for people.

    Args:
      rows: column -> value; columns are those of all rows, in the order in which they come up.
      form: "text", "markdown", "csv" or "json"; the latter two have all digits.
    """
    return FORMATS[form](list(dict.fromkeys(column for row in rows for column in row)), rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    """Columns under `headers`, the first to the left, the others to the right.

    Whole numbers get thousands separators, other numbers four digits.
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
