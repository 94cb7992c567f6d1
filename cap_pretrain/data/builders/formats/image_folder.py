"""Labeled images in one folder per class: "n0144/1.jpg", or "train/n0144/1.jpg" in an archive."""

import argparse
import collections
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cap_pretrain.data.builders import base
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.files import image_names, open_files
from cap_pretrain.errors import UserError
from cap_pretrain.files import read_json
from cap_pretrain.untrusted import printable

# Names of folders that hold a split rather than a class.
_SPLITS = frozenset(
    ["train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"]
)


class Dataset(base.ImageDataset):
    """Images with one label each, given by their folder; for `classes`, see `class_names`."""

    def __init__(self, images: Mapping[str, Path], classes: Path | None = None, **kwargs: Any):
        origin = ", ".join(path.name for path in images.values())
        self._files = {split: open_files(path) for split, path in images.items()}
        self._members = {
            split: classified(image_names(files), split, images)
            for split, files in self._files.items()
        }
        self._folders = sorted({c for members in self._members.values() for _, c in members})
        if not any(self._folders):
            raise UserError(f"{origin}: the images are not in class folders (CLASS/NAME.jpg).")
        self._names = class_names([f for f in self._folders if f], classes)
        super().__init__(**kwargs, origin=origin)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare --images and --classes."""
        parser.add_argument(
            "--images",
            nargs="+",
            required=True,
            metavar="SPLIT=DIR_OR_ZIP",
            help="folder or zip with a folder per class; without SPLIT= it is train",
        )
        parser.add_argument(
            "--classes", type=Path, metavar="JSON", help='readable names: {"n01440764": "tench", …}'
        )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        return cls(by_split("--images", args.images, default="train"), args.classes, **kwargs)

    def splits(self) -> dict[str, int]:
        """Return the number of images by split."""
        return {s: len(own) + len(self._files[s].skipped()) for s, own in self._members.items()}

    def candidates(self, split: str) -> Iterator[Candidate]:
        """Yield a candidate for each image."""
        files = self._files[split]
        for name, folder in self._members[split]:
            yield Candidate(
                id=name,
                file=name,
                read=functools.partial(files.read, name),
                features={"label": self._names[folder]} if folder else {},
                problem="" if folder else "without class folder",
            )
        for name, why in self._files[split].skipped().items():
            yield Candidate(name, name, read=bytes, features={}, problem=why)

    def features(self) -> dict[str, Any]:
        """Return the feature "label"."""
        return {"label": tfds.features.ClassLabel(names=list(self._names.values()))}

    def description(self) -> str:
        """Return one sentence that names the input files."""
        return f"Images of {len(self._names)} classes, built from {self._origin}."


def classified(
    names: Sequence[str], split: str, splits: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Return (name, class folder) of the files that belong to a split.

    Folders around the class folders are skipped: one that holds everything; or one named like the
    split, in which case files outside of it belong to other splits. A folder of that name whose
    neighbors are called neither like one of `splits` nor like usual ones is a class. The class
    folder of a file in none is "".
    """
    members = [(name, name.split("/")) for name in names]
    at = {parts.index(split) for _, parts in members if split in parts[:-2]}
    known = _SPLITS | set(splits)
    if any(_among_splits(members, split, level, known) for level in at):
        members = [(n, p[p.index(split) + 1 :]) for n, p in members if split in p[:-1]]
    while len({parts[0] for _, parts in members}) == 1 and all(len(p) > 2 for _, p in members):
        members = [(n, p[1:]) for n, p in members]
    return [(n, p[0] if len(p) > 1 else "") for n, p in members]


def _among_splits(
    members: Sequence[tuple[str, list[str]]], split: str, level: int, known: Collection[str]
) -> bool:
    """Return whether the folder `split` is alone at its level, or beside one named like a split."""
    beside = {parts[level] for _, parts in members if len(parts) > level + 1} - {split}
    return not beside or not beside.isdisjoint(known)


def class_names(folders: Sequence[str], path: Path | None) -> dict[str, str]:
    """Return a distinct name for each class folder, in the order of `folders`.

    The JSON file `path` is {folder: readable name}; without it, names are those of the folders. If
    two have the same readable name (ImageNet has two classes "crane"), the folder is appended.
    Raises UserError if the file has another form, or lacks a folder.
    """
    if path is None:
        return disambiguated({folder: folder for folder in folders})
    names = read_json(path)
    if not isinstance(names, dict):
        raise UserError(f"--classes {path}: must be an object of folder: name.")
    unnamed = [folder for folder in folders if not isinstance(names.get(folder), str)]
    if unnamed:
        raise UserError(f"--classes {path}: no name for the folder {unnamed[0]!r}; add it.")
    return disambiguated({folder: names[folder] for folder in folders})


def disambiguated(names: Mapping[str, str]) -> dict[str, str]:
    """Return the names, printable, with the key appended to those that several keys share.

    TFDS keeps names as stripped lines of UTF-8; those of folders may be blank, have line breaks, or
    be no UTF-8.
    """
    names = {key: printable(name.strip() or repr(name)) for key, name in names.items()}
    counts = collections.Counter(names.values())
    return {
        k: name if counts[name] == 1 else f"{name} ({printable(k)})" for k, name in names.items()
    }
