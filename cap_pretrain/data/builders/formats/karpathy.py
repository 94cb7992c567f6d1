"""Karpathy's splits of COCO, Flickr8k and Flickr30k: one JSON of images with split and sentences.

Karpathy and Fei-Fei 2015 (arXiv 1412.2306), https://cs.stanford.edu/people/karpathy/deepimagesent/:
dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json, or other files of that form.
"""

import argparse
import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cap_pretrain import files, untrusted
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.errors import UserError

_WHAT = "Karpathy's dataset_coco.json or a similar file"
_RESTVAL = "restval"


class Dataset(annotated.SharedImages):
    """Images with five captions each, in the splits commonly used to compare captioning models.

    The folders and zips of images are searched in order. Images of "restval" join the split
    `restval`.
    """

    HOMEPAGE = "https://cs.stanford.edu/people/karpathy/deepimagesent/"

    def __init__(
        self, annotations: Path, images: Sequence[Path], restval: str = "train", **kwargs: Any
    ):
        entries = read_splits(annotations, restval)
        super().__init__(entries, images, origin=annotations.name, **kwargs)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare --annotations, --images and --restval."""
        what = "dataset_coco.json, dataset_flickr8k.json, …, also as .json.gz"
        parser.add_argument("--annotations", required=True, type=Path, metavar="JSON", help=what)
        cls.add_images(parser, ", as train2014.zip val2014.zip")
        what = "the split that COCO's restval images join; default: train, as is usual"
        parser.add_argument("--restval", default="train", metavar="SPLIT", help=what)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        return cls(args.annotations, args.images, args.restval, **kwargs)


@untrusted.parser
def read_splits(path: Path, restval: str = "train") -> dict[str, list[Entry]]:
    """Read a file of Karpathy's, plain or gzipped; images of "restval" join the split `restval`.

    Returns the images by split, in the order of the file. Their ids are those of COCO if the file
    has them, so that captions can be scored against COCO's annotations. Raises UserError if the
    file is missing, is not JSON, or has another form.
    """
    splits = collections.defaultdict(list)
    for image in annotated.entries_of(path, files.read_json(path), "images", _WHAT):
        split, name, sentences = annotated.take(
            path, "images", image, "split", "filename", "sentences", what=_WHAT
        )
        name = untrusted.checked(name, "filename", str, path)
        if folder := image.get("filepath"):
            name = f"{folder}/{name}"
        image_id = annotated.id_text(path, image.get("cocoid", image.get("imgid", name)))
        captions = annotated.texts_of(path, "sentences", sentences, "raw", _WHAT)
        problem = "" if captions else "without captions"
        entry = Entry(image_id, (name,), captions, problem=problem)
        split = untrusted.checked(split, "split", str, path)
        splits[restval if split == _RESTVAL else split].append(entry)
    if not splits:
        raise UserError(f"{path}: lists no image; is it {_WHAT}?")
    return dict(splits)
