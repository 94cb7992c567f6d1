"""VQAv2: questions about images of COCO with ten answers each, in the files of visualqa.org.

Goyal et al. 2017 (arXiv 1612.00837), https://visualqa.org/download.html; same format: OK-VQA.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cap_pretrain import files
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.errors import UserError

_WHAT = "one of VQAv2's"


class Dataset(annotated.Questions):
    """Questions with the answers of ten people; labels are the types yes/no, number and other.

    Splits whose answers are public have a file in `annotations`. The images of "" serve all other
    splits.
    """

    HOMEPAGE = "https://visualqa.org"

    def __init__(
        self,
        questions: Mapping[str, Path],
        annotations: Mapping[str, Path],
        images: Mapping[str, Path],
        **kwargs: Any,
    ):
        for split in set(annotations) - set(questions):
            raise UserError(f"--questions: none for split {split!r}; add {split}=FILE.json.")
        super().__init__(
            {s: read_questions(path, annotations.get(s)) for s, path in questions.items()},
            annotated.open_images(images, questions, "--questions", key=image_number),
            origin=", ".join(path.name for path in (*questions.values(), *annotations.values())),
            **kwargs,
        )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare --questions, --annotations and --images."""
        what = "v2_OpenEnded_mscoco_…_questions.json, also as .gz; without SPLIT= it is train"
        annotated.add_paths(parser, "--questions", what)
        what = "v2_mscoco_…_annotations.json of the splits whose answers are public"
        annotated.add_paths(parser, "--annotations", what, required=False)
        annotated.add_paths(parser, "--images", annotated.IMAGES_HELP)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        """Construct the builder from parsed options."""
        return cls(
            by_split("--questions", args.questions, default="train"),
            by_split("--annotations", args.annotations or (), default="train"),
            by_split("--images", args.images, default=""),
            **kwargs,
        )


def image_number(name: str) -> str:
    """Return the id of an image file in questions: "458752" for COCO_train2014_000000458752.jpg."""
    found = re.search(r"(\d+)\.\w+$", name)
    return str(int(found[1])) if found else ""


def read_questions(path: Path, annotations: Path | None) -> list[Entry]:
    """Read a file of questions and the file of their answers, plain or gzipped.

    Returns the questions in order, then entries for answers whose question is not in the file.
    Raises UserError if a file is missing, is not JSON, or has another form.
    """
    answers: dict[str, tuple[list[str], str]] = {}
    if annotations:
        content = files.read_json(annotations)
        for entry in annotated.entries_of(annotations, content, "annotations", _WHAT):
            question_id, given = annotated.take(
                annotations, "annotations", entry, "question_id", "answers", what=_WHAT
            )
            own = annotated.texts_of(annotations, "answers", given, "answer", _WHAT)
            answers[annotated.id_text(annotations, question_id)] = (
                own,
                str(entry.get("answer_type", "")),
            )
    entries = []
    for entry in annotated.entries_of(path, files.read_json(path), "questions", _WHAT):
        question_id, image_id, question = annotated.take(
            path, "questions", entry, "question_id", "image_id", "question", what=_WHAT
        )
        question_id = annotated.id_text(path, question_id)
        own, kind = answers.pop(question_id, ([], ""))
        question = "".join(annotated.texts(question))
        entries.append(
            Entry(question_id, (annotated.id_text(path, image_id),), own, question, kind)
        )
    not_asked = (
        Entry(question_id, (), own, kind=kind, problem="answered but not asked")
        for question_id, (own, kind) in answers.items()
    )
    return [*entries, *not_asked]
