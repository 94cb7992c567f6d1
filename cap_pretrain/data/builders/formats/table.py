"""Tables with a row per caption: TSV, CSV or Parquet, with images in files or in the table."""

import argparse
import array
import dataclasses
import functools
import hashlib
import itertools
import posixpath
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.files import IMAGE_SUFFIXES, Finder
from cap_pretrain.data.builders.filters import Filters
from cap_pretrain.data.builders.formats import annotated, pairs
from cap_pretrain.data.builders.rows import (
    Form,
    Row,
    check_encoding,
    check_table,
    count_rows,
    is_parquet,
    read_rows,
    table_files,
)
from cap_pretrain.data.builders.units import Part
from cap_pretrain.data.examples import encoded, pair_id
from cap_pretrain.errors import UserError

Numbered = tuple[int, Row]
Example = tuple[str | int, str]  # id, image or row number; name of the image, if any


def _crc32(url: str) -> int:
    return zlib.crc32(encoded(url))


NAMES: dict[str, Callable[[int, str], str]] = {
    "row": lambda row, _url: str(row),
    "crc32": lambda _row, url: str(_crc32(url)),
    "row_crc32": lambda row, url: f"{row}_{_crc32(url)}",
    "md5": lambda _row, url: hashlib.md5(encoded(url), usedforsecurity=False).hexdigest(),
    "sha256": lambda _row, url: hashlib.sha256(encoded(url)).hexdigest(),
}
"""Naming schemes of downloaders: (row number from 0, URL) -> file name without suffix."""

NAMES_HELP = (
    "row: its row number from 0, with or without leading zeros, as by img2dataset with 10,000 "
    "images per shard; crc32: the CRC-32 of its URL, decimal; row_crc32: both joined by _, as by "
    "DownloadConceptualCaptions; md5, sha256: the hash of its URL, hexadecimal"
)

MAX_SCATTERED = 2**29
"""Bytes of the rows in memory that are far from the first of their image."""

_ENTRY = 500  # bytes in memory for such a row, besides its values
MAX_ROWS = 10_000
"""Rows of a table that are read as captions of one image."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a table and their meaning."""

    caption: Sequence[str] = ("caption",)
    image: str = "image"  # names, bytes, or both in a struct as in datasets of Hugging Face
    url: str = "url"  # may be missing
    id: str = ""  # "": `examples.pair_id`; without a URL the image's name, or else the row number
    # Image files: a key of NAMES; "path": by the column `image`; "stem": likewise, without suffix.
    named_by: str = "path"
    form: Form = dataclasses.field(default_factory=Form)
    tested: Sequence[str] = ()  # further columns to read, for filters

    @property
    def read(self) -> set[str]:
        """All columns that are read; a table may have others, whatever they hold."""
        return {*self.needed, self.image, self.url, *self.tested}

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that the table must have."""
        image = self.url if self.named_by in NAMES else self.image
        return (*self.caption, image, *([self.id] if self.id else ()))

    def key(self, base_name: str) -> str | None:
        """Return the name by which the table refers to an image file, for `Finder`."""
        if self.named_by == "path":
            return base_name
        stem, suffix = posixpath.splitext(base_name)
        if suffix and suffix.lower() not in IMAGE_SUFFIXES:  # such as captions beside their images
            return None
        return _without_zeros(stem) if self.named_by == "row" else stem


def _without_zeros(number: str) -> str:
    return number.lstrip("0") or "0"


class Dataset(pairs.Pairs):
    """Images with captions in tables.

    Each split has a table or folder of tables, and a folder or zip of `images`, where those of ""
    serve all other splits; there are no `images` if the tables hold them. Raises UserError if a
    file is missing or invalid, or lacks a column.
    """

    def __init__(
        self,
        tables: Mapping[str, Path],
        images: Mapping[str, Path],
        columns: Columns,
        **kwargs: Any,
    ):
        own = parts(tables, images, columns, "--tables", kwargs.get("filters"))
        super().__init__(own, ", ".join(path.name for path in tables.values()), **kwargs)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options of the tables, their columns and the images."""
        what = "TSV, CSV (also .gz) or Parquet, or a folder of them; without SPLIT= it is train"
        annotated.add_paths(parser, "--tables", what)
        what = f"{annotated.IMAGES_HELP}; not needed if they are in the tables"
        annotated.add_paths(parser, "--images", what, required=False)
        what = "columns of captions; default: caption"
        parser.add_argument("--caption", nargs="+", default=("caption",), help=what)
        what = "column of image names or bytes; default: image"
        parser.add_argument("--image", default="image", help=what)
        what = "column of URLs, which may be missing; default: url"
        parser.add_argument("--url", default="url", help=what)
        what = "column of ids; default: made of URL and captions, or the name of the image"
        parser.add_argument("--id", default="", help=what)
        what = (
            "how image files are named. path: by column --image; stem: likewise, without suffix; "
        )
        choices = ("path", "stem", *NAMES)
        parser.add_argument("--named_by", default="path", choices=choices, help=what + NAMES_HELP)
        what = "names of all columns, if there is no header"
        parser.add_argument("--columns", nargs="+", default=(), help=what)
        add_encoding(parser)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        tables = by_split("--tables", args.tables, default="train")
        images = by_split("--images", args.images or (), default="")
        own = {name: getattr(args, name) for name in ("caption", "image", "url", "id", "named_by")}
        form = Form(args.columns, check_encoding(args.encoding))
        return cls(tables, images, Columns(**own, form=form), **kwargs)


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """Declare --encoding."""
    what = "of TSV and CSV, such as cp1252; default: utf-8, if nearly all rows are"
    parser.add_argument("--encoding", default="", help=what)


def parts(
    tables: Mapping[str, Path],
    images: Mapping[str, Path],
    columns: Columns,
    flag: str,
    filters: Filters | None = None,
) -> dict[str, list[Part]]:
    """Return the parts of each split: one per table if tables hold images, else one in all.

    Skipping rows is slow if they hold images, so such a table is never divided into units. The
    arguments are those of `Dataset`; `flag` is the option of the tables, for messages.
    """
    tested = [condition.field for condition in filters.where] if filters else []
    columns = dataclasses.replace(columns, tested=tested)
    files = {split: table_files(path) for split, path in tables.items()}
    for path in itertools.chain(*files.values()):
        check_table(path, columns.form, columns.needed)
    if not images and all(map(is_parquet, itertools.chain(*files.values()))):
        return {split: _parts_with_images(own, columns) for split, own in files.items()}
    found = annotated.open_images(images, tables, flag, columns.key)
    return {
        split: [_part_of_names(own, found.get(split) or found[""], columns)]
        for split, own in files.items()
    }


def _part_of_names(files: Sequence[Path], finder: Finder, columns: Columns) -> Part:
    more = functools.cache(functools.partial(_scattered, files, columns))
    read = functools.partial(candidates, files, finder, columns, more=more)
    return Part(read, count=lambda: sum(1 for _ in read()))


def _parts_with_images(files: Sequence[Path], columns: Columns) -> list[Part]:
    first, found = 0, []
    for path in files:
        read = functools.partial(candidates, [path], Finder([]), columns, first)
        found.append(Part(read, source=path))
        first += count_rows(path)
    return found


def candidates(
    files: Sequence[Path],
    finder: Finder,
    columns: Columns,
    first: int = 0,
    more: Callable[[], Mapping[Example, Sequence[Numbered]]] = dict,
) -> Iterator[Candidate]:
    """Yield the candidates of tables, whose first row has the number `first`.

    Consecutive rows with the same id or image become one candidate with several captions, as do
    further rows of the same id and image anywhere, which `more` returns. Rows with a URL are never
    merged, since their captions are part of the id.
    """
    further, seen = more(), set[Example]()
    previous = None
    for example, rows in _groups(files, columns, first):
        own = 0 if example == previous else MAX_ROWS
        if example in further:
            if example in seen:
                continue
            seen.add(example)
            rows.extend(further[example])
        if own:
            yield _candidate(rows[:own], finder, columns)
        for number, _ in rows[own:]:
            yield pairs.dropped(f"row {number}", f"row {number}", "too many rows of an image")
        previous = example


def _groups(
    files: Sequence[Path], columns: Columns, first: int = 0
) -> Iterator[tuple[Example, list[Numbered]]]:
    """Yield consecutive rows of the same id or image, up to MAX_ROWS at a time."""
    read = (row for path in files for row in read_rows(path, columns.form, columns.read))
    rows = enumerate(read, first)
    for key, group in itertools.groupby(rows, functools.partial(_image_of, columns)):
        own_rows = iter(group)
        while start := next(own_rows, None):
            more = itertools.islice(own_rows, MAX_ROWS - 1)
            own = [start, *((n, _without_image(row, columns)) for n, row in more)]
            image = own[0][1].get(columns.image)
            yield (key, image if isinstance(image, str) else ""), own


def _without_image(row: Row, columns: Columns) -> Row:
    """Return a further row of an image, of which only the captions are used."""
    return {k: v for k, v in row.items() if k != columns.image or isinstance(v, str)}


def _scattered(files: Sequence[Path], columns: Columns) -> dict[Example, list[Numbered]]:
    """Return the rows of examples that occur in several places, from the second place on."""
    if columns.named_by in NAMES and not columns.id:
        return {}  # every row has a URL
    hashes = array.array("Q", (_hash(e) for e, _ in _groups(files, columns) if _may_recur(e)))
    values, counts = np.unique(np.asarray(hashes), return_counts=True)
    recurring = set(values[counts > 1].tolist())
    further: dict[Example, list[Numbered]] = {}
    held = 0
    for example, rows in _groups(files, columns) if recurring else ():
        if _may_recur(example) and _hash(example) in recurring:
            if example in further:
                left = max(0, MAX_ROWS - len(further[example]))
                held += sum(sys.getsizeof(v) for _, row in rows[:left] for v in row.values())
                held += _ENTRY * len(rows)
                further[example] += rows[:left] + [(number, {}) for number, _ in rows[left:]]
                if held > MAX_SCATTERED:
                    names = ", ".join(path.name for path in files)
                    raise UserError(
                        f"{names}: rows of an image are scattered and too many to keep in memory; "
                        f"sort them by column {columns.id or columns.image}."
                    )
            else:
                further[example] = []
    return further


def _may_recur(example: Example) -> bool:
    return isinstance(example[0], str)


def _hash(example: Example) -> int:
    """Return 64 bits: of a billion examples, a few share them with another."""
    text = encoded("\0".join(map(str, example)))
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def _image_of(columns: Columns, numbered: Numbered) -> str | int:
    """Return a key that is equal for rows of the same example."""
    number, row = numbered
    if row and columns.id:
        found = row[columns.id]
        return number if found is None or found == "" else str(found)
    image = _image_cell(row, columns)
    return image if isinstance(image, str) and not row.get(columns.url) else number


def _image_cell(row: Row, columns: Columns) -> Any:
    """Return the cell of the image; numbers become text, 7.0 (pandas' habit) that of 7."""
    image = row.get(columns.image)
    if isinstance(image, float) and image.is_integer():
        image = int(image)
    return str(image) if isinstance(image, int | float) else image


def _candidate(group: Sequence[Numbered], finder: Finder, columns: Columns) -> Candidate:
    number, row = group[0]
    if not row:
        return pairs.dropped(f"row {number}", f"row {number}", "not a row")
    found = _image_of(columns, group[0])
    if columns.id and found == number:
        return pairs.dropped(f"row {number}", f"row {number}", "without id")
    url = str(row.get(columns.url) or "").strip()
    cells = (own.get(name) for _, own in group for name in columns.caption)
    captions = [text for cell in cells for text in annotated.texts(cell)]
    image = _image_cell(row, columns)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if columns.named_by in NAMES:
        image = NAMES[columns.named_by](number, url)
    file = image if isinstance(image, str) else f"row {number}"
    return pairs.candidate(
        example_id=pair_id(url, captions) if url and not columns.id else str(found),
        file=file,
        captions=captions,
        read=(lambda: image) if isinstance(image, bytes) else lambda: finder.read(file),
        fields=row,
        held=sum(map(len, captions)) + (len(image) if isinstance(image, bytes) else 0),
    )
