"""Whether, at the word for an object's colour or shape, attention falls on that object."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import find_mentions
from cap_pretrain.data.scenes.world import Scene
from cap_pretrain.errors import UserError
from cap_pretrain.evals import word_maps
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.learners.protocols import learner_type

Box = tuple[float, float, float, float]

KINDS = ("colour", "shape")


class AttentionMass:
    """Share of the attention inside the box of the object that a word is about.

    Captions are the true, first ones of images of `scenes`, each read as in training. Their words
    for colours and shapes are measured where only one object of the scene can be meant. The box is
    the square around the object's circle. Attention for a token of the encoder is spread evenly
    over its part of the image, so where a model attends everywhere alike, the share is that of the
    area. Figures, for both kinds of words together, and as NAME_KIND for "colour" and "shape":

      share   of the attention that is inside the box, mean over words
      area    of the box, as a share of the image, mean over the same words
      ratio   share / area: 1 is chance
      own     the same ratio where the scene has other objects, and
      others  that of their boxes: attention to objects as such would give as much
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings.

        Attributes:
          split: of `scenes`; "" is `data.eval_split`.
          count: images, the first ones.
          batch_size: images a batch.
        """

        split: str = ""
        count: int = 500
        batch_size: int = 100

    def __init__(self, context: Context, options: Options):
        """Builds the evaluator.

        Raises:
          UserError: the learner has no attention to look at, or the dataset is another one.
        """
        word_maps.check_attends(learner_type(context.graphdef))
        self._context, self._options = context, options
        self._source = context.source(options.split, "scenes")
        if not isinstance(self._source, Scenes):
            raise UserError("evals: attention_mass works on the dataset `scenes` only.")

        def attend(learner, batch):
            where = {name: batch[name] for name in ("index", "mask", "text")}
            return learner.attend(batch["image"], batch["text"]), where

        self._attend = context.jit(attend)

    def __call__(self, variables) -> Result:
        seen = []  # kind; share and area of its object; of the other ones
        images = 0
        for scene, text, words, attention in self._looks(variables):
            measured = list(_measure(scene, text, words, attention))
            images += bool(measured)
            seen += measured
        if not seen:
            raise UserError(f"evals: attention_mass: no caption of {self._source} names an object.")
        figures = _figures(seen, "")
        for kind in KINDS:
            figures |= _figures([word for word in seen if word[0] == kind], f"_{kind}")
        details = {
            "protocol": "attention inside the object's box, at true captions' words for it",
            **self._context.named(self._options.split, "scenes"),
            "images": images,
            "words": {kind: sum(word[0] == kind for word in seen) for kind in KINDS},
        }
        line = (
            f"at words for an object, {figures['share']:.1%} of the attention is in its box, which "
            f"is {figures['area']:.1%} of the image"
        )
        return Result(figures, details, (line,))

    def _looks(self, variables) -> Iterator[tuple]:
        """Yields scene, caption, its words, and attention [T, N] of each image."""
        batches = self._context.batches(self._source, self._options.batch_size, self._options.count)
        for batch, _ in batches:
            attention, where = jax.device_get(self._attend(variables, batch))
            for row in np.flatnonzero(where["mask"]):
                text, words = word_maps.words_of(self._context.tokenizer, where["text"][row])
                yield self._source.scene(int(where["index"][row])), text, words, attention[row]


def _measure(scene: Scene, text: str, words: list[word_maps.Word], attention: np.ndarray):
    """Yields what `_figures` takes for each word that is about one object."""
    starting = {word.start: word for word in words}
    for mention in find_mentions(text):
        things = [thing for thing in scene.things if mention.fits(thing)]
        if len(things) != 1:
            continue
        others = [thing.box for thing in scene.things if thing not in things]
        for kind in KINDS:
            # A caption that was cut may have lost the word.
            if word := starting.get(getattr(mention, f"{kind}_at")):
                (map_,) = word_maps.word_maps(attention, [word])
                boxes = [things[0].box, *others]
                shares = [float(np.sum(map_ * covered(box, len(map_)))) for box in boxes]
                areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
                yield kind, shares, areas


def covered(box: Box, side: int) -> np.ndarray:
    """How much of each cell of a grid is inside a box: [side, side], of 0 to 1."""
    cells = np.arange(side)

    def along(start: float, end: float) -> np.ndarray:
        return np.clip(end * side - cells, 0, 1) - np.clip(start * side - cells, 0, 1)

    left, top, right, bottom = box
    return np.outer(along(top, bottom), along(left, right))


def _figures(seen: list[tuple[str, list[float], list[float]]], suffix: str) -> dict[str, float]:
    """As `AttentionMass` says, of (kind, shares, areas) of words, the own object's first."""
    if not seen:
        return {}
    share = float(np.mean([shares[0] for _, shares, _ in seen]))
    area = float(np.mean([areas[0] for _, _, areas in seen]))
    figures = {"share": share, "area": area, "ratio": share / area}
    if several := [(shares, areas) for _, shares, areas in seen if len(areas) > 1]:
        shares, areas = (
            np.array([(x[0], sum(x[1:])) for x in part]) for part in zip(*several, strict=True)
        )
        own, others = shares.sum(0) / areas.sum(0)
        figures |= {"own": float(own), "others": float(others)}
    return {name + suffix: value for name, value in figures.items()}
