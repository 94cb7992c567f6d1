"""Draw the colors that a colorization run predicts for gray images.

    cap colorize --checkpoint runs/colorization photo.jpg scan.tif --out colors.png
    cap colorize --checkpoint runs/colorization --data scenes --count 3 --out scenes.png

A row shows an image, its lightness, which is all that the model sees, and that lightness with the
predicted colors (annealed mean of the distribution). Images are resized to squares as in the run.
The newest valid checkpoint is used, with averaged parameters if it has them. Exit status: 0 all are
drawn; 1 some files are no images; 2 nothing to draw, or an option is wrong.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx

from cap_pretrain.checkpoints.load import Learner
from cap_pretrain.cli import arguments, figures
from cap_pretrain.cli.captioning import Named, draw_images
from cap_pretrain.errors import UserError
from cap_pretrain.learners.protocols import Colorizes
from cap_pretrain.models import lab

PANEL = 1.8  # inches


def colorized(learner: Learner, pixels: np.ndarray) -> np.ndarray:
    """Return images, uint8 [B, S, S, 3], in predicted colors; raises UserError if it has none."""
    if not learner.able(Colorizes):
        raise UserError(
            f"--checkpoint: a {learner.config.learner.name} does not predict colors; "
            "name a run with task=colorization."
        )

    @jax.jit
    def colorize(variables, pixels):
        return nnx.merge(learner.graphdef, *variables).colourize(pixels)

    return np.asarray(colorize(learner.variables, pixels))


def draw(named: Sequence[Named], predicted: np.ndarray) -> Any:
    """Return a figure with a row per image: the image, its lightness, and its colorization."""
    figure = figures.new_figure(3 * PANEL, (PANEL + 0.2) * len(named))
    axes = figure.subplots(len(named), 3, squeeze=False)
    for row, (name, image, _), colored in zip(axes, named, predicted, strict=True):
        titles = [name[-18:], "lightness", "colorized"]  # long file names differ at the end
        panels = [image, lab.gray(image / 255), colored]
        for axis, title, panel in zip(row, titles, panels, strict=True):
            axis.set_axis_off()
            axis.imshow(panel)
            axis.set_title(title, fontsize=9)
    return figure


def _draw(learner: Learner, named: list[Named]) -> Any:
    return draw(named, colorized(learner, np.stack([one.image for one in named])))


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    arguments.add_checkpoint(parser)
    arguments.add_figure(parser)
    arguments.add_images(parser)
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    return arguments.run(lambda args: draw_images(args, _draw), args)


if __name__ == "__main__":
    sys.exit(main())
