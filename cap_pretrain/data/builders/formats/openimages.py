"""Open Images: image-level labels, in the CSV files that are published with it.

Kuznetsova et al. 2018 (arXiv 1811.00982), https://storage.googleapis.com/openimages/web/. The files
have the columns ImageID, Source, LabelName and Confidence; those of human-verified labels have a
confidence of 1, or of 0 for labels that are absent. Most images have several labels.
"""

import argparse
import collections
import csv
import functools
import io
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
from cap_pretrain.data.builders.formats.image_folder import disambiguated
from cap_pretrain.data.builders.rows import Lines, TooLongError
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import open_bounded

_COLUMNS = ("ImageID", "LabelName", "Confidence")
MIN_CONFIDENCE = 0.5  # of machine-generated labels in general (README of Open Images)


class Dataset(base.ImageDataset):
    """The images that are present, with one label each of those in the file `classes`.

    Of several labels, an image gets the one with the highest confidence. Ties go to the label that
    is rarest among the images present in all splits, since it is the most specific. Raises
    UserError if a file is missing or invalid, or a split has only labels or only images.
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
        for split in set(labels) ^ set(images):
            flag = "--images" if split in labels else "--labels"
            raise UserError(f"{flag}: none for split {split!r}; add {split}=PATH.")
        origin = ", ".join(path.name for path in labels.values())
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
                f"--labels {origin}: no image present has a label of a class in {classes}; "
                "images must be named by their ids, as 000060e3121c7305.jpg."
            )
        self._labels = {
            split: {image: _best(all_labels, counts) for image, all_labels in own.items()}
            for split, own in found.items()
        }
        used = {label for own in self._labels.values() for label in own.values()}
        self._names = disambiguated({label: names[label] for label in sorted(used)})
        super().__init__(**kwargs, origin=origin)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare --labels, --images, --classes and --confidence."""
        what = "train-annotations-human-imagelabels.csv or a similar file, also as .gz"
        annotated.add_paths(parser, "--labels", f"{what}; without SPLIT= it is train")
        what = "folder or zip of the images, named by their ids; without SPLIT= it is train"
        annotated.add_paths(parser, "--images", what)
        parser.add_argument(
            "--classes",
            required=True,
            type=Path,
            metavar="CSV",
            help="class-descriptions.csv, or just the lines of the classes to keep",
        )
        parser.add_argument(
            "--confidence",
            type=float,
            default=MIN_CONFIDENCE,
            help=f"minimum confidence of a label; default: {MIN_CONFIDENCE}",
        )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        labels = by_split("--labels", args.labels, default="train")
        images = by_split("--images", args.images, default="train")
        return cls(labels, images, args.classes, args.confidence, **kwargs)

    def splits(self) -> dict[str, int]:
        """Return the number of images by split."""
        return {s: len(own) + len(self._files[s].skipped()) for s, own in self._images.items()}

    def candidates(self, split: str) -> Iterator[Candidate]:
        """Yield a candidate for each image."""
        for name in self._images[split]:
            label = self._labels[split].get(_image_id(name), "")
            yield Candidate(
                id=_image_id(name),
                file=name,
                read=functools.partial(self._files[split].read, name),
                features={"label": self._names[label]} if label else {},
                problem="" if label else "without label",
            )
        for name, why in self._files[split].skipped().items():
            yield Candidate(name, name, read=bytes, features={}, problem=why)

    def features(self) -> dict[str, Any]:
        """Return the feature "label"."""
        return {"label": tfds.features.ClassLabel(names=list(self._names.values()))}

    def description(self) -> str:
        """Return one sentence that names the input files."""
        return f"Images of {len(self._names)} classes of Open Images, built from {self._origin}."


def read_classes(path: Path) -> dict[str, str]:
    """Return the name of each class, as {"/m/0bt9lr": "Dog"}; older files have no header.

    Raises UserError if the file is missing or has another form.
    """
    rows = list(_rows(path))
    if not rows or any(len(row) != 2 for row in rows) or not rows[-1][0].startswith("/"):
        raise UserError(f"--classes {path}: must have lines like /m/0bt9lr,Dog.")
    return {label: name for label, name in rows if label.startswith("/")}


def read_labels(
    path: Path, images: set[str], confidence: float, classes: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Return labels of at least this confidence by image, as {image: {label: 1.0}}.

    Files list millions of images and labels other than `images` and `classes`; these are skipped.
    Raises UserError if the file is missing or has another form.
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
        with (
            open_bounded(path) as data,
            io.TextIOWrapper(data, encoding="utf-8", newline="") as file,
        ):
            yield from csv.reader(Lines(file))
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, TooLongError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error


def _best(labels: Mapping[str, float], counts: Mapping[str, int]) -> str:
    """Return the label with the highest confidence, then the lowest count."""
    return min(labels, key=lambda label: (-labels[label], counts[label], label))


def _image_id(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]
