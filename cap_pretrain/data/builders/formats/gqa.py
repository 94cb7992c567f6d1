"""GQA: questions about images of Visual Genome with one answer each.

Hudson and Manning 2019 (arXiv 1902.09506), https://cs.stanford.edu/people/dorarad/gqa/download.html.
"""

import posixpath
from pathlib import Path

from cap_pretrain import files, untrusted
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.errors import UserError

_WHAT = "one of GQA's"


class Dataset(annotated.QuestionFiles):
    """Questions with one answer; labels are the structural types: query, verify, logical, ….

    Images are referred to by name without suffix.
    """

    HOMEPAGE = "https://cs.stanford.edu/people/dorarad/gqa/"
    QUESTIONS_HELP = (
        "train_balanced_questions.json, …, or a folder of parts; without SPLIT= it is train"
    )

    @staticmethod
    def image_key(base_name: str) -> str:
        """Return the file name without suffix."""
        return posixpath.splitext(base_name)[0]

    @staticmethod
    @untrusted.parser
    def read(path: Path) -> list[Entry]:
        """Read a file of questions, plain or gzipped, or a folder of such files in order of name.

        Questions are in the order of the file. Raises UserError if a file is missing, is not JSON,
        or has another form.
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
