"""VizWiz-Captions: photos taken by people who are blind, in the files of vizwiz.org.

Gurari et al. 2020 (arXiv 2002.08565). The files have COCO's layout, and mark captions that were
rejected (spam) or precanned (a ready-made sentence for images of insufficient quality). The
official evaluation leaves out both.
"""

import argparse
import functools
from collections.abc import Collection
from typing import Any

from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.formats import captions_json

_MARKS = ("rejected", "precanned")


class Dataset(captions_json.Dataset):
    """Images with up to five captions each."""

    HOMEPAGE = "https://vizwiz.org/tasks-and-datasets/image-captioning/"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare --annotations, --images and --keep."""
        captions_json.Dataset.add_arguments(parser)
        parser.add_argument(
            "--keep",
            nargs="+",
            default=(),
            choices=_MARKS,
            help="marked captions to keep; default: none, as in the official evaluation",
        )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        annotations = by_split("--annotations", args.annotations, default="train")
        images = by_split("--images", args.images, default="")
        return cls(annotations, images, functools.partial(_is_kept, marks=args.keep), **kwargs)


def _is_kept(annotation: dict[str, Any], marks: Collection[str]) -> bool:
    """Return whether a caption has no mark other than `marks`."""
    return not any(annotation.get(f"is_{mark}") for mark in _MARKS if mark not in marks)
