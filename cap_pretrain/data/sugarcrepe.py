"""SugarCrepe: captions of COCO images against fluent, plausible but wrong ones.

Hsieh et al., "SugarCrepe: Fixing Hackable Benchmarks for Vision-Language Compositionality" (arXiv
2306.14610). Its files, from github.com/RAIVNLab/sugar-crepe/tree/main/data, are add_att, add_obj,
replace_att, replace_obj, replace_rel, swap_att and swap_obj, each of the form

    {"0": {"filename": "000000085329.jpg", "caption": "…", "negative_caption": "…"}, …}

The images are those of COCO's val2017.
"""

from pathlib import Path
from typing import Any

from cap_pretrain import files
from cap_pretrain.data.builders.files import READ_ERRORS, image_names, open_files
from cap_pretrain.data.hard_negatives import Question
from cap_pretrain.errors import UserError


class SugarCrepe:
    """The questions of all files by image: a `QuestionSet`. The kind of a negative is its file.

    `annotations` is the folder of the JSON files, all of which are read; `images` is a folder or
    zip with the images, possibly in subfolders. Raises UserError if the folder has no JSON files, a
    file has another form, or an image is missing.
    """

    protocol = "SugarCrepe: each caption against its one negative, by file"

    def __init__(self, annotations: str, images: str):
        self._questions: dict[str, list[Question]] = {}
        for path in _json_files(annotations):
            for name, question in _read(path):
                self._questions.setdefault(name, []).append(question)
        self._names = list(self._questions)
        self.source = _Images(images, self._names)

    def questions(self, index: int) -> list[Question]:
        """Return the questions of all files about image `index`."""
        return self._questions[self._names[index]]


class _Images:
    """Images by name, as a `Source` without captions and labels."""

    def __init__(self, path: str, names: list[str]):
        self.class_names: list[str] = []
        self._files = open_files(path)
        by_name = {name.rpartition("/")[2]: name for name in image_names(self._files)}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of {len(names)} images are missing, such as "
                f"{missing[0]}; SugarCrepe needs the images of COCO's val2017."
            )
        self._paths = [by_name[name] for name in names]

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
    paths = sorted(Path(folder).expanduser().glob("*.json"))
    if not paths:
        raise UserError(
            f"{folder}: no folder with json files; give the folder `data` of SugarCrepe."
        )
    return paths


def _read(path: Path) -> list[tuple[str, Question]]:
    entries = files.read_json(path)
    try:
        return [
            (e["filename"], Question(e["caption"], {path.stem: e["negative_caption"]}))
            for e in entries.values()
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a SugarCrepe file, which has the form "
            '{"0": {"filename": …, "caption": …, "negative_caption": …}, …}.'
        ) from error
