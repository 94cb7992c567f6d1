"""What Conceptual Captions 3M and 12M have in common: a list of URLs with captions, and images.

Either the list as published and the folder they were downloaded to, or the tars of img2dataset.
Both give the same dataset, example by example, if they hold the same images.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.formats import annotated, pairs, table, webdataset
from cap_pretrain.errors import UserError


class Conceptual(pairs.Pairs, skip_registration=True):
    """Images from the web with their captions. A subclass says how the list is laid out."""

    COLUMNS: Sequence[str]  # of the list, which has no header

    def __init__(
        self,
        lists: Mapping[str, Path],
        images: Mapping[str, Path],
        shards: Mapping[str, Path],
        named_by: str = "row",
        **kwargs: Any,
    ):
        """All are by split; `lists` go with `images`, those of "" serve all other splits.

        Raises:
            UserError: files that are missing or not understood; a split twice.
        """
        columns = table.Columns(named_by=named_by, names=self.COLUMNS)
        if twice := set(lists) & set(shards):
            raise UserError(f"--shards: split {min(twice)!r} is among the --lists, too.")
        parts = table.parts(lists, images, columns, "--lists") | webdataset.parts(shards)
        if not parts or bool(lists) != bool(images):
            raise UserError("--lists: give lists with --images, or --shards.")
        origin = ", ".join(p.name for p in itertools.chain(lists.values(), shards.values()))
        super().__init__(parts, origin, **kwargs)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        order = " and ".join(cls.COLUMNS)
        what = f"the published list, {order} with a tab between; without SPLIT= it is train"
        annotated.add_paths(parser, "--lists", what, required=False)
        annotated.add_paths(parser, "--images", annotated.IMAGES_HELP, required=False)
        what = f"how images are called; default: row. {table.NAMES_HELP}"
        parser.add_argument("--named_by", default="row", choices=table.NAMES, help=what)
        what = "instead of lists and images: tars of img2dataset, or a folder of them"
        annotated.add_paths(parser, "--shards", what, required=False)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Conceptual":
        return cls(
            by_split("--lists", args.lists or (), default="train"),
            by_split("--images", args.images or (), default=""),
            by_split("--shards", args.shards or (), default="train"),
            args.named_by,
            **kwargs,
        )
