"""SugarCrepe: captions of COCO images against fluent, plausible but wrong ones.

Hsieh et al., "SugarCrepe: Fixing Hackable Benchmarks for Vision-Language Compositionality" (arXiv
2306.14610). Its files, from github.com/RAIVNLab/sugar-crepe/tree/main/data, are add_att, add_obj,
replace_att, replace_obj, replace_rel, swap_att and swap_obj, each of the form

    {"0": {"filename": "000000085329.jpg", "caption": "…", "negative_caption": "…"}, …}

plain or compressed with gzip. The images are those of COCO's val2017; part of them is enough.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cap_pretrain import files, untrusted
from cap_pretrain.data.builders.files import READ_ERRORS, image_names, open_files
from cap_pretrain.data.hard_negatives import Question
from cap_pretrain.errors import UserError

NAME = re.compile(r"((?:add|replace|swap)_(?:att|obj|rel))\.json(?:\.gz)?")
"""The names of SugarCrepe's files, whose stem is a kind of negative; others are ignored."""


class SugarCrepe:
    """The questions of all files by image: a `QuestionSet`. The kind of a negative is its file.

    `annotations` is a copy of the repository, its folder `data`, or any folder with some of its
    files; `images` is a folder or zip with the images, possibly in subfolders. Questions about
    images that are not there are left out and counted. Raises UserError if the folder has none of
    the files, a file has another form, or no image is there.

    Attributes:
        counts: for `Result.details`: the images and questions that were left out.
        lines: for `Result.lines`: the same, in words, if there are any.
    """

    protocol = "SugarCrepe: each caption against its one negative, by file"

    def __init__(self, annotations: str, images: str):
        asked: dict[str, list[Question]] = {}
        for path in _json_files(annotations):
            for name, question in _read(path):
                asked.setdefault(name, []).append(question)
        self.source = _Images(images, asked)
        self._names = self.source.names
        self._questions = {name: asked[name] for name in self._names}
        missing = len(asked) - len(self._names)
        left_out = sum(map(len, asked.values())) - sum(map(len, self._questions.values()))
        self.counts = {"missing_images": missing, "questions_left_out": left_out}
        self.lines = (
            (
                f"{missing:,} of {len(asked):,} images are not in {images}, so {left_out:,} "
                "questions are left out",
            )
            if missing
            else ()
        )

    def questions(self, index: int) -> list[Question]:
        """Return the questions of all files about image `index`."""
        return self._questions[self._names[index]]


class _Images:
    """The images of a folder or zip that are asked about, as a `Source` without captions.

    `names` are the names by which they are asked about.
    """

    def __init__(self, path: str, asked: Iterable[str]):
        self.class_names: list[str] = []
        self._files = open_files(path)
        by_name = {name.rpartition("/")[2]: name for name in image_names(self._files)}
        self.names = [name for name in asked if name in by_name]
        if not self.names:
            raise UserError(
                f"{path}: none of the images that SugarCrepe asks about is there; give those of "
                "COCO's val2017, such as 000000085329.jpg."
            )
        self._paths = [by_name[name] for name in self.names]

    def __str__(self) -> str:
        return f"the images of {self._files.path}"

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        try:
            image = self._files.read(path)
        except READ_ERRORS as error:
            raise UserError(f"{self._files.path}: cannot read {path} ({error}).") from error
        return {"image": image, "captions": [], "label": -1, "id": path}


def _json_files(folder: str) -> list[Path]:
    """Return SugarCrepe's files in a folder or its folder `data`, one of each kind, sorted."""
    path = Path(folder).expanduser()
    for place in (path, path / "data"):
        found = {
            match[1]: file
            for file in sorted(place.glob("*.json*"), reverse=True)  # plain ones win
            if (match := NAME.fullmatch(file.name))
        }
        if found:
            return [found[kind] for kind in sorted(found)]
    raise UserError(
        f"{folder}: no folder with SugarCrepe's files, such as swap_obj.json; give a copy of "
        "github.com/RAIVNLab/sugar-crepe (evals: composition.annotations)."
    )


def _read(path: Path) -> list[tuple[str, Question]]:
    kind = path.name.partition(".")[0]
    entries = files.read_json(path)
    fields = ("filename", "caption", "negative_caption")
    try:
        rows = [[untrusted.entry(e, name, str, path) for name in fields] for e in entries.values()]
        return [(name, Question(true, {kind: false})) for name, true, false in rows]
    except (AttributeError, UserError) as error:
        raise UserError(
            f"{path}: not a SugarCrepe file, which has the form "
            '{"0": {"filename": …, "caption": …, "negative_caption": …}, …}.'
        ) from error
