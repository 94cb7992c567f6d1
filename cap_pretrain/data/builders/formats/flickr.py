"""Flickr8k and Flickr30k as published: a file of captions, lists of the images of each split.

Hodosh, Young and Hockenmaier 2013 (JAIR 47): Flickr8k.token.txt with lines "NAME.jpg#0", tab,
caption, and Flickr_8k.trainImages.txt, .devImages.txt and .testImages.txt with a name a line. Young
et al. 2014 (TACL 2): results_20130124.token of the first form; lists name images without suffix.
"""

import argparse
import collections
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.files import Finder, open_files
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.errors import UserError


class Dataset(annotated.Annotated, skip_registration=True):
    """Images with five captions each."""

    HOMEPAGE = "https://shannon.cs.illinois.edu/DenotationGraph/"

    def __init__(
        self, captions: Path, splits: Mapping[str, Path], images: Sequence[Path], **kwargs: Any
    ):
        """`splits` are lists of images; without any all are in the split "train"."""
        found = read_captions(captions)
        names = {split: _lines(path) for split, path in splits.items()} or {"train": list(found)}
        entries = {split: _entries(found, own) for split, own in names.items()}
        finder = Finder([open_files(path) for path in images])
        super().__init__(entries, {"": finder}, origin=captions.name, **kwargs)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--captions",
            required=True,
            type=Path,
            metavar="FILE",
            help="Flickr8k.token.txt or results_20130124.token",
        )
        what = "list of a split's images, as val=Flickr_8k.devImages.txt; default: all are train"
        annotated.add_paths(parser, "--splits", what, required=False)
        parser.add_argument(
            "--images",
            nargs="+",
            required=True,
            type=Path,
            metavar="DIR_OR_ZIP",
            help="folders or zips in which the images are",
        )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        splits = by_split("--splits", args.splits or (), default="train")
        return cls(args.captions, splits, args.images, **kwargs)


def read_captions(path: Path) -> dict[str, list[str]]:
    """Returns the captions of each image by its name, in the order of the file.

    Raises:
        UserError: no such file, or another form.
    """
    captions = collections.defaultdict(list)
    for line in _lines(path):
        key, tab, caption = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        if not (tab and mark):
            raise UserError(
                f"--captions {path}: the line {line[:50]!r} is not NAME.jpg#0, a tab and a caption."
            )
        captions[name] += annotated.texts(caption)
    return dict(captions)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _entries(captions: Mapping[str, list[str]], names: Sequence[str]) -> list[Entry]:
    names = [name if posixpath.splitext(name)[1] else f"{name}.jpg" for name in names]
    found = ((name, captions.get(name, [])) for name in names)
    return [
        Entry(name, (name,), own, problem="" if own else "without captions") for name, own in found
    ]
