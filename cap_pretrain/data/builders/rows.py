"""Rows of tables in TSV, CSV or Parquet files, read as a stream."""

import contextlib
import csv
import io
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.untrusted import open_bounded

Row = dict[str, Any]

_SUFFIXES = (".tsv", ".csv", ".tsv.gz", ".csv.gz", ".parquet")
MAX_LINE = 2**24
"""Characters of the longest line of a TSV or CSV that is read."""

_BATCH = 128  # rows of Parquet in memory, which may hold images


def table_files(path: Path) -> list[Path]:
    """Return the file, or the tables of a folder in order; raises UserError if there are none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.name.lower().endswith(_SUFFIXES)]
    if not files:
        raise UserError(
            f"{path}: not a table, nor a folder with one (by suffix: {', '.join(_SUFFIXES)})."
        )
    return files


def check_columns(path: Path, names: Sequence[str], needed: Collection[str]) -> None:
    """Check that a table has the columns `needed`; `names` are all, if it has no header.

    Raises UserError if a column is missing, or the file cannot be read.
    """
    columns = _parquet(path).schema_arrow.names if is_parquet(path) else names or _header(path)
    for name in needed:
        if name not in columns:
            raise UserError(
                f"{path}: no column {name!r}.{did_you_mean(name, columns)} Name the columns to read"
                ", or all of them with --columns if the file has no header."
            )


def read_rows(path: Path, names: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a table as dicts by column; {} for a row with another number of fields.

    `names` are those of all columns, if the table has no header; a first row that consists of just
    these names is skipped. A TSV has no quoting, like the lists of Conceptual Captions. Raises
    UserError if the file cannot be read to its end.
    """
    if is_parquet(path):
        yield from _parquet_rows(path)
        return
    rows = _text_rows(path)
    header = list(names) or next(rows, [])
    for number, row in enumerate(rows):
        if number or sorted(row) != sorted(header):
            yield dict(zip(header, row, strict=True)) if len(row) == len(header) else {}


def count_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, from its metadata."""
    return _parquet(path).metadata.num_rows


def _header(path: Path) -> list[str]:
    return next(_text_rows(path), [])


def _text_rows(path: Path) -> Iterator[list[str]]:
    """Yield the rows of a TSV or CSV, header included, as lists of fields; [] if malformed."""
    tabs = path.name.lower().endswith((".tsv", ".tsv.gz"))
    with (
        _reading(path),
        open_bounded(path) as data,
        io.TextIOWrapper(
            data, encoding="utf-8-sig", errors="replace", newline="\n" if tabs else ""
        ) as file,
    ):
        lines = Lines(file)
        rows = map(_fields, lines) if tabs else csv.reader(lines)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (csv.Error, TooLongError):  # only this row is malformed
                yield []
            else:
                if row:
                    yield row


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


def _fields(line: str) -> list[str]:
    line = line.rstrip("\r\n")
    return line.split("\t") if line else []


def is_parquet(path: Path) -> bool:
    """Return whether the file name ends in .parquet."""
    return path.suffix.lower() == ".parquet"


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    with _reading(path):
        return parquet.ParquetFile(path)


def _parquet_rows(path: Path) -> Iterator[Row]:
    file = _parquet(path)
    with _reading(path):
        for batch in file.iter_batches(batch_size=_BATCH):
            yield from batch.to_pylist()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into UserErrors that name it."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error) as error:  # includes those of PyArrow
        why = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({why}).") from error
