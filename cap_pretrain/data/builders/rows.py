"""Rows of tables in TSV, CSV or Parquet files, read as a stream.

Bytes that are not text in the table's encoding become lone surrogates ("surrogateescape"), which
the build counts and replaces (`base`).
"""

import codecs
import collections
import csv
import dataclasses
import io
import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from cap_pretrain.data.sources import arrow
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.untrusted import (
    FREE_BYTES,
    MAX_RATIO,
    TooLargeError,
    is_text,
    open_bounded,
    open_regular,
    parsing,
)

Row = dict[str, Any]

MAX_LINE = 2**24  # characters of the longest line that is read
MAX_ROW = 2**20  # characters of a row of several lines
MAX_LINES = 100  # of one row of a CSV, whose quoted fields may have line breaks
MAX_BROKEN = 0.05  # fraction of rows that may be in another encoding than the table
_SAMPLE = 10_000  # rows whose encoding is checked
_SUFFIXES = (".tsv", ".csv", ".tsv.gz", ".csv.gz", ".parquet")
_BATCH = 128  # rows of Parquet in memory, which may hold images
_FEW = 8  # rows that are always read at once if they are small on average
_BATCH_BYTES = 2**26  # of these rows, on average
_NO_ROW = [""]


@dataclasses.dataclass(frozen=True)
class Form:
    """How the rows of text tables are written."""

    names: Sequence[str] = ()  # of all columns, if there is no header
    encoding: str = ""  # a codec of Python; "": UTF-8, and a table that is mostly not is refused


def table_files(path: Path) -> list[Path]:
    """Return the file, or the tables of a folder in order; raises UserError if there are none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.name.lower().endswith(_SUFFIXES)]
    if not files:
        raise UserError(
            f"{path}: not a table, nor a folder with one (by suffix: {', '.join(_SUFFIXES)})."
        )
    return files


def check_table(path: Path, form: Form, needed: Collection[str]) -> None:
    """Check that a table has the columns `needed` and the encoding of `form`.

    Raises UserError if a column is missing, the text has another encoding, or the file cannot be
    read.
    """
    columns = column_names(path, form)
    for name in needed:
        if name not in columns:
            raise UserError(
                f"{path}: no column {name!r}.{did_you_mean(name, columns)} Name the columns to read"
                ", or all of them with --columns if the file has no header."
            )
    if form.encoding or is_parquet(path):
        return
    sample = [all(map(is_text, row)) for row in itertools.islice(_text_rows(path, form), _SAMPLE)]
    if (broken := sample.count(False)) > MAX_BROKEN * len(sample):
        raise UserError(
            f"{path}: {broken} of the first {len(sample)} rows are not UTF-8. Name the encoding, "
            "such as --encoding=cp1252; --encoding=utf-8 replaces what is not UTF-8."
        )


def check_encoding(name: str) -> str:
    """Return the name of an encoding; raises UserError if Python has none for text by that name."""
    try:
        "".encode(name or "utf-8")
        codecs.lookup(name or "utf-8")
    except (LookupError, ValueError) as error:
        raise UserError(f"--encoding {name!r}: is unknown; utf-8 and cp1252 are common.") from error
    return name


def read_rows(path: Path, form: Form, columns: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a table as dicts by column; {} if a line is not a row.

    Of a Parquet file only `columns` are read. If the table has no header, a first row that consists
    of just the names is skipped. A TSV has no quoting, like the lists of Conceptual Captions. A
    quote in a CSV that is never closed, or swallows rows, costs its own row only. Raises UserError
    if the file cannot be read to its end.
    """
    if is_parquet(path):
        yield from _parquet_rows(path, columns)
        return
    rows = _text_rows(path, form)
    header = list(form.names) or next(rows, [])
    for number, row in enumerate(rows):
        if number or sorted(row) != sorted(header):
            yield dict(zip(header, row, strict=True)) if len(row) == len(header) else {}


def count_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, from its metadata."""
    return _parquet(path).metadata.num_rows


def column_names(path: Path, form: Form) -> Sequence[str]:
    """Return the names of a table's columns; raises UserError if it cannot be read."""
    if is_parquet(path):
        return _parquet(path).schema_arrow.names
    return form.names or next(_text_rows(path, form), [])


def _text_rows(path: Path, form: Form) -> Iterator[list[str]]:
    """Yield the rows of a TSV or CSV, header included, as lists of fields."""
    tabs = path.name.lower().endswith((".tsv", ".tsv.gz"))
    encoding = form.encoding or "utf-8"
    wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    with (
        parsing(path),
        open_bounded(path) as data,
        io.TextIOWrapper(
            data,
            encoding="utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding,
            errors="replace" if wide else "surrogateescape",
            newline="\n" if tabs else "",
        ) as file,
    ):
        yield from _tsv(file) if tabs else _csv(file, len(form.names))


class TooLongError(Exception):
    """A line is longer than MAX_LINE."""


class Lines:
    """The lines of a text file; one that is too long raises TooLongError, then the next follow."""

    def __init__(self, file: io.TextIOBase):
        self._file = file

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not (line := self._file.readline(MAX_LINE)):
            raise StopIteration
        if len(line) < MAX_LINE or line.endswith(("\n", "\r")):
            return line
        while line and not line.endswith(("\n", "\r")):
            line = self._file.readline(MAX_LINE)
        raise TooLongError(f"a line has over {MAX_LINE} characters")


def _next(lines: Lines) -> str:
    """Return the next line with its end; "" at the end, and a line without columns if too long."""
    try:
        return next(lines, "")
    except TooLongError:
        return "too long\n"


def _tsv(file: io.TextIOBase) -> Iterator[list[str]]:
    lines = Lines(file)
    while line := _next(lines):
        if line := line.rstrip("\r\n"):
            yield line.split("\t")


def _csv(file: io.TextIOBase, width: int) -> Iterator[list[str]]:
    """Yield the rows of a CSV; `width` is the number of columns, 0 if the first row says it."""
    lines, ahead = Lines(file), collections.deque[str]()
    while True:
        line = ahead.popleft() if ahead else _next(lines)
        if not line:
            return
        own = [line]
        while _is_open(own[-1], len(own) > 1):
            more = ahead.popleft() if ahead else _next(lines)
            if more:
                own.append(more)
            if not more or len(own) > MAX_LINES or sum(map(len, own)) > MAX_ROW:
                break
        row = _parsed(own, width)
        if row is _NO_ROW:  # the quote may be a stray one: the other lines are rows of their own
            ahead.extendleft(reversed(own[1:]))
        width = width or len(row)
        if row:
            yield row


def _parsed(lines: Sequence[str], width: int) -> list[str]:
    """Return the fields of one row of a CSV; _NO_ROW if it is none, [] if it is empty."""
    try:
        rows = list(csv.reader(lines, strict=len(lines) > 1))
    except csv.Error:
        return _NO_ROW
    row = rows[0] if rows else []
    whole = len(rows) < 2 and (len(lines) == 1 or not width or len(row) == width)
    return row if whole and not _is_open(lines[-1], len(lines) > 1) else _NO_ROW


def _is_open(line: str, inside: bool) -> bool:
    """Return whether a quoted field continues after a line, which may begin `inside` one."""
    if not inside and '"' not in line:
        return False
    at, end = 0, len(line.rstrip("\r\n"))
    while at < end:
        if not inside:
            if line[at] != '"':
                comma = line.find(",", at)
                if comma < 0:
                    return False
                at = comma + 1
                continue
            at, inside = at + 1, True
        at = line.find('"', at)
        if at < 0:
            return True
        inside = line[at + 1 : at + 2] == '"'
        at += 2 if inside else 1
        if not inside:
            comma = line.find(",", at)
            if comma < 0:
                return False
            at = comma + 1
    return inside


def is_parquet(path: Path) -> bool:
    """Return whether the file name ends in .parquet."""
    return path.suffix.lower() == ".parquet"


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    with parsing(path):
        open_regular(path).close()
        file = parquet.ParquetFile(path)
        if arrow.unpacked(file) > FREE_BYTES + MAX_RATIO * path.stat().st_size:
            raise TooLargeError(f"it decompresses to over {MAX_RATIO} times its size")
        return file


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    file = _parquet(path)
    names = [name for name in file.schema_arrow.names if name in columns]
    with parsing(path):
        whole = arrow.unpacked(file)
        each = whole // max(1, file.metadata.num_rows)  # bytes in a row
        many = max(_FEW, _BATCH_BYTES // max(1, whole))  # every row may repeat the largest value
        size = max(1, min(_BATCH, _BATCH_BYTES // max(1, each), many))
        left = FREE_BYTES + MAX_RATIO * path.stat().st_size
        for batch in map(arrow.decoded, file.iter_batches(batch_size=size, columns=names)):
            left -= batch.nbytes
            if left < 0:
                raise TooLargeError(f"its rows have over {MAX_RATIO} times its size")
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:
                values = [arrow.values(column) for column in batch.columns]
                yield from (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))
