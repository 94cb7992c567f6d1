"""WebDataset: tars in which the image, caption and JSON of an example share a name but the suffix.

https://github.com/webdataset/webdataset. The tars of img2dataset hold KEY.jpg, KEY.txt with the
caption, and KEY.json with url, caption, width and more.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cap_pretrain.data import tar_examples
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.files import UNREADABLE, distinct_names, open_files
from cap_pretrain.data.builders.formats import annotated, pairs
from cap_pretrain.data.builders.units import Part
from cap_pretrain.data.examples import pair_id
from cap_pretrain.data.tars import CutOffError, read_members
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import parse_json

_PARSED = 24  # bytes in memory for a byte of JSON, at most: lists of empty lists
_TARS = (".tar", ".tar.gz", ".tgz")


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
    is `examples.pair_id`, which does not depend on the shard; else it is SHARD/KEY.
    """
    key = "its start"
    try:
        for key, found in tar_examples.examples(_members(path)):
            yield _candidate(f"{shard}/{key}", found)
    except CutOffError as error:
        file = f"{path.name} after {key} ({error})"
        yield pairs.dropped(shard, file, "rest of a tar that is cut off")


def _members(path: Path) -> Iterator[tuple[str, bytes | None]]:
    return read_members(path, lambda name: tar_examples.limit(tar_examples.split(name)[1]))


def _candidate(name: str, found: tar_examples.Found[bytes]) -> Candidate:
    """Return the candidate made of an example's files by suffix."""
    images = tar_examples.images(found)
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
        example_id=pair_id(url, captions) if url and isinstance(url, str) else name,
        file=name + images[0],
        captions=captions,
        read=lambda: image,
        fields=metadata,
        held=len(image) + len(text) + _PARSED * len(about),
    )
