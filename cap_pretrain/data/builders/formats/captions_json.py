"""COCO-style captions: images by {"id", "file_name"}, captions by {"image_id", "caption"}."""

import argparse
import collections
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cap_pretrain import files, untrusted
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry

_WHAT = "COCO captions"


class Dataset(annotated.Annotated):
    """Images with one or more captions each; the images of "" serve all other splits.

    `keep` says whether to keep a caption, given its entry in "annotations"; default: keep all.
    """

    HOMEPAGE = "https://cocodataset.org/#format-data"

    def __init__(
        self,
        annotations: Mapping[str, Path],
        images: Mapping[str, Path],
        keep: Callable[[dict[str, Any]], bool] | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            {split: read_captions(path, keep) for split, path in annotations.items()},
            annotated.open_images(images, annotations, "--annotations"),
            origin=", ".join(path.name for path in annotations.values()),
            **kwargs,
        )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare --annotations and --images."""
        what = "captions in COCO's format, .json or .json.gz; without SPLIT= it is train"
        annotated.add_paths(parser, "--annotations", what)
        annotated.add_paths(parser, "--images", annotated.IMAGES_HELP)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        annotations = by_split("--annotations", args.annotations, default="train")
        return cls(annotations, by_split("--images", args.images, default=""), **kwargs)


@untrusted.parser
def read_captions(path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> list[Entry]:
    """Read a file of COCO captions, plain or gzipped; for `keep`, see `Dataset`.

    Returns the images in the order of the file. Captions are stripped and empty ones left out, so
    an image may have none. At the end are entries for captions of images that are not listed.
    Raises UserError if the file is missing, is not JSON, or is not laid out as COCO captions.
    """
    content = files.read_json(path)
    listed, annotations = (
        annotated.entries_of(path, content, key, _WHAT) for key in ("images", "annotations")
    )
    captions: dict[str, list[str]] = collections.defaultdict(list)
    for entry in annotations:
        image_id, caption = annotated.take(
            path, "annotations", entry, "image_id", "caption", what=_WHAT
        )
        if keep is None or keep(entry):
            captions[annotated.id_text(path, image_id)] += annotated.texts(caption)
    entries = []
    for entry in listed:
        image_id, name = annotated.take(path, "images", entry, "id", "file_name", what=_WHAT)
        image_id, name = annotated.id_text(path, image_id), annotated.id_text(path, name)
        own = captions.get(image_id, [])
        problem = "" if own else "without captions"
        entries.append(Entry(image_id, (name,), own, problem=problem))
    known = {entry.id for entry in entries}
    return entries + [
        Entry(image_id, (), own, problem="captioned but not listed")
        for image_id, own in captions.items()
        if own and image_id not in known
    ]
