"""Accuracy of captions of unseen `scenes` images: every object's color and shape is named."""

import dataclasses
from typing import Any

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import mentions, names_every_object
from cap_pretrain.errors import UserError
from cap_pretrain.evals import examples, exhibits
from cap_pretrain.evals.base import Context, PartOptions, Result
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference.captioning import Captioning
from cap_pretrain.models.decoding import Decoding


class SceneCaptions:
    """Fraction of captions that name each object by its color and shape, and no other object."""

    @dataclasses.dataclass(frozen=True)
    class Options(PartOptions, Decoding):
        """Settings, in addition to how captions are decoded.

        `split` of `scenes` is val, test, or novel (color-shape pairs that training never shows).
        """

        split: str = "val"
        count: int = 500
        batch_size: int = 100

    def __init__(self, context: Context, options: Options):
        """Build the evaluator; raise UserError unless a captioner is evaluated on `scenes`."""
        source = context.source(options.split, "scenes")
        if not isinstance(source, Scenes):
            raise UserError("evals: scene_captions works on the dataset `scenes` only.")
        self._context, self._source, self._count = context, source, options.count
        self._captioning = Captioning(
            context,
            source,
            batch_size=options.batch_size,
            limit=options.count,
            how=options,
            part=options.part,
        )
        self._details = {
            "protocol": f"{options.described}; every object's colour and shape, and no other",
            "dataset": "scenes",
            "split": options.split,
        }

    def work(self) -> Work:
        """Return the work of an evaluation; see `Captioning.passes`."""
        count = min(len(self._source), self._count)
        return Work(count, self._captioning.passes, lambda n: {"count": n})

    def __call__(self, variables: Any) -> Result:
        """Caption the images and compare the captions with the scenes."""
        right, mistakes = {}, []
        by_count: dict[int, list[bool]] = {}  # number of objects -> correct captions
        captions = list(self._captioning.scored(variables))
        for index, written in captions:
            caption = written[0].text
            scene = self._source.scene(index)
            named = names_every_object(scene, caption)
            right[index] = named
            by_count.setdefault(len(scene.things), []).append(named)
            if not named:
                mistakes.append(
                    {
                        "index": index,
                        "caption": caption,
                        "mentioned": mentions(caption),
                        "true": [(thing.colour, thing.shape) for thing in scene.things],
                        **self._captioning.recorded(written),
                    }
                )
        count = sum(right.values())
        accuracy = count / len(captions)
        metrics = {"accuracy": accuracy}
        for objects, results in sorted(by_count.items()):
            metrics[f"accuracy_{objects}_objects"] = sum(results) / len(results)
        line = (
            f"{count} of {len(captions)} captions of unseen images name every object's colour and "
            f"shape ({accuracy:.1%})"
        )
        details = self._details | {"images": len(captions), "mistakes": mistakes}
        chosen = set(examples.balanced(right, exhibits.COUNT))
        shown = [(index, written[0].text) for index, written in captions if index in chosen]
        found = examples.attempted(self._context, lambda: examples.captioned(self._source, shown))
        return Result(metrics, details, (line,), exhibits=found)
