"""Draw which parts of an image a captioner attends to for each word of its caption.

    python tools/show_attention.py --checkpoint runs/cappa photo.jpg --caption "a dog" --out dog.svg
    python tools/show_attention.py --checkpoint runs/cappa --data scenes --count 3 --out scenes.png

A heat map per word of the caption, the run's own (greedy) or --caption, follows each image: the
mean over the word's tokens and, for a transformer, over the heads of one decoder layer. Maps of an
image share a color scale, which ends at their maximum. The newest valid checkpoint is used, with
averaged parameters if it has them. Exit status: 0 all are drawn; 1 some files are no images; 2
nothing to draw, or an option is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
from absl import logging
from flax import nnx

from cap_pretrain.checkpoints.load import Learner
from cap_pretrain.cli import arguments, figures
from cap_pretrain.cli.captioning import Named, captioner, draw_images
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.learners.protocols import learner_type
from cap_pretrain.models.decoding import Decoding

PANEL = 1.4  # inches
SIDE = 256  # minimum pixels of a panel


class Attended(NamedTuple):
    """An image and the attention map of each word of its caption."""

    name: str
    image: np.ndarray  # uint8 [S, S, 3]
    words: list[str]
    maps: np.ndarray  # float32 [len(words), H, W]


def attend_words(
    learner: Learner, named: Sequence[Named], caption: str, layer: dict[str, int | None]
) -> list[Attended]:
    """Compute attention maps of words of a caption, or, for "", of each image's own.

    `layer` is {"layer": index}, where None is the mean, or {} for the learner's default. Raises
    UserError if the learner does not attend to parts of images, or has no such layer.
    """
    _, tokenizer, graphdef, variables = learner
    word_maps.check_attends(learner_type(graphdef), by_layer=bool(layer))
    pixels = np.stack([image for _, image in named])
    write = captioner(learner, Decoding(), len(pixels), seed=0)
    captions = [caption] * len(pixels) if caption else write(pixels)
    text = np.stack([tokenizer.encode(caption) for caption in captions])

    @jax.jit
    def attend(variables, pixels, text):
        return nnx.merge(graphdef, *variables).attend(pixels, text, **layer)

    attention = np.asarray(attend(variables, pixels, text))
    found = []
    for (name, image), ids, row in zip(named, text, attention, strict=True):
        _, words = word_maps.words_of(tokenizer, ids)
        maps = word_maps.word_maps(row, words)
        found.append(Attended(name, image, [word.text for word in words], maps))
    return found


def draw(attended: Sequence[Attended], columns: int) -> Any:
    """Return a figure with `columns` panels per row; every image starts a new row."""
    blocks = [-(-(1 + len(found.words)) // columns) for found in attended]
    columns = min(columns, max(1 + len(found.words) for found in attended))
    figure = figures.new_figure(PANEL * columns, (PANEL + 0.2) * sum(blocks))
    axes = figure.subplots(sum(blocks), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    first = 0
    for found, rows in zip(attended, blocks, strict=True):
        panels = axes[first : first + rows].flat
        first += rows
        heated = overlays(found.image, found.maps)
        titles = [found.name[-18:], *found.words]  # long file names differ at the end
        for axis, title, panel in zip(panels, titles, [found.image, *heated], strict=False):
            axis.imshow(panel)
            axis.set_title(title, fontsize=9)
    return figure


def overlays(image: np.ndarray, maps: np.ndarray) -> list[np.ndarray]:
    """Return maps [n, H, W] as n smooth heat maps [side, side, 3] in [0, 1] over a gray image."""
    colors = figures.imported("matplotlib").colormaps["inferno"]
    side = max(SIDE, len(image))
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None] / 255
    gray = cv2.resize(gray, (side, side), interpolation=cv2.INTER_LINEAR)[..., None]
    brightest = max(float(np.max(maps, initial=0)), np.finfo(np.float32).tiny)
    drawn = []
    for map_ in maps:
        heat = cv2.resize(map_ / brightest, (side, side), interpolation=cv2.INTER_CUBIC)
        drawn.append(0.4 * gray + 0.6 * colors(heat.clip(0, 1))[..., :3])
    return drawn


def _run(args: argparse.Namespace) -> int:
    layer = {"layer": args.layer} if "layer" in args else {}

    def draw_attention(learner: Learner, named: list[Named]) -> Any:
        return draw(attend_words(learner, named, args.caption, layer), args.columns)

    return draw_images(args, draw_attention)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    arguments.add_checkpoint(parser)
    arguments.add_figure(parser)
    arguments.add_images(parser)
    parser.add_argument("--caption", default="", help="in place of the run's own")
    parser.add_argument(
        "--layer",
        type=_layer,
        default=argparse.SUPPRESS,
        help="decoder layer: 0 is the first, -1 the last (default), mean averages over all",
    )
    parser.add_argument(
        "--columns", type=arguments.positive_int, default=8, help="panels per row; default: 8"
    )
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    return arguments.run(_run, args)


def _layer(text: str) -> int | None:
    return None if text == "mean" else int(text)


if __name__ == "__main__":
    sys.exit(main())
