"""How much attention falls on an object at the words for its color and shape."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import find_mentions
from cap_pretrain.data.scenes.world import Scene
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, PartOptions, Result
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.learners.protocols import Attends

Box = tuple[float, float, float, float]

KINDS = ("colour", "shape")


class Measured(NamedTuple):
    """What is measured at a word of a kind of `KINDS`.

    `shares` are the fractions of the attention in the box of the object that the word refers to,
    then in that of each other object; `areas` the areas of these boxes, as fractions of the image.
    """

    kind: str
    shares: list[float]
    areas: list[float]


class AttentionMass:
    """Fraction of the attention inside the box of the object that a word refers to.

    Each image of `scenes` is read with its first true caption, as in training. Words for colors and
    shapes are measured where they can refer to only one object of the scene. The box is the square
    around the object's circle. Attention to a token is spread evenly over its patch, so that
    uniform attention gives the area. Metrics, for all words together and, as NAME_KIND, for words
    of the kinds "colour" and "shape":

        share   fraction of the attention inside the box, mean over words
        area    area of the box as a fraction of the image, mean over the same words
        ratio   share / area; 1 is chance
        own     the same ratio over words in scenes with other objects
        others  that of the other objects' boxes; it equals `own` if attention ignores the word
    """

    @dataclasses.dataclass(frozen=True)
    class Options(PartOptions):
        """Settings; the first `count` images of a split of `scenes` ("": `data.eval_split`)."""

        split: str = ""
        count: int = 500
        batch_size: int = 100

    def __init__(self, context: Context, options: Options):
        """Build the evaluator; raise UserError without attention over the image or `scenes`."""
        context = context.able(Attends, options.part) or context
        word_maps.check_attends(context.kind)
        self._context, self._options = context, options
        source = context.source(options.split, "scenes")
        if not isinstance(source, Scenes):
            raise UserError("evals: attention_mass works on the dataset `scenes` only.")
        self._source = source

        def attend(learner, batch):
            where = {name: batch[name] for name in ("index", "mask", "text")}
            return learner.attend(batch["image"], batch["text"]), where

        self._attend = context.jit(attend)

    def work(self) -> Work:
        """Return the work of an evaluation."""
        count = min(len(self._source), self._options.count)
        return Work(count, limits=lambda n: {"count": n})

    def __call__(self, variables: Any) -> Result:
        """Measure attention at words for one object; raises UserError if no caption has any."""
        measured: list[Measured] = []
        images = 0
        for scene, text, words, attention in self._attention(variables):
            of_image = list(_measure(scene, text, words, attention))
            images += bool(of_image)
            measured += of_image
        if not measured:
            raise UserError(f"evals: attention_mass: no caption of {self._source} names an object.")
        metrics = _metrics(measured, "")
        for kind in KINDS:
            metrics |= _metrics([word for word in measured if word.kind == kind], f"_{kind}")
        details = {
            "protocol": "attention inside the object's box, at true captions' words for it",
            **self._context.named(self._options.split, "scenes"),
            "images": images,
            "words": {kind: sum(word.kind == kind for word in measured) for kind in KINDS},
        }
        line = (
            f"at words for an object, {metrics['share']:.1%} of the attention is in its box, which "
            f"is {metrics['area']:.1%} of the image"
        )
        return Result(metrics, details, (line,))

    def _attention(self, variables) -> Iterator[tuple]:
        """Yield the scene, caption, words and attention [T, N] of each image."""
        batches = self._context.batches(self._source, self._options.batch_size, self._options.count)
        for batch, _ in batches:
            attention, where = jax.device_get(self._attend(variables, batch))
            for row in np.flatnonzero(where["mask"]):
                text, words = word_maps.words_of(self._context.tokenizer, where["text"][row])
                yield self._source.scene(int(where["index"][row])), text, words, attention[row]


def _measure(
    scene: Scene, text: str, words: list[word_maps.Word], attention: np.ndarray
) -> Iterator[Measured]:
    by_start = {word.start: word for word in words}
    for mention in find_mentions(text):
        things = [thing for thing in scene.things if mention.fits(thing)]
        if len(things) != 1:
            continue
        others = [thing.box for thing in scene.things if thing not in things]
        for kind in KINDS:
            # A truncated caption may have lost the word.
            if word := by_start.get(getattr(mention, f"{kind}_at")):
                (map_,) = word_maps.word_maps(attention, [word])
                boxes = [things[0].box, *others]
                shares = [float(np.sum(map_ * covered(box, len(map_)))) for box in boxes]
                areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
                yield Measured(kind, shares, areas)


def covered(box: Box, side: int) -> np.ndarray:
    """Return the fraction of each cell of a square grid that is inside a box: float64 [side, side].

    `box` is left, top, right and bottom, as fractions of the image.
    """
    cells = np.arange(side)

    def along(start: float, end: float) -> np.ndarray:
        return np.clip(end * side - cells, 0, 1) - np.clip(start * side - cells, 0, 1)

    left, top, right, bottom = box
    return np.outer(along(top, bottom), along(left, right))


def _metrics(measured: list[Measured], suffix: str) -> dict[str, float]:
    """Return the metrics that `AttentionMass` names, over some words."""
    if not measured:
        return {}
    share = float(np.mean([word.shares[0] for word in measured]))
    area = float(np.mean([word.areas[0] for word in measured]))
    metrics = {"share": share, "area": area, "ratio": share / area}
    if several := [(word.shares, word.areas) for word in measured if len(word.areas) > 1]:
        shares, areas = (
            np.array([(x[0], sum(x[1:])) for x in part]) for part in zip(*several, strict=True)
        )
        own, others = shares.sum(0) / areas.sum(0)
        metrics |= {"own": float(own), "others": float(others)}
    return {name + suffix: value for name, value in metrics.items()}
