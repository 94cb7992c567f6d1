"""WebDataset: tars in which the image, caption and JSON of an example share a name but the suffix.

https://github.com/webdataset/webdataset. The tars of img2dataset hold KEY.jpg, KEY.txt with the
caption, and KEY.json with url, caption, width and more.
"""

import argparse
import functools
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.files import (
    IMAGE_SUFFIXES,
    MAX_BYTES,
    UNREADABLE,
    distinct_names,
    open_files,
)
from cap_pretrain.data.builders.formats import annotated, pairs
from cap_pretrain.data.builders.tars import CutOffError, read_members
from cap_pretrain.data.builders.units import Part
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import parse_json

MAX_TEXT = 2**22
"""Largest .txt or .json of an example, in bytes."""

_PARSED = 24  # bytes in memory for a byte of JSON, at most: lists of empty lists
_TARS = (".tar", ".tar.gz", ".tgz")
_Found = Mapping[str, bytes | None]
"""Files of an example by suffix; None: not read, since it is too large or not needed."""
_TEXTS = frozenset([".txt", ".json"])  # files that hold captions


class Dataset(pairs.Pairs):
    """Images with captions from a tar or folder of tars by split, read once and sequentially."""

    HOMEPAGE = "https://github.com/webdataset/webdataset"

    def __init__(self, shards: Mapping[str, Path], **kwargs: Any):
        super().__init__(parts(shards), ", ".join(path.name for path in shards.values()), **kwargs)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare --shards."""
        what = "a tar, also .gz, or a folder of tars; without SPLIT= it is train"
        annotated.add_paths(parser, "--shards", what)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        return cls(by_split("--shards", args.shards, default="train"), **kwargs)


def parts(shards: Mapping[str, Path]) -> dict[str, list[Part]]:
    """Return a part for each tar, by split; see `Dataset`."""
    return {
        split: [
            Part(functools.partial(candidates, shard, tar), source=tar)
            for shard, tar in tars(path).items()
        ]
        for split, path in shards.items()
    }


def tars(path: Path) -> dict[str, Path]:
    """Return a tar, or the sorted tars of a folder, by name without suffix.

    Raises UserError if there is no tar.
    """
    if path.is_file():
        return {path.name.partition(".")[0]: path}
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder.")
    files = open_files(path)  # also those behind symbolic links
    if unreadable := [f for f, why in files.skipped().items() if why == UNREADABLE]:
        raise UserError(f"{path / unreadable[0]}: cannot be read; change its permissions.")
    found = sorted(path / name for name in files.names() if name.lower().endswith(_TARS))
    if not found:
        raise UserError(f"{path}: no tar in it ({', '.join(_TARS)}).")

    def name(tar: Path, base: str) -> str:
        return tar.with_name(base).relative_to(path).as_posix()

    return distinct_names(
        found,
        lambda p: name(p, p.name.partition(".")[0]),
        lambda p: name(p, p.name.partition(".tar")[0]),  # cc12m.00000.tar, cc12m.00001.tar
        lambda p: name(p, p.name),  # 00000.tar beside 00000.tar.gz
    )


def candidates(shard: str, path: Path) -> Iterator[Candidate]:
    """Yield a candidate for each example of the tar `path`, called `shard` in ids, in order.

    At the end is a dropped one if the tar ends early. If the JSON of an example has a URL, the id
    is `pairs.pair_id`, which does not depend on the shard; else it is SHARD/KEY.
    """
    key = "its start"
    try:
        for group in _groups(path):
            for key, found in _examples(*group):
                yield _candidate(f"{shard}/{key}", found)
    except CutOffError as error:
        file = f"{path.name} after {key} ({error})"
        yield pairs.dropped(shard, file, "rest of a tar that is cut off")


def _groups(path: Path) -> Iterator[tuple[str, _Found]]:
    """Yield each key of a tar and its files by suffix; may raise CutOffError at the end.

    Further images are kept only if their suffix is longer (.seg.png), up to MAX_BYTES of a key. If
    keys have dots themselves (a.v1.jpg, a.v1.txt, …), each ends when it has an image and a text.
    """
    key, last, more = "", "", 0
    found: dict[str, bytes | None] = {}
    try:
        for own, suffix, data in _members(path):
            stem = suffix.rpartition(".")[0]
            ended = stem != last and last in _dotted(found)
            if found and (own != key or suffix in found or ended):
                yield key, found
                found, more = {}, 0
            key, last = own, stem
            if suffix not in IMAGE_SUFFIXES:
                more += len(data or b"")
                data = None if more > MAX_BYTES else data
            if suffix not in IMAGE_SUFFIXES or not _images(found):  # the first image is used
                found[suffix] = data
    except CutOffError:
        if found:
            yield key, found
        raise
    if found:
        yield key, found


def _examples(key: str, found: _Found) -> Iterator[tuple[str, _Found]]:
    """Divide the files of a key into examples, each with its key.

    As WebDataset has it, the suffix begins at the first dot (a.jpg, a.seg.png, a.txt). But keys
    that have dots themselves (a.v1.jpg, a.v1.txt, a.v2.jpg, a.v2.txt) are examples of their own.
    """
    own = _dotted(found)
    whole = {s: data for s, data in found.items() if s.rpartition(".")[0] not in own}
    if whole:
        yield key, whole
    yield from ((key + stem, files) for stem, files in own.items())


def _dotted(found: _Found) -> dict[str, dict[str, bytes | None]]:
    """Return the files by suffix of each longer stem that has an image and a text."""
    by_stem: dict[str, dict[str, bytes | None]] = {}
    for suffix, data in found.items():
        stem, _, last = suffix.rpartition(".")
        if stem:
            by_stem.setdefault(stem, {})["." + last] = data
    return {
        stem: files
        for stem, files in by_stem.items()
        if not IMAGE_SUFFIXES.isdisjoint(files) and not _TEXTS.isdisjoint(files)
    }


def _members(path: Path) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield (key, suffix, content) of the files that are not hidden."""
    for name, data in read_members(path, lambda name: _limit(_split(name)[1])):
        key, suffix = _split(name)
        if posixpath.basename(key) and "__MACOSX" not in posixpath.dirname(name):
            yield key, suffix, data


def _split(name: str) -> tuple[str, str]:
    """Return the key of a file and its suffix in lower case."""
    folder, base_name = posixpath.split(name)
    stem, _, suffix = base_name.partition(".")
    return posixpath.join(folder, stem).removeprefix("./"), "." + suffix.lower()


def _limit(suffix: str) -> int:
    """Return the number of bytes up to which a file is read; -1 if it is not needed."""
    suffix = posixpath.splitext("x" + suffix)[1]
    if suffix in IMAGE_SUFFIXES:
        return MAX_BYTES
    return MAX_TEXT if suffix in _TEXTS else -1


def _images(found: _Found) -> list[str]:
    return [suffix for suffix in found if suffix in IMAGE_SUFFIXES]


def _candidate(name: str, found: _Found) -> Candidate:
    """Return the candidate made of an example's files by suffix."""
    images = _images(found)
    text, about = found.get(".txt", b""), found.get(".json", b"{}")
    image = found[images[0]] if images else b""
    if image is None or text is None or about is None:
        return pairs.dropped(name, name, "member too large")
    try:
        metadata = parse_json(about, name)
    except UserError:
        return pairs.dropped(name, name, "broken json")
    metadata = metadata if isinstance(metadata, dict) else {}
    if not images:
        return pairs.dropped(name, name, "without image")
    captions = annotated.texts([text.decode("utf-8", "surrogateescape")]) or annotated.texts(
        metadata.get("caption")
    )
    url = metadata.get("url")
    return pairs.candidate(
        example_id=pairs.pair_id(url, captions) if url and isinstance(url, str) else name,
        file=name + images[0],
        captions=captions,
        read=lambda: image,
        fields=metadata,
        held=len(image) + len(text) + _PARSED * len(about),
    )
