"""WebDataset: tars of images, captions and json, members of one example named alike; img2dataset's.

https://github.com/webdataset/webdataset; img2dataset writes KEY.jpg, KEY.txt with the caption, and
KEY.json with url, caption, width and more.
"""

import argparse
import functools
import json
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.files import IMAGE_SUFFIXES
from cap_pretrain.data.builders.formats import annotated, pairs
from cap_pretrain.data.builders.tars import CutOff, read_members
from cap_pretrain.data.builders.units import Part
from cap_pretrain.errors import UserError

_TARS = (".tar", ".tar.gz", ".tgz")


class Dataset(pairs.Pairs, skip_registration=True):
    """Images with captions out of tars, read once from the first byte to the last."""

    HOMEPAGE = "https://github.com/webdataset/webdataset"

    def __init__(self, shards: Mapping[str, Path], **kwargs: Any):
        """`shards` are by split: a tar, or a folder of them. Raises UserError if there is none."""
        super().__init__(parts(shards), ", ".join(path.name for path in shards.values()), **kwargs)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        what = "a tar, also .gz, or a folder of them; without SPLIT= it is train"
        annotated.add_paths(parser, "--shards", what)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        return cls(by_split("--shards", args.shards, default="train"), **kwargs)


def parts(shards: Mapping[str, Path]) -> dict[str, list[Part]]:
    """The tars of each split. See `Dataset`."""
    return {
        split: [
            Part(functools.partial(candidates, shard, tar), source=tar)
            for shard, tar in tars(path).items()
        ]
        for split, path in shards.items()
    }


def tars(path: Path) -> dict[str, Path]:
    """Returns a tar, or those of a folder in alphabetical order, by name without suffix.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return {path.name.partition(".")[0]: path}
    found = sorted(p for p in path.rglob("*") if p.name.endswith(_TARS))
    if not found:
        what = "no tar in it" if path.is_dir() else "no such file or folder"
        raise UserError(f"{path}: {what} ({', '.join(_TARS)}).")
    return {(p.parent / p.name.partition(".")[0]).relative_to(path).as_posix(): p for p in found}


def candidates(shard: str, path: Path) -> Iterator[Candidate]:
    """Yields an example for each key of a tar, and one that is lost if it ends early.

    Ids are those of URL and captions where the json has a URL, so that it does not matter in which
    shard an image is; else SHARD/KEY.
    """
    key = "its start"
    try:
        for key, found in _examples(path):
            yield _candidate(f"{shard}/{key}", found)
    except CutOff as error:
        file = f"{path.name} after {key} ({error})"
        yield pairs.lost(shard, file, "rest of a tar that is cut off")


def _examples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields key and files, by suffix, of each example; raises CutOff after the last."""
    key, found = "", {}
    try:
        for own, suffix, data in _members(path):
            if found and own != key:
                yield key, found
                found = {}
            key, found[suffix] = own, data
    except CutOff:
        if found:
            yield key, found
        raise
    if found:
        yield key, found


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yields (key, suffix, content) of the files that are not hidden."""
    for name, data in read_members(path):
        folder, base_name = posixpath.split(name)
        stem, _, suffix = base_name.partition(".")
        if stem and "__MACOSX" not in folder:
            yield posixpath.join(folder, stem).removeprefix("./"), "." + suffix.lower(), data


def _candidate(name: str, found: Mapping[str, bytes]) -> Candidate:
    try:
        about = json.loads(found.get(".json", b"{}"))
    except ValueError:
        return pairs.lost(name, name, "broken json")
    about = about if isinstance(about, dict) else {}
    images = [suffix for suffix in found if suffix in IMAGE_SUFFIXES]
    if not images:
        return pairs.lost(name, name, "without image")
    text = found.get(".txt", b"").decode("utf-8", "replace")
    captions = annotated.texts([text]) or annotated.texts(about.get("caption"))
    url = about.get("url")
    return pairs.candidate(
        id=pairs.pair_id(url, captions) if url and isinstance(url, str) else name,
        file=name + images[0],
        captions=captions,
        read=lambda: found[images[0]],
        fields=about,
    )
