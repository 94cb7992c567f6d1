"""Flickr8k and Flickr30k as published: a file of captions, and a list of images for each split.

Hodosh, Young and Hockenmaier 2013 (JAIR 47): Flickr8k.token.txt has lines of "NAME.jpg#0", a tab
and the caption; Flickr_8k.trainImages.txt, .devImages.txt and .testImages.txt have a name per line.
Young et al. 2014 (TACL 2): results_20130124.token has the same form; the lists omit the suffix.
"""

import argparse
import collections
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cap_pretrain import untrusted
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.errors import UserError


class Dataset(annotated.SharedImages):
    """Images with five captions each; without `splits`, all are in the split "train"."""

    HOMEPAGE = "https://shannon.cs.illinois.edu/DenotationGraph/"

    def __init__(
        self, captions: Path, splits: Mapping[str, Path], images: Sequence[Path], **kwargs: Any
    ):
        found = read_captions(captions)
        names = {split: _lines(path) for split, path in splits.items()} or {"train": list(found)}
        entries = {split: _entries(found, own) for split, own in names.items()}
        super().__init__(entries, images, origin=captions.name, **kwargs)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare --captions, --splits and --images."""
        what = "Flickr8k.token.txt or results_20130124.token"
        parser.add_argument("--captions", required=True, type=Path, metavar="FILE", help=what)
        what = "list of a split's images, as val=Flickr_8k.devImages.txt; default: all are train"
        annotated.add_paths(parser, "--splits", what, required=False)
        cls.add_images(parser)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        splits = by_split("--splits", args.splits or (), default="train")
        return cls(args.captions, splits, args.images, **kwargs)


@untrusted.parser
def read_captions(path: Path) -> dict[str, list[str]]:
    """Return the captions by image name, in the order of the file; raises UserError if invalid."""
    captions: dict[str, list[str]] = collections.defaultdict(list)
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
        with untrusted.open_regular(path) as file:
            text = file.read().decode("utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return [line.strip() for line in re.split("[\r\n]", text) if line.strip()]


def _entries(captions: Mapping[str, list[str]], names: Sequence[str]) -> list[Entry]:
    """Return the entries of the images of a split, whose names may lack the suffix."""
    names = [name if posixpath.splitext(name)[1] else f"{name}.jpg" for name in names]
    found = ((name, captions.get(name, [])) for name in names)
    return [
        Entry(name, (name,), own, problem="" if own else "without captions") for name, own in found
    ]
