"""Draw which parts of an image a captioner attends to for each word of its caption.

    cap attention --checkpoint runs/cappa photo.jpg --caption "a dog" --out dog.svg
    cap attention --checkpoint runs/cappa --data scenes --count 3 --out scenes.png

A heat map per word of the caption, the run's own (greedy) or --caption, follows each image: the
mean over the word's tokens and, for a transformer, over the heads of one decoder layer. Maps are
drawn over the photo at its own size, up to 512 pixels; where the learner reads a central square,
the rest is dark. Maps of an image share a color scale, which ends at their maximum. What does not
fit on a page goes to further ones, NAME-2.png and so on. The newest valid checkpoint is used, with
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

from cap_pretrain import inputs
from cap_pretrain.checkpoints.load import Learner
from cap_pretrain.cli import arguments, figures
from cap_pretrain.cli.captioning import Named, captioner, draw_images
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.learners.protocols import Attends, learner_type
from cap_pretrain.models.decoding import Decoding

SIDE = 256  # pixels of the longer side of a panel at least: smaller images are enlarged
GAP = 8  # pixels beside and below a panel
PAGE = (2048, 3072)  # largest width and height of a page in pixels
COLUMNS = 8  # panels per row at most, by default


class Attended(NamedTuple):
    """An image and the attention map of each word of its caption."""

    name: str
    image: np.ndarray  # what the learner reads, uint8 [S, S, 3]
    words: list[str]
    maps: np.ndarray  # float32 [len(words), H, W]
    photo: np.ndarray  # uint8 [height, width, 3], what is drawn


class Row(NamedTuple):
    """Panels of one size [H, W, 3] beside each other, with their titles."""

    panels: list[np.ndarray]
    titles: list[str]

    @property
    def height(self) -> int:
        """Height in pixels, with the titles and the gap below."""
        return len(self.panels[0]) + figures.TITLE + GAP

    @property
    def step(self) -> int:
        """Distance of neighboring panels in pixels."""
        return self.panels[0].shape[1] + GAP


def attend_words(
    learner: Learner, named: Sequence[Named], caption: str, layer: dict[str, int | None]
) -> list[Attended]:
    """Compute attention maps of words of a caption, or, for "", of each image's own.

    `layer` is {"layer": index}, where None is the mean, or {} for the learner's default. Raises
    UserError if the learner does not attend to parts of images, or has no such layer.
    """
    able = learner.able(Attends) or learner
    _, tokenizer, graphdef, variables = able
    word_maps.check_attends(learner_type(graphdef), by_layer=bool(layer))
    pixels = np.stack([one.image for one in named])
    write = captioner(learner, Decoding(), len(pixels), seed=0)
    captions = [caption] * len(pixels) if caption else write(pixels)
    text = np.stack([tokenizer.encode(caption) for caption in captions])

    @jax.jit
    def attend(variables, pixels, text):
        return nnx.merge(graphdef, *variables).attend(pixels, text, **layer)

    attention = np.asarray(attend(variables, pixels, text))
    found = []
    for one, ids, row in zip(named, text, attention, strict=True):
        _, words = word_maps.words_of(tokenizer, ids)
        maps = word_maps.word_maps(row, words, one.image)
        titles = [word.text for word in words]
        found.append(Attended(one.name, one.image, titles, maps, one.photo))
    return found


def draw(
    attended: Sequence[Attended], columns: int | None, crop: str, side: int = SIDE
) -> list[Any]:
    """Return pages of rows of up to `columns` panels; every image starts a new row.

    `columns` is by default as many as a page of `PAGE` has room for. `crop` is how the learner's
    image was cut from the photo, "none" or "center". Smaller photos are enlarged to `side` pixels.
    """
    blocks = [_rows(found, columns, crop, side) for found in attended]
    pages: list[list[Row]] = [[]]
    for block in blocks:
        if sum(row.height for row in [*pages[-1], *block]) > PAGE[1] and pages[-1]:
            pages.append([])
        for row in block:
            if sum(each.height for each in [*pages[-1], row]) > PAGE[1] and pages[-1]:
                pages.append([])
            pages[-1].append(row)
    width = max(len(row.panels) * row.step for block in blocks for row in block)
    return [_page(rows, width) for rows in pages]


def _rows(found: Attended, columns: int | None, crop: str, side: int) -> list[Row]:
    """Return the photo and the heat map of each word, wrapped into rows."""
    photo = enlarged(found.photo, side)
    panels = [photo, *overlays(found.photo, found.maps, crop, side)]
    # Long file names differ at the end.
    titles = [found.name[-max(18, photo.shape[1] // 14) :], *found.words]
    if not columns:
        most = max(1, min(COLUMNS, PAGE[0] // (photo.shape[1] + GAP)))
        columns = -(-len(panels) // -(-len(panels) // most))  # rows of about equal length
    starts = range(0, len(panels), columns)
    return [Row(panels[n : n + columns], titles[n : n + columns]) for n in starts]


def _page(rows: Sequence[Row], width: int) -> Any:
    page = figures.new_page(width, sum(row.height for row in rows))
    top = 0
    for row in rows:
        for k, (panel, title) in enumerate(zip(row.panels, row.titles, strict=True)):
            figures.place(page, panel, GAP // 2 + k * row.step, top + figures.TITLE, title)
        top += row.height
    return page


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """Return the image [H, W, 3], enlarged to `side` pixels if it is smaller."""
    scale = side / max(image.shape[:2])
    if scale <= 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def overlays(
    photo: np.ndarray, maps: np.ndarray, crop: str = "none", side: int = SIDE
) -> list[np.ndarray]:
    """Return maps [n, H, W] as n smooth heat maps over a gray photo, [height, width, 3] in [0, 1].

    With `crop="center"` they cover the largest central square, and the rest is darkened.
    """
    colors = figures.imported("matplotlib").colormaps["inferno"]
    gray = (
        cv2.cvtColor(enlarged(photo, side), cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None] / 255
    )
    height, width = gray.shape[:2]
    short = min(height, width)
    top, left = ((height - short) // 2, (width - short) // 2) if crop == "center" else (0, 0)
    inside = np.s_[top : height - top, left : width - left]
    inner_height, inner_width = gray[inside].shape[:2]
    brightest = max(float(np.max(maps, initial=0)), np.finfo(np.float32).tiny)
    drawn = []
    for map_ in maps:
        heat = cv2.resize(
            map_ / brightest, (inner_width, inner_height), interpolation=cv2.INTER_CUBIC
        )
        over = np.repeat(0.25 * gray, 3, axis=2)
        heat = heat.clip(0, 1)
        opacity = 0.15 + 0.65 * heat[..., None]  # the photo shows where there is little attention
        over[inside] = (1 - opacity) * 0.8 * gray[inside] + opacity * colors(heat)[..., :3]
        drawn.append(over)
    return drawn


def _run(args: argparse.Namespace) -> int:
    layer = {"layer": args.layer} if "layer" in args else {}

    def draw_attention(learner: Learner, named: list[Named]) -> Any:
        crop = inputs.view(learner.config).crop
        found = attend_words(learner, named, args.caption, layer)
        return draw(found, args.columns, crop, args.side)

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
        "--columns",
        type=arguments.positive_int,
        help=f"panels per row; default: up to {COLUMNS}, as many as fit {PAGE[0]} pixels",
    )
    parser.add_argument(
        "--side",
        type=arguments.positive_int,
        default=SIDE,
        help=f"pixels that the longer side of a panel has at least; default: {SIDE}",
    )
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    return arguments.run(_run, args)


def _layer(text: str) -> int | None:
    return None if text == "mean" else int(text)


if __name__ == "__main__":
    sys.exit(main())
