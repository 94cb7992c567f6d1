"""GQA: questions about images of Visual Genome with one answer each.

Hudson and Manning 2019 (arXiv 1902.09506), https://cs.stanford.edu/people/dorarad/gqa/download.html.
"""

import argparse
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cap_pretrain import files
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.errors import UserError

_WHAT = "one of GQA's"


class Dataset(annotated.Questions, skip_registration=True):
    """Questions with one answer; kinds are the structural types: query, verify, logical, …"""

    HOMEPAGE = "https://cs.stanford.edu/people/dorarad/gqa/"

    def __init__(self, questions: Mapping[str, Path], images: Mapping[str, Path], **kwargs: Any):
        """`questions` and `images` are by split; the images of "" serve all other splits."""
        super().__init__(
            {split: read_questions(path) for split, path in questions.items()},
            annotated.open_images(images, questions, "--questions", key=_stem),
            origin=", ".join(path.name for path in questions.values()),
            **kwargs,
        )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        what = "train_balanced_questions.json, …, or a folder of parts; without SPLIT= it is train"
        annotated.add_paths(parser, "--questions", what)
        annotated.add_paths(parser, "--images", annotated.IMAGES_HELP)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        questions = by_split("--questions", args.questions, default="train")
        return cls(questions, by_split("--images", args.images, default=""), **kwargs)


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def read_questions(path: Path) -> list[Entry]:
    """Reads a file of questions, plain or gzipped, or a folder of them, in their order.

    Raises:
        UserError: no such file, no JSON, of another form.
    """
    entries = []
    for part in sorted(path.glob("*.json*")) if path.is_dir() else [path]:
        content = files.read_json(part)
        if not isinstance(content, dict):
            raise UserError(f"{part}: no object of questions by id; is it {_WHAT}?")
        for question_id, entry in content.items():
            image_id, question = annotated.take(
                part, "questions", entry, "imageId", "question", what=_WHAT
            )
            question = "".join(annotated.texts(question))
            answer = annotated.texts(entry.get("answer"))
            kind = str((entry.get("types") or {}).get("structural") or "")
            entries.append(Entry(question_id, (str(image_id),), answer, question, kind))
    return entries
