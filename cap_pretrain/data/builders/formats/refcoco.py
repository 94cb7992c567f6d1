"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions for objects of COCO's images.

Yu et al. 2016 (arXiv 1608.00272), Mao et al. 2016 (arXiv 1511.02283); https://github.com/lichengunc/refer.
The published list of expressions is a pickle, which is not read here, as opening it executes code;
docs/locca.md says how to write it as JSON.
"""

import argparse
import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cap_pretrain import files, untrusted
from cap_pretrain.data.builders.formats import annotated, captions_json, located
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.data.regions import Box
from cap_pretrain.errors import UserError

_WHAT = "RefCOCO's"


class Dataset(located.Located):
    """An example for each image, with all its expressions, in the splits that the list names.

    `refs` lists expressions, `instances` images and boxes in COCO's format. Captions of the same
    images may be added from `captions`, files in COCO's format.
    """

    HOMEPAGE = "https://github.com/lichengunc/refer"

    def __init__(
        self,
        refs: Path,
        instances: Path,
        images: Sequence[Path],
        captions: Sequence[Path] = (),
        **kwargs: Any,
    ):
        found = {
            entry.id: entry.captions
            for path in captions
            for entry in captions_json.read_captions(path)
        }
        entries = read_refs(refs, read_instances(instances), found)
        super().__init__(entries, images, origin=f"{refs.name} and {instances.name}", **kwargs)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare --refs, --instances, --images and --captions."""
        what = "the expressions as JSON, also as .json.gz (docs/locca.md)"
        parser.add_argument("--refs", required=True, type=Path, metavar="JSON", help=what)
        what = "instances.json, which holds the images and boxes"
        parser.add_argument("--instances", required=True, type=Path, metavar="JSON", help=what)
        cls.add_images(parser, ", as train2014.zip")
        what = "captions of these images in COCO's format, as captions_train2014.json"
        parser.add_argument(
            "--captions", nargs="+", default=(), type=Path, metavar="JSON", help=what
        )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        return cls(args.refs, args.instances, args.images, args.captions, **kwargs)


class Instances(NamedTuple):
    """Images and boxes of a file in COCO's format: file names and boxes by id."""

    names: dict[str, str]
    boxes: dict[str, Box | None]


@untrusted.parser
def read_instances(path: Path) -> Instances:
    """Read images and boxes, plain or gzipped; raise UserError if the file has another form."""
    content = files.read_json(path)
    names, sizes = {}, {}
    for entry in annotated.entries_of(path, content, "images", _WHAT):
        keys = ("id", "file_name", "width", "height")
        image_id, name, *sides = annotated.take(path, "images", entry, *keys, what=_WHAT)
        image_id = annotated.id_text(path, image_id)
        names[image_id] = annotated.id_text(path, name)
        sizes[image_id] = [
            untrusted.bounded(side, key, 1, located.MAX_SIDE, path, (int, float))
            for side, key in zip(sides, keys[2:], strict=True)
        ]
    boxes = {}
    for entry in annotated.entries_of(path, content, "annotations", _WHAT):
        own_id, image_id = annotated.take(path, "annotations", entry, "id", "image_id", what=_WHAT)
        size = sizes.get(annotated.id_text(path, image_id))
        box = located.in_shares(entry.get("bbox"), *size) if size else None
        boxes[annotated.id_text(path, own_id)] = box
    return Instances(names, boxes)


@untrusted.parser
def read_refs(
    path: Path, instances: Instances, captions: dict[str, Sequence[str]]
) -> dict[str, list[Entry]]:
    """Read a list of expressions, plain or gzipped, and return the images by split.

    `captions` are by id of the image. Raises UserError if the file is missing, is not JSON, or has
    another form.
    """
    content = files.read_json(path)
    content = content if isinstance(content, dict) else {"refs": content}
    found: dict[str, dict[str, list]] = collections.defaultdict(dict)
    for ref in annotated.entries_of(path, content, "refs", _WHAT):
        keys = ("image_id", "ann_id", "split", "sentences")
        image_id, ann_id, split, sentences = annotated.take(path, "refs", ref, *keys, what=_WHAT)
        image_id, ann_id = (annotated.id_text(path, value) for value in (image_id, ann_id))
        sentences = untrusted.checked(sentences, "sentences", list, path)
        phrases = annotated.texts_of(path, "sentences", sentences, "sent", _WHAT)
        split = untrusted.checked(split, "split", str, path)
        own = found[split].setdefault(image_id, [])
        own += [(phrase, instances.boxes.get(ann_id)) for phrase in phrases]
    if not found:
        raise UserError(f"{path}: lists no expression; is it {_WHAT}?")
    return {
        split: [_entry(image_id, own, instances, captions) for image_id, own in images.items()]
        for split, images in found.items()
    }


def _entry(image_id: str, found: list, instances: Instances, captions: dict) -> Entry:
    regions, dropped = located.usable(found)
    name = instances.names.get(image_id)
    problem = "" if regions else "without regions"
    return Entry(
        image_id,
        (name,) if name else (),
        captions.get(image_id, ()),
        problem=problem if name else "expressions of an image that is not listed",
        regions=regions,
        left_out=dropped,
    )
