"""NLVR2: whether a sentence is true of two images, which become one, side by side.

Suhr et al. 2019 (arXiv 1811.00491), https://github.com/lil-lab/nlvr/tree/master/nlvr2.
"""

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from cap_pretrain import files
from cap_pretrain.data import images as codecs
from cap_pretrain.data.builders.arguments import by_split
from cap_pretrain.data.builders.files import Finder
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry

_WHAT = "one of NLVR2's"


class Dataset(annotated.Questions, skip_registration=True):
    """Sentences as questions, answered by "true" or "false"."""

    HOMEPAGE = "https://lil.nlp.cornell.edu/nlvr/"

    def __init__(self, questions: Mapping[str, Path], images: Mapping[str, Path], **kwargs: Any):
        """`questions` and `images` are by split; the images of "" serve all other splits."""
        super().__init__(
            {split: read_sentences(path) for split, path in questions.items()},
            annotated.open_images(images, questions, "--questions"),
            origin=", ".join(path.name for path in questions.values()),
            **kwargs,
        )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        what = "train.json, dev.json, …, an object a line, also as .gz; without SPLIT= it is train"
        annotated.add_paths(parser, "--questions", what)
        annotated.add_paths(parser, "--images", annotated.IMAGES_HELP)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "Dataset":
        questions = by_split("--questions", args.questions, default="train")
        return cls(questions, by_split("--images", args.images, default=""), **kwargs)

    def picture(self, finder: Finder, names: Sequence[str]) -> bytes:
        return side_by_side(*map(finder.read, names))


def read_sentences(path: Path) -> list[Entry]:
    """Reads a file of sentences, plain or gzipped, in their order.

    What "dev-850-0-0" says, it says of dev-850-0-img0.png and dev-850-0-img1.png.

    Raises:
        UserError: no such file, no JSON, of another form.
    """
    entries = []
    for line in files.read_json_lines(path):
        identifier, sentence = annotated.take(
            path, "lines", line, "identifier", "sentence", what=_WHAT
        )
        pair = str(identifier).rpartition("-")[0]
        names = (f"{pair}-img0.png", f"{pair}-img1.png")
        answer = str(line.get("label", "")).lower()
        answers = [answer] if answer in ("true", "false") else []
        entries.append(Entry(str(identifier), names, answers, "".join(annotated.texts(sentence))))
    return entries


def side_by_side(left: bytes, right: bytes) -> bytes:
    """Puts two encoded images of any kind next to each other, as a JPEG.

    Both are brought to one size, the smaller width and height of the two, so that the border is in
    the middle of every picture.

    Raises:
        ImageError: one of them is broken.
    """
    pixels = [codecs.decode(data) for data in (left, right)]
    height, width = np.min([each.shape[:2] for each in pixels], axis=0)
    size = int(width), int(height)
    halves = [cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in pixels]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(halves, axis=1)).save(file, "JPEG", quality=95)
    return file.getvalue()
