"""Draws where a captioner looks for each word of its caption.

    python tools/show_attention.py --checkpoint runs/cappa photo.jpg scan.tif --out attention.png
    python tools/show_attention.py --checkpoint runs/cappa photo.jpg --caption "a dog" --out dog.svg
    python tools/show_attention.py --checkpoint runs/cappa --data scenes --count 3 --out scenes.png

For each image: the image, then a heat map over it for each word of the caption, which is the run's
own (greedy) or given. A word's map is the mean of its tokens'; for a transformer, of the heads of
one layer of the decoder. The brightest spot of all words of an image has the brightest colour. The
newest sound checkpoint is used, its averaged parameters if there are any.

Exit status: 0 everything is drawn; 1 some files are no images, the others are drawn; 2 there is
nothing to draw, or an option is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
from absl import logging
from flax import nnx

from cap_pretrain.checkpoints.load import Learner, load_learner
from cap_pretrain.cli import figures
from cap_pretrain.cli.captioning import Named, captioner, of_dataset, of_files
from cap_pretrain.errors import UserError
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.learners.protocols import learner_type
from cap_pretrain.models.decoding import Decoding

PANEL = 1.4  # inches
SIDE = 256  # pixels of a panel, at least


class Look(NamedTuple):
    """An image uint8 [S, S, 3], the words of its caption, and a map [H, W] for each of them."""

    name: str
    image: np.ndarray
    words: list[str]
    maps: np.ndarray


def look(
    learner: Learner, named: Sequence[Named], caption: str, layer: dict[str, int | None]
) -> list[Look]:
    """Returns where the learner looks in images uint8 [S, S, 3].

    Args:
      learner: as read back.
      named: the images.
      caption: of all of them; "": the learner's own.
      layer: {"layer": which one, None being the mean of all}, or {} for the learner's default.

    Raises:
      UserError: the learner does not look at parts of images, or has no such layer.
    """
    _, tokenizer, graphdef, variables = learner
    word_maps.check_attends(learner_type(graphdef), by_layer=bool(layer))
    pixels = np.stack([image for _, image in named])
    write = captioner(learner, Decoding(), len(pixels), seed=0)
    captions = [caption] * len(pixels) if caption else write(pixels)
    text = np.stack([tokenizer.encode(told) for told in captions])

    @jax.jit
    def attend(variables, pixels, text):
        return nnx.merge(graphdef, *variables).attend(pixels, text, **layer)

    attention = np.asarray(attend(variables, pixels, text))
    looks = []
    for (name, image), ids, row in zip(named, text, attention, strict=True):
        _, words = word_maps.words_of(tokenizer, ids)
        maps = word_maps.word_maps(row, words)
        looks.append(Look(name, image, [word.text for word in words], maps))
    return looks


def draw(looks: Sequence[Look], columns: int) -> Any:
    """Returns a figure with `columns` panels side by side; each image begins a row."""
    blocks = [-(-(1 + len(found.words)) // columns) for found in looks]
    columns = min(columns, max(1 + len(found.words) for found in looks))
    figure = figures.new_figure(PANEL * columns, (PANEL + 0.2) * sum(blocks))
    axes = figure.subplots(sum(blocks), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    first = 0
    for found, rows in zip(looks, blocks, strict=True):
        panels = axes[first : first + rows].flat
        first += rows
        heated = overlays(found.image, found.maps)
        # Names of files may be long; their ends are what differs.
        titles = [found.name[-18:], *found.words]
        for axis, title, panel in zip(panels, titles, [found.image, *heated], strict=False):
            axis.imshow(panel)
            axis.set_title(title, fontsize=9)
    return figure


def overlays(image: np.ndarray, maps: np.ndarray) -> list[np.ndarray]:
    """Heat maps [n, H, W] over the grey image uint8 [S, S, 3], smoothly enlarged to its size."""
    colours = figures.imported("matplotlib").colormaps["inferno"]
    side = max(SIDE, len(image))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None] / 255
    grey = cv2.resize(grey, (side, side), interpolation=cv2.INTER_LINEAR)[..., None]
    brightest = max(float(np.max(maps, initial=0)), np.finfo(np.float32).tiny)
    drawn = []
    for map_ in maps:
        heat = cv2.resize(map_ / brightest, (side, side), interpolation=cv2.INTER_CUBIC)
        heat = np.clip(heat, 0, 1)
        drawn.append(0.4 * grey + 0.6 * colours(heat)[..., :3])
    return drawn


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
        layer = {"layer": args.layer} if "layer" in args else {}
        figures.save(draw(look(learner, named, args.caption, layer), args.columns), args.out)
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
    parser.add_argument("--caption", default="", help="in place of the run's own")
    parser.add_argument(
        "--layer",
        type=_layer,
        default=argparse.SUPPRESS,
        help="of the decoder: 0 is the first, -1 the last (default), mean averages over all",
    )
    parser.add_argument("--columns", type=_positive, default=8, help="panels a row; default: 8")
    own = parser.add_argument_group("without IMAGE")
    own.add_argument("--data", default="", help="a dataset or its path; default: the run's own")
    own.add_argument("--split", default="", help="default: the run's split for evaluation")
    own.add_argument("--count", type=_positive, default=4, help="its first images; default: 4")
    return parser.parse_args(argv)


def _layer(text: str) -> int | None:
    return None if text == "mean" else int(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
