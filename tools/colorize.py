"""Draws what colours a run that learned colorization gives to gray images.

    python tools/colorize.py --checkpoint runs/colorization photo.jpg scan.tif --out colours.png
    python tools/colorize.py --checkpoint runs/colorization --data scenes --count 3 --out scenes.png

For each image: the image, its lightness, which is all that the model sees, and the same lightness
with the colours that the model tells (the annealed mean of its distribution). Images are those that
the run sees, squares of its size. The newest sound checkpoint is used, its averaged parameters if
there are any.

Exit status: 0 everything is drawn; 1 some files are no images, the others are drawn; 2 there is
nothing to draw, or an option is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx

from cap_pretrain.checkpoints.load import Learner, load_learner
from cap_pretrain.cli import figures
from cap_pretrain.cli.captioning import Named, of_dataset, of_files
from cap_pretrain.errors import UserError
from cap_pretrain.learners.protocols import Colorizes, learner_type
from cap_pretrain.models import lab

PANEL = 1.8  # inches


def colourized(learner: Learner, pixels: np.ndarray) -> np.ndarray:
    """Images uint8 [B, S, S, 3] -> uint8 of their lightness and the colours the learner tells.

    Raises:
      UserError: the learner tells no colours.
    """
    if not issubclass(learner_type(learner.graphdef), Colorizes):
        raise UserError(
            f"--checkpoint: is one of a {learner.config.learner.name}, which tells no colours; "
            "name a run with task=colorization."
        )

    @jax.jit
    def colourize(variables, pixels):
        return nnx.merge(learner.graphdef, *variables).colourize(pixels)

    return np.asarray(colourize(learner.variables, pixels))


def draw(named: Sequence[Named], coloured: np.ndarray) -> Any:
    """Returns a figure with a row for each image: itself, its lightness, and it coloured."""
    figure = figures.new_figure(3 * PANEL, (PANEL + 0.2) * len(named))
    axes = figure.subplots(len(named), 3, squeeze=False)
    for row, (name, image), found in zip(axes, named, coloured, strict=True):
        # Names of files may be long; their ends are what differs.
        titles = [name[-18:], "lightness", "coloured"]
        panels = [image, lab.gray(image / 255), found]
        for axis, title, panel in zip(row, titles, panels, strict=True):
            axis.set_axis_off()
            axis.imshow(panel)
            axis.set_title(title, fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as said above."""
    args = _parse(argv)
    logging.set_verbosity(logging.ERROR)
    try:
        figures.check_name(args.out)
        if args.images and (args.data or args.split):
            raise UserError("--data, --split: are not for IMAGE files; give one or the other.")
        learner = load_learner(args.checkpoint, step=args.step)
        named = (
            of_files(learner, args.images)
            if args.images
            else of_dataset(learner, args.data, args.split, args.count)
        )
        if not named:
            return 2
        coloured = colourized(learner, np.stack([image for _, image in named]))
        figures.save(draw(named, coloured), args.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return int(len(named) < len(args.images))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="any image file")
    parser.add_argument("--checkpoint", required=True, type=Path, help="the workdir of a run")
    parser.add_argument("--step", type=int, help="which of its checkpoints; default: the newest")
    parser.add_argument("--out", required=True, type=Path, help="a file *.png or *.svg")
    own = parser.add_argument_group("without IMAGE")
    own.add_argument("--data", default="", help="a dataset or its path; default: the run's own")
    own.add_argument("--split", default="", help="default: the run's split for evaluation")
    own.add_argument("--count", type=_positive, default=4, help="its first images; default: 4")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
