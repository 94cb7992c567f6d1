"""COCO-style captions: images by {"id", "file_name"}, captions by {"image_id", "caption"}."""

import argparse
import collections
import functools
import gzip
import json
import posixpath
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cap_pretrain.data.builders import base
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.files import Files, open_files
from cap_pretrain.errors import UserError


class Dataset(base.ImageDataset, skip_registration=True):
    """Images with one or more captions each."""

    HOMEPAGE = "https://cocodataset.org/#format-data"

    def __init__(self, annotations: Mapping[str, Path], images: Mapping[str, Path], **kwargs: Any):
        """`annotations` and `images` are by split; the images of "" serve all other splits."""
        self._origin = ", ".join(path.name for path in annotations.values())
        self._captioned = {split: read_captions(path) for split, path in annotations.items()}
        self._images = {split: open_files(path) for split, path in images.items()}
        for split in annotations:
            if split not in images and "" not in images:
                raise UserError(f"--images: none for split {split!r}; add {split}=FOLDER_OR_ZIP.")
        for split in set(images) - set(annotations) - {""}:
            raise UserError(f"--annotations: none for split {split!r}; add {split}=FILE.json.")
        super().__init__(**kwargs)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--annotations",
            nargs="+",
            required=True,
            metavar="SPLIT=JSON",
            help="captions in COCO's format, .json or .json.gz; without SPLIT= it is train",
        )
        parser.add_argument(
            "--images",
            nargs="+",
            required=True,
            metavar="SPLIT=DIR_OR_ZIP",
            help="folder or zip of the images; without SPLIT= it serves all splits",
        )

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        annotations = by_split("--annotations", args.annotations, default="train")
        return cls(annotations, by_split("--images", args.images, default=""), **kwargs)

    def splits(self) -> dict[str, int]:
        return {split: len(images) for split, images in self._captioned.items()}

    def candidates(self, split: str) -> Iterator[base.Candidate]:
        files = self._images.get(split) or self._images[""]
        find = _finder(files)
        for image_id, file_name, captions in self._captioned[split]:
            yield base.Candidate(
                id=image_id,
                file=file_name,
                read=functools.partial(_read, files, find, file_name),
                features={"captions": captions},
                problem=_problem(file_name, captions),
            )

    def features(self) -> dict[str, Any]:
        return {"captions": tfds.features.Sequence(tfds.features.Text())}

    def description(self) -> str:
        return f"Images with captions, built from {self._origin}."


def read_captions(path: Path) -> list[tuple[str, str, list[str]]]:
    """Reads a COCO-captions file, plain or gzipped.

    Returns:
        (id, file name, captions) of each image in the order of the file; captions are stripped,
        empty ones left out, so an image may have none. Captions of images that are not listed
        follow, with an empty file name.

    Raises:
        UserError: no such file, no JSON, or not laid out as COCO captions.
    """
    content = _read_json(path)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
            raise UserError(f"{path}: no list {key!r} in it (found: {found}); is it COCO captions?")
    captions = collections.defaultdict(list)
    for entry in content["annotations"]:
        image_id, caption = _take(path, "annotations", entry, "image_id", "caption")
        if isinstance(caption, str) and caption.strip():
            captions[str(image_id)].append(caption.strip())
    images = [_take(path, "images", entry, "id", "file_name") for entry in content["images"]]
    rows = [(str(i), str(file_name), captions.get(str(i), [])) for i, file_name in images]
    listed = {image_id for image_id, _, _ in rows}
    return rows + [(i, "", unlisted) for i, unlisted in captions.items() if i not in listed]


def _problem(file_name: str, captions: list[str]) -> str:
    if not file_name:
        return "captioned but not listed"
    return "" if captions else "without captions"


def _read_json(path: Path) -> Any:
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        return json.loads(data)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    except ValueError as error:  # also of the text encoding
        raise UserError(f"{path}: is not JSON ({error}).") from error


def _take(path: Path, where: str, entry: Any, *keys: str) -> list[Any]:
    try:
        return [entry[key] for key in keys]
    except (KeyError, TypeError) as error:
        found = ", ".join(entry) if isinstance(entry, dict) else repr(entry)[:50]
        raise UserError(
            f"{path}: an entry of {where!r} lacks {' or '.join(keys)} (found: {found}); "
            "is it COCO captions?"
        ) from error


def _finder(files: Files) -> Mapping[str, str]:
    """Maps base names that occur once to full names: archives often add a folder ("val2014/…")."""
    names = files.names()
    counts = collections.Counter(map(posixpath.basename, names))
    unique = {posixpath.basename(n): n for n in names if counts[posixpath.basename(n)] == 1}
    return {**unique, **{name: name for name in names}}


def _read(files: Files, find: Mapping[str, str], file_name: str) -> bytes:
    name = find.get(file_name) or find.get(posixpath.basename(file_name))
    if name is None:
        raise FileNotFoundError(file_name)
    return files.read(name)
