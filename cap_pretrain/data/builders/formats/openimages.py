"""Open Images: labels of whole images, in the csv files that it is published with.

Kuznetsova et al. 2018 (arXiv 1811.00982), https://storage.googleapis.com/openimages/web/. The files
have the columns ImageID, Source, LabelName and Confidence; those of human-verified labels have a
confidence of 1 or, for what is not in the image, 0. An image has several labels as a rule.
"""

import argparse
import collections
import csv
import functools
import gzip
import posixpath
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cap_pretrain.data.builders import base
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.files import image_names, open_files
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.image_folder import told_apart
from cap_pretrain.errors import UserError

_COLUMNS = ("ImageID", "LabelName", "Confidence")
MIN_CONFIDENCE = 0.5
"""What labels by machines have at least, in general (the README of Open Images)."""


class Dataset(base.ImageDataset, skip_registration=True):
    """The images that are there, one label each.

    Of several labels an image gets the one with the highest confidence, and among equals the one
    that the fewest images have, of those that are there in any split: it says the most.
    """

    HOMEPAGE = "https://storage.googleapis.com/openimages/web/"

    def __init__(
        self,
        labels: Mapping[str, Path],
        images: Mapping[str, Path],
        classes: Path,
        confidence: float = MIN_CONFIDENCE,
        **kwargs: Any,
    ):
        """`labels` and `images` are by split; other classes than those of `classes` do not count.

        Raises:
            UserError: files that are missing or not understood, a split with one of the two only.
        """
        for split in set(labels) ^ set(images):
            flag = "--images" if split in labels else "--labels"
            raise UserError(f"{flag}: none for split {split!r}; add {split}=PATH.")
        self._origin = ", ".join(path.name for path in labels.values())
        self._files = {split: open_files(path) for split, path in images.items()}
        self._images = {split: image_names(files) for split, files in self._files.items()}
        names = read_classes(classes)
        found = {
            split: read_labels(path, {_image_id(n) for n in self._images[split]}, confidence, names)
            for split, path in labels.items()
        }
        counts = collections.Counter(
            label for own in found.values() for all_labels in own.values() for label in all_labels
        )
        if not counts:
            raise UserError(
                f"--labels {self._origin}: no label of an image that is there, of the classes in "
                f"{classes}; images must be called by their ids, as 000060e3121c7305.jpg."
            )
        self._labels = {
            split: {image: _best(all_labels, counts) for image, all_labels in own.items()}
            for split, own in found.items()
        }
        used = {label for own in self._labels.values() for label in own.values()}
        self._names = told_apart({label: names[label] for label in sorted(used)})
        super().__init__(**kwargs)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        what = "train-annotations-human-imagelabels.csv or the like, also as .gz"
        annotated.add_paths(parser, "--labels", f"{what}; without SPLIT= it is train")
        what = "folder or zip of the images, called by their ids; without SPLIT= it is train"
        annotated.add_paths(parser, "--images", what)
        parser.add_argument(
            "--classes",
            required=True,
            type=Path,
            metavar="CSV",
            help="class-descriptions.csv, or its part whose classes are wanted",
        )
        parser.add_argument(
            "--confidence",
            type=float,
            default=MIN_CONFIDENCE,
            help=f"labels with less do not count; default: {MIN_CONFIDENCE}",
        )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        labels = by_split("--labels", args.labels, default="train")
        images = by_split("--images", args.images, default="train")
        return cls(labels, images, args.classes, args.confidence, **kwargs)

    def splits(self) -> dict[str, int]:
        return {split: len(names) for split, names in self._images.items()}

    def candidates(self, split: str) -> Iterator[Candidate]:
        for name in self._images[split]:
            label = self._labels[split].get(_image_id(name), "")
            yield Candidate(
                id=_image_id(name),
                file=name,
                read=functools.partial(self._files[split].read, name),
                features={"label": self._names[label]} if label else {},
                problem="" if label else "without label",
            )

    def features(self) -> dict[str, Any]:
        return {"label": tfds.features.ClassLabel(names=list(self._names.values()))}

    def description(self) -> str:
        return f"Images of {len(self._names)} classes of Open Images, built from {self._origin}."


def read_classes(path: Path) -> dict[str, str]:
    """Returns the name of each label, as {"/m/0bt9lr": "Dog"}; older files have no header.

    Raises:
        UserError: no such file, or another form.
    """
    rows = list(_rows(path))
    if not rows or any(len(row) != 2 for row in rows) or not rows[-1][0].startswith("/"):
        raise UserError(f"--classes {path}: must have lines like /m/0bt9lr,Dog.")
    return {label: name for label, name in rows if label.startswith("/")}


def read_labels(
    path: Path, images: set[str], confidence: float, classes: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Returns the labels of these images with their confidence, as {image: {label: 1.0}}.

    Args:
        path: a file of labels.
        images: ids; the others of the millions of images are passed over.
        confidence: the least.
        classes: labels that count.

    Raises:
        UserError: no such file, or another form.
    """
    rows = _rows(path)
    header = next(rows, [])
    if missing := [name for name in _COLUMNS if name not in header]:
        raise UserError(
            f"--labels {path}: no column {missing[0]} (found: {', '.join(header)[:80]}); is it a "
            "file of image-level labels of Open Images?"
        )
    image_at, label_at, confidence_at = (header.index(name) for name in _COLUMNS)
    found: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for number, row in enumerate(rows, start=2):
        try:
            image, label, sure = row[image_at], row[label_at], float(row[confidence_at])
        except (IndexError, ValueError) as error:
            raise UserError(f"--labels {path}: line {number} is not understood: {row}.") from error
        if image in images and label in classes and sure >= confidence:
            found[image][label] = max(sure, found[image].get(label, 0.0))
    return dict(found)


def _rows(path: Path) -> Iterator[Sequence[str]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8", newline=""
        ) as file:
            yield from csv.reader(file)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error


def _best(labels: Mapping[str, float], counts: Mapping[str, int]) -> str:
    return min(labels, key=lambda label: (-labels[label], counts[label], label))


def _image_id(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]
