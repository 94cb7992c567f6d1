"""Draw a grid of images with their captions, from a dataset or from a run's evaluation.

    cap sheet --data scenes --split novel --image_size 96 --out scenes.png
    cap sheet --workdir runs/quickstart --out captions.png

A run's are its latest sample captions (the evaluator `samples` in configs/), with references in
gray. Words of a caption that no reference has are red. Captions of `scenes` are judged: a frame is
green if a caption names color and shape of every object, and of no other, else red; red words name
objects that are not there.
"""

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cap_pretrain import inputs, untrusted
from cap_pretrain.checkpoints.load import read_config
from cap_pretrain.checkpoints.open import run_at
from cap_pretrain.cli import arguments
from cap_pretrain.cli.captioning import PHOTO
from cap_pretrain.data import views
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import find_mentions, names_every_object
from cap_pretrain.data.scenes.world import Scene
from cap_pretrain.data.sources.open import cache_of, open_source
from cap_pretrain.errors import UserError
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.evals.suite import newest_result
from cap_pretrain.untrusted import bounded, checked, entry

GAP = 8  # pixels between pictures
FRAME = 3  # pixels
WRONG, RIGHT, BLACK, QUIET = "#c62828", "#2e7d32", "black", "#666666"
UNFOUNDED = "Red words are in no reference."
VERDICTS = "Green: every object is named, and no other. Red: not so; red words name no object."


class Picture(NamedTuple):
    """An image and texts about it.

    Attributes:
        image: uint8 [H, W, 3].
        caption: Text below it.
        references: Texts that are known to be right.
        right: Whether the caption is right; None if that is not known.
        wrong: Where its wrong words begin.
    """

    image: np.ndarray
    caption: str
    references: tuple[str, ...] = ()
    right: bool | None = None
    wrong: frozenset[int] = frozenset()


class _Line(NamedTuple):
    """A line of text: words with their colors, and whether it is small."""

    words: tuple[tuple[str, str], ...]
    small: bool = False


def of_dataset(data: str, split: str, size: int) -> Iterator[Picture]:
    """Yield the images of a dataset with their first captions, and the others as references."""
    source = open_source(data, split, image_size=size, cache=cache_of(data))
    for index in range(len(source)):
        example = source[index]
        captions = tuple(example["captions"])
        first = captions[0] if captions else ""
        yield Picture(views.photo(example["image"], PHOTO), first, captions[1:])


def of_run(run: str, evaluation: str) -> Iterator[Picture]:
    """Yield images and captions of a run's latest evaluation; raises UserError if it has none.

    `run` is a workdir, or a checkpoint in it, whose evaluation is taken then.
    """
    workdir, step = run_at(run)
    path, result = newest_result(workdir, evaluation, step)
    if path is None:
        of_step = "" if step is None else f"/{step}.json"
        raise UserError(f"{workdir}: has no evals/{evaluation}{of_step}; run the evaluation first.")
    config = read_config(workdir)
    options = entry(result, "options", dict, path)
    split, data = (entry(options, name, str, path) for name in ("split", "data"))
    source = inputs.open_data(config, split or config.data.eval_split, data)
    for sample in entry(result, "samples", list, path):
        index = bounded(entry(sample, "index", int, path), "index", 0, len(source) - 1, path)
        caption = entry(sample, "caption", str, path)
        texts = checked(sample.get("references", []), "references", list, path)
        references = tuple(checked(text, "references", str, path) for text in texts)
        image = views.photo(source[index]["image"], PHOTO)
        if isinstance(source, Scenes):
            scene = source.scene(index)
            right, wrong = names_every_object(scene, caption), misnamed(scene, caption)
        else:
            right, wrong = None, unfounded(caption, references)
        yield Picture(image, caption, references, right, wrong)


def misnamed(scene: Scene, caption: str) -> frozenset[int]:
    """Return where the words for objects begin that the scene does not have."""
    left: Counter[tuple[str | None, str | None]] = Counter(scene.pairs)
    wrong: list[int] = []
    for mention in find_mentions(caption):
        pair = (mention.colour, mention.shape)
        if left[pair] > 0:
            left[pair] -= 1
        else:
            wrong += [at for at in (mention.colour_at, mention.shape_at) if at is not None]
    return frozenset(wrong)


def unfounded(caption: str, references: Sequence[str]) -> frozenset[int]:
    """Return where the words of a caption begin that no reference has; none without references."""
    known = set(word_maps.WORD.findall(" ".join(references).lower()))
    words = word_maps.WORD.finditer(caption.lower())
    return frozenset(word.start() for word in words if known and word[0] not in known)


def draw(pictures: Sequence[Picture], columns: int, side: int, references: int = 0) -> Image.Image:
    """Return a grid of pictures, fitted into squares of `side` pixels, above their captions.

    Up to so many references follow each caption. Words that no reference has are red; a frame says
    whether a caption is right.
    """
    fonts = {
        small: ImageFont.load_default(max(11, side // (12 if small else 10))) for small in (0, 1)
    }
    line = math.ceil(fonts[0].getbbox("Ag")[3]) + 2
    texts = [_lines(picture, references, fonts, side) for picture in pictures]
    grid = [range(n, min(n + columns, len(pictures))) for n in range(0, len(pictures), columns)]
    heights = [side + 2 * GAP + line * max(len(texts[k]) for k in row) for row in grid]
    notes = _notes(pictures, references, fonts[1], columns * (side + GAP))
    sheet = Image.new(
        "RGB", (columns * (side + GAP) + GAP, sum(heights) + GAP + line * len(notes)), "white"
    )
    pen, top = ImageDraw.Draw(sheet), GAP
    for row, height in zip(grid, heights, strict=True):
        for k in row:
            left = GAP + (k - row[0]) * (side + GAP)
            _place(sheet, pen, pictures[k], (left, top), side)
            _write(pen, texts[k], (left, top + side + FRAME + 1), line, fonts)
        top += height
    _write(pen, notes, (GAP, top), line, fonts)
    return sheet


def _place(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    picture: Picture,
    corner: tuple[int, int],
    side: int,
) -> None:
    """Draw the image in a square, with a frame if its caption is judged."""
    height, width = picture.image.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = corner[0] + (side - size[0]) // 2, corner[1] + side - size[1]
    if picture.right is not None:
        box = (left - FRAME, top - FRAME, left + size[0] + FRAME - 1, top + size[1] + FRAME - 1)
        pen.rectangle(box, fill=RIGHT if picture.right else WRONG)
    sheet.paste(Image.fromarray(picture.image).resize(size), (left, top))


def _lines(picture: Picture, references: int, fonts: Any, width: int) -> list[_Line]:
    """Return the caption and references of a picture, wrapped to `width` pixels."""
    words = re.finditer(r"\S+", picture.caption)
    bad = [any(at in picture.wrong for at in range(*word.span())) for word in words]
    colors = [WRONG if one else BLACK for one in bad]
    found = _wrapped(picture.caption, colors, fonts[0], width)
    for text in picture.references[:references]:
        quiet = _wrapped(text, [QUIET] * len(text.split()), fonts[1], width)
        found += [line._replace(small=True) for line in quiet]
    return found


def _wrapped(text: str, colors: Sequence[str], font: Any, width: int) -> list[_Line]:
    lines: list[list[tuple[str, str]]] = [[]]
    for word, color in zip(text.split(), colors, strict=True):
        word = untrusted.printable(word)
        so_far = " ".join(shown for shown, _ in [*lines[-1], (word, color)])
        if lines[-1] and font.getlength(so_far) > width:
            lines.append([])
        lines[-1].append((word, color))
    return [_Line(tuple(words)) for words in lines if words]


def _write(
    pen: ImageDraw.ImageDraw, lines: Sequence[_Line], corner: tuple[int, int], step: int, fonts: Any
) -> None:
    for n, line in enumerate(lines):
        x, font = float(corner[0]), fonts[line.small]
        for word, color in line.words:
            pen.text((x, corner[1] + n * step), word, color, font)
            x += font.getlength(f"{word} ")


def _notes(pictures: Sequence[Picture], references: int, font: Any, width: int) -> list[_Line]:
    """Return what the colors mean, where they occur."""
    judged = any(picture.right is not None for picture in pictures)
    texts = [VERDICTS] * judged
    texts += [UNFOUNDED] * (not judged and any(picture.wrong for picture in pictures))
    texts += ["Gray: references."] * bool(references and any(one.references for one in pictures))
    text = " ".join(texts)
    return [
        line._replace(small=True)
        for line in _wrapped(text, [QUIET] * len(text.split()), font, width)
    ]


def _run(args: argparse.Namespace) -> int:
    if args.workdir:
        found = of_run(args.workdir, args.evaluation)
    else:
        found = of_dataset(args.data, args.split, args.image_size)
    pictures = [picture for picture, _ in zip(found, range(args.count), strict=False)]
    shown = bool(args.workdir) if args.references is None else args.references
    draw(pictures, args.columns, args.side, int(shown)).save(args.out)
    print(f"wrote {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    parser = arguments.documented_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="dataset or its path")
    what.add_argument("--workdir", metavar="RUN", help="workdir of a run, or a checkpoint in it")
    parser.add_argument("--split", default="train", help="with --data; default: train")
    parser.add_argument("--image_size", type=int, default=96, help="with --data; default: 96")
    parser.add_argument("--evaluation", default="samples", help="with --workdir; default: samples")
    parser.add_argument("--count", type=int, default=8, help="number of images; default: 8")
    parser.add_argument("--columns", type=int, default=4, help="images per row; default: 4")
    parser.add_argument("--side", type=int, default=144, help="pixels per image; default: 144")
    parser.add_argument(
        "--references",
        type=int,
        help="reference captions per image; default: 1 with --workdir, 0 with --data",
    )
    parser.add_argument("--out", required=True, type=arguments.local_path, help="output image file")
    return arguments.run(_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
