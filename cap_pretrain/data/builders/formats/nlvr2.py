"""NLVR2: whether a sentence is true of two images, which are joined side by side into one.

Suhr et al. 2019 (arXiv 1811.00491), https://github.com/lil-lab/nlvr/tree/master/nlvr2.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from cap_pretrain import files, untrusted
from cap_pretrain.data import images as codecs
from cap_pretrain.data.builders.files import Finder
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.data.builders.formats.annotated import Entry
from cap_pretrain.data.image_files import MAX_PIXELS

MAX_JOINED = MAX_PIXELS // 2
"""Pixels of two images together that are joined."""

_WHAT = "one of NLVR2's"


class Dataset(annotated.QuestionFiles):
    """Sentences as questions, with the answer "true" or "false"."""

    HOMEPAGE = "https://lil.nlp.cornell.edu/nlvr/"
    QUESTIONS_HELP = (
        "train.json, dev.json, …, one object per line, also as .gz; without SPLIT= it is train"
    )

    def picture(self, finder: Finder, names: Sequence[str]) -> bytes:
        """Return both images side by side, as a JPEG."""
        return side_by_side(*map(finder.read, names))

    @staticmethod
    @untrusted.parser
    def read(path: Path) -> list[Entry]:
        """Read a file of sentences, plain or gzipped, in order; raises UserError if it is invalid.

        The sentence "dev-850-0-0" is about the images dev-850-0-img0.png and dev-850-0-img1.png.
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
            sentence = "".join(annotated.texts(sentence))
            entries.append(Entry(str(identifier), names, answers, sentence))
        return entries


def side_by_side(left: bytes, right: bytes) -> bytes:
    """Join two encoded images of any format side by side, as a JPEG of quality 95.

    Both are resized to the smaller width and the smaller height of the two, so that their border is
    in the middle of every picture. Raises ImageError if one of them is corrupt.
    """
    if sum(math.prod(codecs.size(data)) for data in (left, right)) > MAX_JOINED:
        raise codecs.ImageError(f"refused: two images of over {MAX_JOINED} pixels together")
    pixels = [codecs.decode(data) for data in (left, right)]
    height, width = np.min([each.shape[:2] for each in pixels], axis=0)
    size = int(width), int(height)
    halves = [cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in pixels]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(halves, axis=1)).save(file, "JPEG", quality=95)
    return file.getvalue()
