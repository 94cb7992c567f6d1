"""Tables with a row a caption: TSV, CSV or Parquet, with the images in files or in the table."""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.files import IMAGE_SUFFIXES, Finder
from cap_pretrain.data.builders.formats import annotated, pairs
from cap_pretrain.data.builders.rows import (
    Row,
    check_columns,
    count_rows,
    is_parquet,
    read_rows,
    table_files,
)
from cap_pretrain.data.builders.units import Part

Numbered = tuple[int, Row]


def _crc32(url: str) -> int:
    return zlib.crc32(url.encode())


NAMES: dict[str, Callable[[int, str], str]] = {
    "row": lambda row, url: str(row),
    "crc32": lambda row, url: str(_crc32(url)),
    "row_crc32": lambda row, url: f"{row}_{_crc32(url)}",
    "md5": lambda row, url: hashlib.md5(url.encode(), usedforsecurity=False).hexdigest(),
    "sha256": lambda row, url: hashlib.sha256(url.encode()).hexdigest(),
}
"""How downloaders call the image of a row (from 0) with a URL, apart from its suffix."""

NAMES_HELP = (
    "row: the number of its row from 0, with or without leading zeros, as by img2dataset with "
    "10,000 images a shard; crc32: that of its URL, as a decimal; row_crc32: both with _ between, "
    "as by DownloadConceptualCaptions; md5, sha256: those of its URL, hexadecimal"
)


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the columns of a table are.

    Attributes:
        caption: those of captions.
        image: names of images, or their bytes, or both as Hugging Face's datasets have them.
        url: of URLs; it may be missing.
        id: of ids; "": an example has that of its URL (`pairs.pair_id`), else the name of its
            image, else the number of its row.
        named_by: how image files are called: a key of NAMES; "path": by column `image`; "stem": by
            that without suffix.
        names: of all columns, if there is no header.
    """

    caption: Sequence[str] = ("caption",)
    image: str = "image"
    url: str = "url"
    id: str = ""
    named_by: str = "path"
    names: Sequence[str] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that a table must have."""
        image = self.url if self.named_by in NAMES else self.image
        return (*self.caption, image, *([self.id] if self.id else ()))

    def key(self, base_name: str) -> str | None:
        """What a file is called by, as `Finder` asks."""
        if self.named_by == "path":
            return base_name
        stem, suffix = os.path.splitext(base_name)
        if suffix and suffix.lower() not in IMAGE_SUFFIXES:  # captions next to their images
            return None
        return _without_zeros(stem) if self.named_by == "row" else stem


def _without_zeros(number: str) -> str:
    return number.lstrip("0") or "0"


class Dataset(pairs.Pairs, skip_registration=True):
    """Images with captions in tables."""

    def __init__(
        self,
        tables: Mapping[str, Path],
        images: Mapping[str, Path],
        columns: Columns,
        **kwargs: Any,
    ):
        """`tables` are by split: files, or folders of them.

        `images` are folders or zips by split; those of "" serve all other splits. There may be
        none, if the tables hold the images.

        Raises:
            UserError: files that are missing or not understood, or lack a column.
        """
        own = parts(tables, images, columns, "--tables")
        super().__init__(own, ", ".join(path.name for path in tables.values()), **kwargs)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        what = "TSV, CSV (also .gz) or Parquet, or a folder of them; without SPLIT= it is train"
        annotated.add_paths(parser, "--tables", what)
        what = f"{annotated.IMAGES_HELP}; not needed if they are in the tables"
        annotated.add_paths(parser, "--images", what, required=False)
        what = "columns of captions; default: caption"
        parser.add_argument("--caption", nargs="+", default=("caption",), help=what)
        what = "column of the images' names or bytes; default: image"
        parser.add_argument("--image", default="image", help=what)
        what = "column of URLs, which may be missing; default: url"
        parser.add_argument("--url", default="url", help=what)
        what = "column of ids; default: they are made of URL and captions, or of the image's name"
        parser.add_argument("--id", default="", help=what)
        what = (
            "how image files are called. path: by column --image; stem: by that, without suffix; "
        )
        choices = ("path", "stem", *NAMES)
        parser.add_argument("--named_by", default="path", choices=choices, help=what + NAMES_HELP)
        what = "names of all columns, if there is no header"
        parser.add_argument("--columns", nargs="+", default=(), dest="names", help=what)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        tables = by_split("--tables", args.tables, default="train")
        images = by_split("--images", args.images or (), default="")
        columns = {field.name: getattr(args, field.name) for field in dataclasses.fields(Columns)}
        return cls(tables, images, Columns(**columns), **kwargs)


def parts(
    tables: Mapping[str, Path], images: Mapping[str, Path], columns: Columns, flag: str
) -> dict[str, list[Part]]:
    """The tables of each split; `flag` names them, for messages. See `Dataset`.

    Those that hold their images are read one by one, as to pass over images takes time.
    """
    files = {split: table_files(path) for split, path in tables.items()}
    for path in itertools.chain(*files.values()):
        check_columns(path, columns.names, columns.needed)
    if not images and all(map(is_parquet, itertools.chain(*files.values()))):
        return {split: _parts_with_images(own, columns) for split, own in files.items()}
    found = annotated.open_images(images, tables, flag, columns.key)
    return {
        split: [_part_of_names(own, found.get(split) or found[""], columns)]
        for split, own in files.items()
    }


def _part_of_names(files: Sequence[Path], finder: Finder, columns: Columns) -> Part:
    read = functools.partial(candidates, files, finder, columns)
    return Part(read, count=lambda: sum(1 for _ in read()))


def _parts_with_images(files: Sequence[Path], columns: Columns) -> list[Part]:
    first, own = 0, []
    for path in files:
        read = functools.partial(candidates, [path], Finder([]), columns, first)
        own.append(Part(read, source=path))
        first += count_rows(path)
    return own


def candidates(
    files: Sequence[Path], finder: Finder, columns: Columns, first: int = 0
) -> Iterator[Candidate]:
    """Yields an example for each row; rows of one id that follow each other are one.

    Those with a URL never are: their captions are part of the id. Rows are numbered from `first`.
    """
    rows = enumerate((row for path in files for row in read_rows(path, columns.names)), first)
    for _, group in itertools.groupby(rows, functools.partial(_image_of, columns)):
        yield _candidate(list(group), finder, columns)


def _image_of(columns: Columns, numbered: Numbered) -> str | int:
    """What rows of one example have in common."""
    number, row = numbered
    if row and columns.id:
        return str(row[columns.id])
    image = row.get(columns.image)
    return image if isinstance(image, str) and not row.get(columns.url) else number


def _candidate(group: Sequence[Numbered], finder: Finder, columns: Columns) -> Candidate:
    number, row = group[0]
    if not row:
        return pairs.lost(f"row {number}", f"row {number}", "not a row")
    url = str(row.get(columns.url) or "").strip()
    cells = (own.get(name) for _, own in group for name in columns.caption)
    captions = [text for cell in cells for text in annotated.texts(cell)]
    image = row.get(columns.image)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if columns.named_by in NAMES:
        image = NAMES[columns.named_by](number, url)
    file = image if isinstance(image, str) else f"row {number}"
    found = _image_of(columns, group[0])
    return pairs.candidate(
        id=pairs.pair_id(url, captions) if url and not columns.id else str(found),
        file=file,
        captions=captions,
        read=(lambda: image) if isinstance(image, bytes) else lambda: finder.read(file),
        fields=row,
    )
