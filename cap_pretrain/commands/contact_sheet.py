"""Draw a grid of images with their captions, from a dataset or from a run's evaluation.

    python tools/contact_sheet.py --data scenes --split novel --image_size 96 --out scenes.png
    python tools/contact_sheet.py --workdir runs/quickstart --out captions.png

A run's are its latest sample captions (the evaluator `samples` in configs/).
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cap_pretrain import inputs, untrusted
from cap_pretrain.checkpoints.load import read_config
from cap_pretrain.cli import arguments
from cap_pretrain.data import pipeline
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.errors import UserError
from cap_pretrain.evals.suite import newest_result
from cap_pretrain.untrusted import bounded, entry

Picture = tuple[np.ndarray, str]
"""An image, uint8 [S, S, 3], and its caption."""


def of_dataset(data: str, split: str, size: int) -> Iterator[Picture]:
    """Yield the images of a dataset, uint8 [size, size, 3], with their first captions."""
    source = open_source(data, split, image_size=size)
    for index in range(len(source)):
        example = source[index]
        yield pipeline.picture(example["image"], size), "; ".join(example["captions"][:1])


def of_run(workdir: Path, evaluation: str) -> Iterator[Picture]:
    """Yield images and captions of a run's latest evaluation; raises UserError if it has none."""
    path, result = newest_result(workdir, evaluation)
    if path is None:
        raise UserError(f"{workdir}: has no evals/{evaluation}; run the evaluation first.")
    config = read_config(workdir)
    options = entry(result, "options", dict, path)
    split, data = (entry(options, name, str, path) for name in ("split", "data"))
    source = inputs.open_data(config, split or config.data.eval_split, data)
    for sample in entry(result, "samples", list, path):
        index = bounded(entry(sample, "index", int, path), "index", 0, len(source) - 1, path)
        caption = entry(sample, "caption", str, path)
        yield pipeline.picture(source[index]["image"], config.data.image_size), caption


def draw(pictures: Sequence[Picture], columns: int, side: int) -> Image.Image:
    """Return a grid of the pictures, each `side` pixels wide and above its caption."""
    gap = 8
    font = ImageFont.load_default(max(11, side // 10))
    line = math.ceil(font.getbbox("Ag")[3]) + 2
    letters = max(1, int(side / font.getlength("n")))
    captions = [
        textwrap.wrap(untrusted.printable(caption, keep="\n\t"), letters) for _, caption in pictures
    ]
    step_x, step_y = side + gap, side + gap + line * max(map(len, captions))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (image, _) in enumerate(pictures):
        x, y = gap + k % columns * step_x, gap + k // columns * step_y
        sheet.paste(Image.fromarray(image).resize((side, side)), (x, y))
        pen.multiline_text((x, y + side + 1), "\n".join(captions[k]), "black", font, spacing=2)
    return sheet


def _run(args: argparse.Namespace) -> int:
    if args.workdir:
        found = of_run(args.workdir, args.evaluation)
    else:
        found = of_dataset(args.data, args.split, args.image_size)
    pictures = [picture for picture, _ in zip(found, range(args.count), strict=False)]
    draw(pictures, args.columns, args.side).save(args.out)
    print(f"wrote {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    parser = arguments.documented_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="dataset or its path")
    what.add_argument("--workdir", type=Path, help="workdir of a run")
    parser.add_argument("--split", default="train", help="with --data; default: train")
    parser.add_argument("--image_size", type=int, default=96, help="with --data; default: 96")
    parser.add_argument("--evaluation", default="samples", help="with --workdir; default: samples")
    parser.add_argument("--count", type=int, default=8, help="number of images; default: 8")
    parser.add_argument("--columns", type=int, default=4, help="images per row; default: 4")
    parser.add_argument("--side", type=int, default=144, help="pixels per image; default: 144")
    parser.add_argument("--out", required=True, type=Path, help="output image file")
    return arguments.run(_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
