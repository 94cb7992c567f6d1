"""VizWiz-Captions: photos by people who are blind, in the files of vizwiz.org.

Gurari et al. 2020 (arXiv 2002.08565). The files are laid out as COCO's, and mark captions that were
rejected (spam) or precanned (a ready-made sentence for images of too bad quality). The official
evaluation leaves out both.
"""

import argparse
import functools
from collections.abc import Collection
from typing import Any

from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.formats import captions_json

_MARKS = ("rejected", "precanned")


class Dataset(captions_json.Dataset, skip_registration=True):
    """Images with up to five captions each."""

    HOMEPAGE = "https://vizwiz.org/tasks-and-datasets/image-captioning/"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        captions_json.Dataset.add_arguments(parser)
        parser.add_argument(
            "--keep",
            nargs="+",
            default=(),
            choices=_MARKS,
            help="marked captions that are kept; default: none, as the official evaluation does",
        )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        annotations = by_split("--annotations", args.annotations, default="train")
        images = by_split("--images", args.images, default="")
        return cls(annotations, images, functools.partial(_counts, keep=args.keep), **kwargs)


def _counts(annotation: dict[str, Any], keep: Collection[str]) -> bool:
    return not any(annotation.get(f"is_{mark}") for mark in _MARKS if mark not in keep)
