"""Karpathy's splits of COCO, Flickr8k and Flickr30k: one json of images with split and sentences.

Karpathy and Fei-Fei 2015 (arXiv 1412.2306), https://cs.stanford.edu/people/karpathy/deepimagesent/:
dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json, or one's own of that form.
"""

import argparse
import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cap_pretrain import files
from cap_pretrain.data.builders.files import Finder, open_files
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.errors import UserError

_WHAT = "Karpathy's dataset_coco.json or the like"
_RESTVAL = "restval"


class Dataset(annotated.Annotated, skip_registration=True):
    """Images with five captions each, in the splits that captioning is compared on."""

    HOMEPAGE = "https://cs.stanford.edu/people/karpathy/deepimagesent/"

    def __init__(
        self, annotations: Path, images: Sequence[Path], restval: str = "train", **kwargs: Any
    ):
        """`images` are searched in this order; `restval` is the split that restval joins."""
        entries = read_splits(annotations, restval)
        finder = Finder([open_files(path) for path in images])
        super().__init__(entries, {"": finder}, origin=annotations.name, **kwargs)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--annotations",
            required=True,
            type=Path,
            metavar="JSON",
            help="dataset_coco.json, dataset_flickr8k.json, …, also as .json.gz",
        )
        parser.add_argument(
            "--images",
            nargs="+",
            required=True,
            type=Path,
            metavar="DIR_OR_ZIP",
            help="folders or zips in which the images are, as train2014.zip val2014.zip",
        )
        parser.add_argument(
            "--restval",
            default="train",
            metavar="SPLIT",
            help="the split that gets COCO's images of restval; default: train, as is usual",
        )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        return cls(args.annotations, args.images, args.restval, **kwargs)


def read_splits(path: Path, restval: str = "train") -> dict[str, list[Entry]]:
    """Reads a file of Karpathy's.

    Args:
        path: the file, plain or gzipped.
        restval: the split that images of "restval" join.

    Returns:
        The images by split, in the order of the file. Their ids are those of COCO where there are
        any, so that captions can be compared with COCO's annotations.

    Raises:
        UserError: no such file, no JSON, of another form.
    """
    splits = collections.defaultdict(list)
    for image in annotated.entries_of(path, files.read_json(path), "images", _WHAT):
        split, name, sentences = annotated.take(
            path, "images", image, "split", "filename", "sentences", what=_WHAT
        )
        if folder := image.get("filepath"):
            name = f"{folder}/{name}"
        image_id = image.get("cocoid", image.get("imgid", name))
        captions = annotated.texts_of(path, "sentences", sentences, "raw", _WHAT)
        problem = "" if captions else "without captions"
        entry = Entry(str(image_id), (name,), captions, problem=problem)
        splits[restval if split == _RESTVAL else split].append(entry)
    if not splits:
        raise UserError(f"{path}: lists no image; is it {_WHAT}?")
    return dict(splits)
