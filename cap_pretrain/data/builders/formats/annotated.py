"""Shared parts of formats whose annotations name their images: captions and questions."""

import argparse
import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cap_pretrain import untrusted
from cap_pretrain.data.builders import base
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.files import Finder, open_files
from cap_pretrain.data.examples import texts
from cap_pretrain.data.regions import Region
from cap_pretrain.errors import UserError

IMAGES_HELP = "folder or zip of the images; without SPLIT= it serves all splits"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The annotations of one example."""

    id: str  # unique within the split
    files: tuple[str, ...]  # names of its images; in most formats just one
    captions: Sequence[str]  # of the image, or answers to the question
    question: str = ""
    kind: str = ""  # type of the question; "": none
    problem: str = ""  # a reason to drop the example, or ""
    regions: Sequence[Region] = ()  # see `located`
    left_out: Sequence[str] = ()  # reasons why regions are not among them


class Annotated(base.ImageDataset):
    """Images with captions from annotations (`entries` by split), which subclasses read.

    The images of "" serve all splits that have none of their own.
    """

    def __init__(
        self,
        entries: Mapping[str, Sequence[Entry]],
        images: Mapping[str, Finder],
        origin: str,
        **kwargs: Any,
    ):
        self._entries, self._images = entries, images
        self._kinds = sorted({e.kind for split in entries.values() for e in split if e.kind})
        super().__init__(**kwargs, origin=origin)

    def splits(self) -> dict[str, int]:
        """Return the number of entries by split."""
        return {split: len(entries) for split, entries in self._entries.items()}

    def candidates(self, split: str) -> Iterator[Candidate]:
        """Yield a candidate for each entry."""
        finder = self._images.get(split) or self._images[""]
        for entry in self._entries[split]:
            yield Candidate(
                id=entry.id,
                file=", ".join(entry.files),
                read=functools.partial(self.picture, finder, entry.files),
                features=self.values(entry),
                problem=entry.problem,
                left_out=tuple(entry.left_out),
            )

    def picture(self, finder: Finder, names: Sequence[str]) -> bytes:
        """Return the encoded image of an example; raises like `Candidate.read`."""
        (name,) = names
        return finder.read(name)

    def values(self, entry: Entry) -> dict[str, Any]:
        """Return the features of an entry, JSON-serializable."""
        return {"captions": list(entry.captions)}


class SharedImages(Annotated):
    """Images with captions where all splits share the folders and zips of images.

    If several of these have a file of the same name, the first wins.
    """

    def __init__(
        self,
        entries: Mapping[str, Sequence[Entry]],
        images: Sequence[Path],
        origin: str,
        **kwargs: Any,
    ):
        finder = Finder([open_files(path) for path in images])
        super().__init__(entries, {"": finder}, origin, **kwargs)

    @staticmethod
    def add_images(parser: argparse.ArgumentParser, example: str = "") -> None:
        """Declare --images; `example` ends its help text."""
        what = f"folders or zips that contain the images{example}"
        parser.add_argument(
            "--images", nargs="+", required=True, type=Path, metavar="DIR_OR_ZIP", help=what
        )


class Questions(Annotated):
    """One example per question: its captions are the answers, its label is the type of question.

    If no entry of a split has an answer, the answers of that split are secret; otherwise questions
    without an answer are dropped.
    """

    def __init__(
        self,
        entries: Mapping[str, Sequence[Entry]],
        images: Mapping[str, Finder],
        origin: str,
        **kwargs: Any,
    ):
        checked = {split: _with_problems(own) for split, own in entries.items()}
        super().__init__(checked, images, origin, **kwargs)

    def values(self, entry: Entry) -> dict[str, Any]:
        """Return answers, question and, if the format has types of questions, the label."""
        label = {"label": entry.kind or -1} if self._kinds else {}
        return super().values(entry) | {"question": entry.question} | label

    def features(self) -> dict[str, Any]:
        """Return the features "captions", "question" and perhaps "label"."""
        label = {"label": tfds.features.ClassLabel(names=self._kinds)} if self._kinds else {}
        return super().features() | {"question": tfds.features.Text()} | label

    def description(self) -> str:
        """Return one sentence that names the input files."""
        return f"Questions about images, built from {self._origin}."


class QuestionFiles(Questions):
    """Questions with their answers, in one file per split; subclasses say how to read it.

    The images of "" serve all splits that have none of their own.
    """

    QUESTIONS_HELP: str  # of the option --questions

    def __init__(self, questions: Mapping[str, Path], images: Mapping[str, Path], **kwargs: Any):
        super().__init__(
            {split: self.read(path) for split, path in questions.items()},
            open_images(images, questions, "--questions", self.image_key),
            origin=", ".join(path.name for path in questions.values()),
            **kwargs,
        )

    @staticmethod
    def read(path: Path) -> list[Entry]:
        """Return the questions of a file in order; raises UserError if it is invalid."""
        raise NotImplementedError

    @staticmethod
    def image_key(base_name: str) -> str:
        """Return the name by which questions refer to an image file."""
        return base_name

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare --questions and --images."""
        add_paths(parser, "--questions", cls.QUESTIONS_HELP)
        add_paths(parser, "--images", IMAGES_HELP)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "QuestionFiles":
        """Construct the builder from parsed options."""
        questions = by_split("--questions", args.questions, default="train")
        return cls(questions, by_split("--images", args.images, default=""), **kwargs)


def _with_problems(entries: Sequence[Entry]) -> list[Entry]:
    """Mark questions that are empty or, unless the whole split is unanswered, unanswered.

    Types of questions become names of classes, which TFDS keeps as stripped lines of UTF-8.
    """
    answered = any(entry.captions for entry in entries)

    def problem(entry: Entry) -> str:
        if not entry.question:
            return "without question"
        return "without answer" if answered and not entry.captions else ""

    return [
        dataclasses.replace(
            e, problem=e.problem or problem(e), kind=untrusted.printable(e.kind.strip())
        )
        for e in entries
    ]


def add_paths(parser: argparse.ArgumentParser, flag: str, what: str, required: bool = True) -> None:
    """Declare an option with the help text `what` that takes a path by split (`by_split`)."""
    parser.add_argument(flag, nargs="+", required=required, metavar="SPLIT=PATH", help=what)


def open_images(
    images: Mapping[str, Path],
    splits: Collection[str],
    flag: str,
    key: Callable[[str], str | None] | None = None,
) -> dict[str, Finder]:
    """Open the images of each split; those of "" serve all other splits. For `key`, see `Finder`.

    `splits` have annotations; `flag` is their option, for messages. Raises UserError if a split
    lacks images or annotations, or a path is not a folder or zip.
    """
    opened = {split: Finder([open_files(path)], key) for split, path in images.items()}
    for split in splits:
        if split not in images and "" not in images:
            raise UserError(f"--images: none for split {split!r}; add {split}=FOLDER_OR_ZIP.")
    for split in set(images) - set(splits) - {""}:
        raise UserError(f"{flag}: none for split {split!r}; add {split}=FILE.json.")
    return opened


def entries_of(path: Path, content: Any, key: str, what: str) -> list[Any]:
    """Return the list `key` of a JSON object; raises UserError if there is none.

    For the message: `path` has this `content` and should be `what`.
    """
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: no list {key!r} in it (found: {found[:80]}); is it {what}?")
    return content[key]


def take(path: Path, where: str, entry: Any, *keys: str, what: str) -> list[Any]:
    """Return the values of `keys` in an entry of a JSON list; raises UserError if it lacks one.

    For the message: the list is called `where`, and the file `path` should be `what`.
    """
    try:
        return [entry[key] for key in keys]
    except (KeyError, TypeError) as error:
        found = ", ".join(entry) if isinstance(entry, dict) else repr(entry)[:50]
        raise UserError(
            f"{path}: an entry of {where!r} lacks {' or '.join(keys)} (found: {found}); "
            f"is it {what}?"
        ) from error


def id_text(path: Path, value: Any) -> str:
    """Return the text of an id or file name: equal for 1 and 1.0, and for all Unicode forms.

    Raises UserError if it is neither a number nor a string; for the message, `path` holds it.
    """
    value = untrusted.checked(value, "id", (str, int, float), path)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value))


def texts_of(path: Path, where: str, entries: Any, key: str, what: str) -> list[str]:
    """Return the non-empty texts under `key` in each of `entries`; otherwise like `take`."""
    entries = entries if isinstance(entries, list) else [entries]
    return texts([take(path, where, entry, key, what=what)[0] for entry in entries])
