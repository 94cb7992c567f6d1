"""Accuracy of boxes for referring expressions, such as those of RefCOCO."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import jax
import numpy as np

from cap_pretrain.data.regions import Region, regions_of
from cap_pretrain.data.requirements import has_regions
from cap_pretrain.data.sources.base import Example, Source, without_image
from cap_pretrain.errors import UserError
from cap_pretrain.evals import examples
from cap_pretrain.evals.base import BatchOptions, Context, PartOptions, Result
from cap_pretrain.evals.exhibits import Exhibit, Line, Panel, original
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.metrics.boxes import intersection_over_union
from cap_pretrain.learners.protocols import Locates
from cap_pretrain.telemetry import console

_LOOKED_AT = 20  # images from which the number of expressions is estimated
_PREDICTED, _TRUE = (220, 30, 30), (30, 160, 30)  # RGB of drawn boxes


class Referring:
    """Share of referring expressions for which the learner's box overlaps enough with the true one.

    Each expression of an image counts once. The box is written by greedy decoding after the
    expression, and is right if its intersection over union (IoU) with the true one is at least
    `threshold`. `constant_accuracy` is that of one box for all, the mean, which needs no image.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(PartOptions, BatchOptions):
        """Settings; `limit` counts images, and `samples` expressions are recorded with boxes.

        Attributes:
            threshold: Least IoU of a correct box; RefCOCO's is 0.5 (Yu et al. 2016, 1608.00272).
            samples: Expressions that are recorded.
        """

        threshold: float = 0.5
        samples: int = 32

    def __init__(self, context: Context, options: Options):
        """Build the evaluator; raise UserError if the learner finds no boxes or there are none."""
        able = context.able(Locates, options.part)
        if able is None:
            raise UserError(
                f"evals: referring needs boxes, which a {context.kind.__name__} does not find; "
                "train a decoder that does (configs/referring.py), or remove the evaluator."
            )
        if not able.config.learner.get("aref_weight", 1.0):
            raise UserError(
                "evals: referring decodes the boxes of the task aref, which is not trained with "
                "learner.aref_weight: 0; set it, or remove the evaluator."
            )
        if not 0 < options.threshold <= 1:
            raise UserError(f"evals: referring.threshold: {options.threshold} is not in (0, 1].")
        self._context = context = able
        self._options = options
        self._source = context.source(options.split, options.data)
        if not has_regions(self._source):
            raise UserError(
                f"evals: referring needs regions (phrases with boxes), and {self._source} has "
                "none; name another dataset."
            )
        self._expressions: Expressions | None = None

        def locate(learner, batch):
            return learner.locate(batch["image"], batch["text"]), batch["index"], batch["mask"]

        self._locate = context.jit(locate)

    def work(self) -> Work:
        """Return the work of an evaluation: about two forward passes for each expression."""
        count = min(len(self._source), self._options.limit or len(self._source))
        seen = min(count, _LOOKED_AT)
        regions = len(Expressions(self._source, seen)) / max(seen, 1)
        return Work(count, lambda images: 2.0 * regions * images)

    def __call__(self, variables: Any) -> Result:
        """Find the box of every expression; raises UserError if no image can be decoded."""
        options = self._options
        if self._expressions is None:
            with console.doing("Reading the expressions", say=False):
                self._expressions = Expressions(self._source, options.limit)
        source = self._expressions
        found: dict[int, np.ndarray] = {}
        for batch, _ in self._context.batches(source, options.batch_size):
            result = jax.device_get(self._locate(variables, batch))
            found |= {int(i): box for box, i, real in zip(*result, strict=True) if real}
        if not found:
            raise UserError(f"evals: {self._source} has no image that can be decoded.")
        true = np.array([source.region(i)[1] for i in found])
        overlaps = intersection_over_union(np.array(list(found.values())), true)
        right = overlaps >= options.threshold
        constant = intersection_over_union(true.mean(axis=0), true)
        metrics = {
            "accuracy": float(np.mean(right)),
            "mean_iou": float(np.mean(overlaps)),
            "constant_accuracy": float(np.mean(constant >= options.threshold)),
        }
        judged = [
            {
                "id": without_image(self._source, source.image(i))["id"],
                "expression": source.region(i)[0],
                "box": [round(float(side), 4) for side in box],
                "true_box": [round(side, 4) for side in source.region(i)[1]],
                "iou": float(overlap),
            }
            for (i, box), overlap in itertools.islice(
                zip(found.items(), overlaps, strict=True), options.samples
            )
        ]
        details = {
            "protocol": f"boxes by greedy decoding, right from an IoU of {options.threshold}",
            **self._context.named(options.split, options.data),
            "expressions": len(found),
            "samples": judged,
        }
        shown = examples.attempted(
            self._context, lambda: _exhibits(source, dict(zip(found, judged, strict=False)), right)
        )
        lines = (f"{one['id']}: {one['expression']}, IoU {one['iou']:.2f}" for one in judged[:5])
        return Result(metrics, details, tuple(lines), exhibits=shown)


class Expressions:
    """One example for each region of the images of a source, whose caption is the phrase.

    `limit` takes the regions of only the first so many images; 0 is all.
    """

    def __init__(self, source: Source, limit: int = 0):
        self._source, self.class_names = source, source.class_names
        self._places: list[tuple[int, Region]] = []
        for index in range(min(limit or len(source), len(source))):
            regions = regions_of(source, index, without_image(source, index))
            self._places += [(index, region) for region in regions]

    def __str__(self) -> str:
        return f"{self._source}, by expression"

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        return self._source[self.image(index)] | self._own(index)

    def without_image(self, index: int) -> Example:
        """Return `self[index]`, without its image where the source can skip reading it."""
        return without_image(self._source, self.image(index)) | self._own(index)

    def image(self, index: int) -> int:
        """Return the index of the image that an expression is about."""
        return self._places[index][0]

    def region(self, index: int) -> Region:
        """Return an expression and its box."""
        return self._places[index][1]

    def _own(self, index: int) -> Example:
        region = self.region(index)
        return {"captions": [region[0]], "weights": [], "question": "", "regions": [region]}


def _exhibits(
    source: Expressions, judged: dict[int, dict[str, Any]], right: np.ndarray
) -> Iterator[Exhibit]:
    """Yield images with the true box and that of the learner."""
    for (index, one), is_right in zip(judged.items(), right, strict=False):
        image = drawn(original(source[index]["image"]), one["true_box"], _TRUE)
        image = drawn(image, one["box"], _PREDICTED)
        lines = (
            Line("expression", one["expression"], bool(is_right)),
            Line("overlap", f"{one['iou']:.2f}; green: the true box, red: the learner's"),
        )
        yield Exhibit(one["id"], (Panel(image),), lines)


def drawn(image: np.ndarray, box: Sequence[float], colour: tuple[int, int, int]) -> np.ndarray:
    """Return an image uint8 [H, W, 3] with the outline of a box, in RGB."""
    height, width = image.shape[:2]
    scale = np.array((width, height, width, height))
    left, top, right, bottom = np.round(np.asarray(box) * scale).astype(int).tolist()
    corners = (left, top), (max(right - 1, left), max(bottom - 1, top))
    return cv2.rectangle(image.copy(), *corners, colour, max(1, max(height, width) // 160))
