"""How the files of a WebDataset's tar are grouped into examples, whether or not they are read."""

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TypeVar

from cap_pretrain.data.image_files import IMAGE_SUFFIXES, MAX_BYTES
from cap_pretrain.data.tars import CutOffError

T = TypeVar("T", bound=Sized)

Found = Mapping[str, T | None]
"""Files of an example by suffix; None: not read, since it is too large or not needed."""

MAX_TEXT = 2**22
"""Largest .txt, .json or .cls of an example, in bytes."""

TEXTS = frozenset([".txt", ".json"])
"""Suffixes of files that hold captions."""

LABEL = ".cls"
"""The suffix of a file that holds the number of a class."""


def examples(members: Iterable[tuple[str, T | None]]) -> Iterator[tuple[str, Found[T]]]:
    """Yield each example of a tar: its key, and its files by suffix.

    As WebDataset has it, the suffix begins at the first dot (a.jpg, a.seg.png, a.txt). But keys
    that have dots themselves (a.v1.jpg, a.v1.txt, a.v2.jpg, a.v2.txt) are examples of their own.

    Args:
        members: (name, file) in the order of the tar; None if a file was not read.

    Raises:
        CutOffError: reading `members` raises it; raised after the last example.
    """
    for key, found in _groups(members):
        own = _dotted(found)
        whole = {s: data for s, data in found.items() if s.rpartition(".")[0] not in own}
        if whole:
            yield key, whole
        yield from ((key + stem, files) for stem, files in own.items())


def split(name: str) -> tuple[str, str]:
    """Return the key of a file and its suffix in lower case."""
    folder, base_name = posixpath.split(name)
    stem, _, suffix = base_name.partition(".")
    return posixpath.join(folder, stem).removeprefix("./"), "." + suffix.lower()


def limit(suffix: str) -> int:
    """Return the number of bytes up to which a file is read; -1 if no example needs it."""
    suffix = posixpath.splitext("x" + suffix)[1]
    if suffix in IMAGE_SUFFIXES:
        return MAX_BYTES
    return MAX_TEXT if suffix in TEXTS else -1


def images(found: Found[T]) -> list[str]:
    """Return the suffixes of an example's images; the first one is used."""
    return [suffix for suffix in found if suffix in IMAGE_SUFFIXES]


def _groups(members: Iterable[tuple[str, T | None]]) -> Iterator[tuple[str, Found[T]]]:
    """Yield each key of a tar and its files by suffix; may raise CutOffError at the end.

    Further images are kept only if their suffix is longer (.seg.png), up to MAX_BYTES of a key. If
    keys have dots themselves (a.v1.jpg, a.v1.txt, …), each ends when it has an image and a text.
    """
    key, last, more = "", "", 0
    found: dict[str, T | None] = {}
    try:
        for name, data in members:
            own, suffix = split(name)
            if not posixpath.basename(own) or "__MACOSX" in posixpath.dirname(name):  # hidden
                continue
            stem = suffix.rpartition(".")[0]
            ended = stem != last and last in _dotted(found)
            if found and (own != key or suffix in found or ended):
                yield key, found
                found, more = {}, 0
            key, last = own, stem
            if suffix not in IMAGE_SUFFIXES:
                more += len(data) if data is not None else 0
                data = None if more > MAX_BYTES else data
            if suffix not in IMAGE_SUFFIXES or not images(found):  # the first image is used
                found[suffix] = data
    except CutOffError:
        if found:
            yield key, found
        raise
    if found:
        yield key, found


def _dotted(found: Found[T]) -> dict[str, dict[str, T | None]]:
    """Return the files by suffix of each longer stem that has an image and a text."""
    by_stem: dict[str, dict[str, T | None]] = {}
    for suffix, data in found.items():
        stem, _, last = suffix.rpartition(".")
        if stem:
            by_stem.setdefault(stem, {})["." + last] = data
    return {
        stem: files
        for stem, files in by_stem.items()
        if not IMAGE_SUFFIXES.isdisjoint(files) and not TEXTS.isdisjoint(files)
    }
