"""Visual Genome: images with some 50 described regions each.

Krishna et al. 2017 (arXiv 1602.07332), https://homes.cs.washington.edu/~ranjay/visualgenome/api.html.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cap_pretrain import files, untrusted
from cap_pretrain.data.builders.formats import annotated, located
from cap_pretrain.data.builders.formats.annotated import Entry

_WHAT = "Visual Genome's"


class Dataset(located.Located):
    """Images with the phrases and boxes of their regions, in the only split train.

    `regions` is region_descriptions.json, `image_data` the file of that name, with the sizes of the
    images. The image of id 1 is the file 1.jpg.
    """

    HOMEPAGE = "https://homes.cs.washington.edu/~ranjay/visualgenome/"

    def __init__(self, regions: Path, image_data: Path, images: Sequence[Path], **kwargs: Any):
        entries = read_regions(regions, read_sizes(image_data))
        super().__init__(
            {"train": entries}, images, origin=f"{regions.name} and {image_data.name}", **kwargs
        )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare --regions, --image_data and --images."""
        what = "region_descriptions.json, also as .json.gz"
        parser.add_argument("--regions", required=True, type=Path, metavar="JSON", help=what)
        what = "image_data.json, which holds the sizes of the images"
        parser.add_argument("--image_data", required=True, type=Path, metavar="JSON", help=what)
        cls.add_images(parser, ", as VG_100K VG_100K_2")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        return cls(args.regions, args.image_data, args.images, **kwargs)


@untrusted.parser
def read_sizes(path: Path) -> dict[str, tuple[float, float]]:
    """Read image_data.json; return (width, height) in pixels by id of the image."""
    sizes = {}
    for entry in untrusted.checked(files.read_json(path), "content", list, path):
        keys = ("image_id", "width", "height")
        image_id, *sides = annotated.take(path, "images", entry, *keys, what=_WHAT)
        width, height = (
            untrusted.bounded(side, key, 1, located.MAX_SIDE, path, (int, float))
            for side, key in zip(sides, keys[1:], strict=True)
        )
        sizes[annotated.id_text(path, image_id)] = (width, height)
    return sizes


@untrusted.parser
def read_regions(path: Path, sizes: dict[str, tuple[float, float]]) -> list[Entry]:
    """Read region_descriptions.json and return the images in order.

    Raises UserError if the file is missing, is not JSON, or has another form.
    """
    entries = []
    for image in untrusted.checked(files.read_json(path), "content", list, path):
        image_id, regions = annotated.take(path, "images", image, "id", "regions", what=_WHAT)
        image_id = annotated.id_text(path, image_id)
        size = sizes.get(image_id)
        found = []
        for region in untrusted.checked(regions, "regions", list, path):
            keys = ("phrase", "x", "y", "width", "height")
            phrase, *box = annotated.take(path, "regions", region, *keys, what=_WHAT)
            found.append((phrase, located.in_shares(box, *size) if size else None))
        usable, dropped = located.usable(found)
        problem = "" if usable else "without regions"
        entries.append(
            Entry(
                image_id,
                (f"{image_id}.jpg",),
                (),
                problem=problem if size else "not in image_data.json",
                regions=usable,
                left_out=dropped,
            )
        )
    return entries
