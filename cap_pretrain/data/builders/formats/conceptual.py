"""Shared parts of Conceptual Captions 3M and 12M: a list of URLs with captions, and images.

The input is either the published list with the folder of downloaded images, or the tars written by
img2dataset. Both give the same examples if they hold the same images.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders import rows
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.formats import annotated, pairs, table, webdataset
from cap_pretrain.errors import UserError


class Conceptual(pairs.Pairs):
    """Images from the web with their captions; subclasses define the columns of the list.

    Each split has a published list (`lists`) with a folder or zip of `images`, where those of ""
    serve all other splits; or a tar or folder of tars (`shards`). `named_by`, a key of
    `table.NAMES`, says how image files are named; `encoding` is that of the lists. Raises UserError
    if a file is missing or invalid, or a split is in `lists` and in `shards`.
    """

    COLUMNS: Sequence[str]  # of the list, which has no header

    def __init__(
        self,
        lists: Mapping[str, Path],
        images: Mapping[str, Path],
        shards: Mapping[str, Path],
        named_by: str = "row",
        encoding: str = "",
        **kwargs: Any,
    ):
        columns = table.Columns(
            named_by=named_by, form=rows.Form(self.COLUMNS, rows.check_encoding(encoding))
        )
        if twice := set(lists) & set(shards):
            raise UserError(f"--shards: split {min(twice)!r} is given by --lists, too.")
        listed = table.parts(lists, images, columns, "--lists", kwargs.get("filters"))
        parts = listed | webdataset.parts(shards)
        if not parts or bool(lists) != bool(images):
            raise UserError("--lists: give lists with --images, or --shards.")
        origin = ", ".join(p.name for p in itertools.chain(lists.values(), shards.values()))
        super().__init__(parts, origin, **kwargs)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare --lists, --images, --named_by and --shards."""
        order = " and ".join(cls.COLUMNS)
        what = f"the published list, {order} separated by a tab; without SPLIT= it is train"
        annotated.add_paths(parser, "--lists", what, required=False)
        annotated.add_paths(parser, "--images", annotated.IMAGES_HELP, required=False)
        what = f"how image files are named; default: row. {table.NAMES_HELP}"
        parser.add_argument("--named_by", default="row", choices=table.NAMES, help=what)
        table.add_encoding(parser)
        what = "instead of lists and images: a tar of img2dataset, or a folder of tars"
        annotated.add_paths(parser, "--shards", what, required=False)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Conceptual":
        """Construct the builder from parsed options."""
        return cls(
            by_split("--lists", args.lists or (), default="train"),
            by_split("--images", args.images or (), default=""),
            by_split("--shards", args.shards or (), default="train"),
            args.named_by,
            args.encoding,
            **kwargs,
        )
