"""What formats have in common whose annotations name their images: captions, questions."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cap_pretrain.data.builders import base
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.files import Finder, open_files
from cap_pretrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the annotations say of an example.

    Attributes:
        id: unique within the split.
        files: names of its images; most formats have one.
        captions: of the image, or answers to the question.
        question: what is asked, in formats that ask.
        kind: of the question; "": none.
        problem: a reason to drop the example, or "".
    """

    id: str
    files: tuple[str, ...]
    captions: Sequence[str]
    question: str = ""
    kind: str = ""
    problem: str = ""


class Annotated(base.ImageDataset, skip_registration=True):
    """Images with what `entries` says of them. A subclass reads the entries."""

    def __init__(
        self,
        entries: Mapping[str, Sequence[Entry]],
        images: Mapping[str, Finder],
        origin: str,
        **kwargs: Any,
    ):
        """`entries` and `images` are by split; the images of "" serve all other splits."""
        self._entries, self._images, self._origin = entries, images, origin
        self._kinds = sorted({e.kind for split in entries.values() for e in split if e.kind})
        super().__init__(**kwargs)

    def splits(self) -> dict[str, int]:
        return {split: len(entries) for split, entries in self._entries.items()}

    def candidates(self, split: str) -> Iterator[Candidate]:
        finder = self._images.get(split) or self._images[""]
        for entry in self._entries[split]:
            yield Candidate(
                id=entry.id,
                file=", ".join(entry.files),
                read=functools.partial(self.picture, finder, entry.files),
                features=self.values(entry),
                problem=entry.problem,
            )

    def picture(self, finder: Finder, names: Sequence[str]) -> bytes:
        """Returns the encoded image of an example; raises as `Candidate.read`."""
        (name,) = names
        return finder.read(name)

    def values(self, entry: Entry) -> dict[str, Any]:
        """The features of an entry."""
        return {"captions": list(entry.captions)}

    def features(self) -> dict[str, Any]:
        return {"captions": tfds.features.Sequence(tfds.features.Text())}

    def description(self) -> str:
        return f"Images with captions, built from {self._origin}."


class Questions(Annotated, skip_registration=True):
    """One example a question; its captions are the answers, its label is the question's kind."""

    def __init__(
        self,
        entries: Mapping[str, Sequence[Entry]],
        images: Mapping[str, Finder],
        origin: str,
        **kwargs: Any,
    ):
        """As `Annotated`; a split without any answer is one whose answers are secret."""
        checked = {split: _with_problems(own) for split, own in entries.items()}
        super().__init__(checked, images, origin, **kwargs)

    def values(self, entry: Entry) -> dict[str, Any]:
        label = {"label": entry.kind or -1} if self._kinds else {}
        return super().values(entry) | {"question": entry.question} | label

    def features(self) -> dict[str, Any]:
        label = {"label": tfds.features.ClassLabel(names=self._kinds)} if self._kinds else {}
        return super().features() | {"question": tfds.features.Text()} | label

    def description(self) -> str:
        return f"Questions about images, built from {self._origin}."


def _with_problems(entries: Sequence[Entry]) -> list[Entry]:
    answered = any(entry.captions for entry in entries)

    def problem(entry: Entry) -> str:
        if not entry.question:
            return "without question"
        return "without answer" if answered and not entry.captions else ""

    return [dataclasses.replace(e, problem=e.problem or problem(e)) for e in entries]


def add_paths(parser: argparse.ArgumentParser, flag: str, what: str, required: bool = True) -> None:
    """Declares an option that takes a path for each split."""
    parser.add_argument(flag, nargs="+", required=required, metavar="SPLIT=PATH", help=what)


IMAGES_HELP = "folder or zip of the images; without SPLIT= it serves all splits"


def open_images(
    images: Mapping[str, Path],
    splits: Collection[str],
    flag: str,
    key: Callable[[str], str] | None = None,
) -> dict[str, Finder]:
    """Opens the images by split; those of "" serve all other splits.

    Args:
        images: a folder or zip by split.
        splits: that have annotations.
        flag: that names the annotations, for messages.
        key: of `Finder`.

    Raises:
        UserError: a split without images, images without annotations, no folder or zip.
    """
    opened = {split: Finder([open_files(path)], key) for split, path in images.items()}
    for split in splits:
        if split not in images and "" not in images:
            raise UserError(f"--images: none for split {split!r}; add {split}=FOLDER_OR_ZIP.")
    for split in set(images) - set(splits) - {""}:
        raise UserError(f"{flag}: none for split {split!r}; add {split}=FILE.json.")
    return opened


def entries_of(path: Path, content: Any, key: str, what: str) -> list[Any]:
    """Returns the list `key` of an object; raises UserError that this is not `what` without it."""
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: no list {key!r} in it (found: {found[:80]}); is it {what}?")
    return content[key]


def take(path: Path, where: str, entry: Any, *keys: str, what: str) -> list[Any]:
    """Returns the values of an entry of the list `where`; raises UserError if it lacks some."""
    try:
        return [entry[key] for key in keys]
    except (KeyError, TypeError) as error:
        found = ", ".join(entry) if isinstance(entry, dict) else repr(entry)[:50]
        raise UserError(
            f"{path}: an entry of {where!r} lacks {' or '.join(keys)} (found: {found}); "
            f"is it {what}?"
        ) from error


def texts_of(path: Path, where: str, entries: Any, key: str, what: str) -> list[str]:
    """`texts` of what each entry of a list within an entry has as `key`; raises as `take`."""
    entries = entries if isinstance(entries, list) else [entries]
    return texts([take(path, where, entry, key, what=what)[0] for entry in entries])


def texts(values: Any) -> list[str]:
    """The texts in a list that say something, without white space around them."""
    values = values if isinstance(values, list) else [values]
    return [value.strip() for value in values if isinstance(value, str) and value.strip()]
