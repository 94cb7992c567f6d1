"""Sample captions of the same images at each evaluation, for people to read."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from cap_pretrain.data import views
from cap_pretrain.errors import UserError
from cap_pretrain.evals import examples, exhibits
from cap_pretrain.evals.base import Context, DataOptions, PartOptions, Result
from cap_pretrain.evals.exhibits import Exhibit, Panel
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference.captioning import Captioning
from cap_pretrain.models.decoding import Decoding


class Captions:
    """Captions of the first images of a split, with their references."""

    @dataclasses.dataclass(frozen=True)
    class Options(PartOptions, DataOptions, Decoding):
        """Decoding, the number of images to caption, and how many are `shown` on the console."""

        count: int = 32
        shown: int = 5

    def __init__(self, context: Context, options: Options):
        self._context, self._options = context, options
        self._source = context.source(options.split, options.data)
        self._captioning = Captioning(
            context,
            self._source,
            batch_size=options.count,
            limit=options.count,
            how=options,
            part=options.part,
        )
        named = context.named(options.split, options.data)
        self._heat = examples.WordHeat(self._captioning.context, self._source)
        self._details = {"protocol": options.described, **named}

    def work(self) -> Work:
        """Return the work of an evaluation; see `Captioning.passes`."""
        count = min(len(self._source), self._options.count)
        return Work(count, self._captioning.passes, lambda n: {"count": n})

    def __call__(self, variables: Any) -> Result:
        """Caption the images."""
        size = self._context.config.data.image_size
        samples: list[dict[str, Any]] = []
        pictures, lines = [], []
        for index, written in self._captioning.scored(variables):
            caption = written[0].text
            example = self._source[index]
            references = list(example["captions"])
            question = example.get("question", "")
            sample = {"index": index, "id": example["id"]}
            sample |= {"question": question} if question else {}
            sample |= {"caption": caption, "references": references}
            samples.append(sample | self._captioning.recorded(written))
            if len(samples) <= self._options.shown:
                if not views.is_features(example["image"]):
                    pictures.append((views.picture(example["image"], size), caption))
                lines.append(" ".join(filter(None, (f"{example['id']}:", question, caption))))
                lines += [f"    or: {one.text} (log p {one.log_prob:.2f})" for one in written[1:]]
                lines += [f"    reference: {reference}" for reference in references[:1]]
        captions = [sample["caption"] for sample in samples]
        metrics = {
            # Reveals a captioner that has collapsed to a single sentence.
            "distinct_share": len(set(captions)) / max(len(captions), 1),
            "mean_words": float(np.mean([len(caption.split()) for caption in captions])),
        }
        details = self._details | {"images": len(samples), "samples": samples}
        shown = [(sample["index"], sample["caption"]) for sample in samples[: exhibits.COUNT]]
        found = examples.attempted(self._context, lambda: self._exhibits(variables, shown))
        return Result(metrics, details, tuple(lines), tuple(pictures), found)

    def _exhibits(self, variables: Any, shown: list[tuple[int, str]]) -> Iterator[Exhibit]:
        """Return the images with their captions, and with attention maps if there are any."""
        first = list(itertools.takewhile(lambda pair: pair[0] < examples.ATTENDED, shown))
        heat: dict[int, tuple[Panel, ...]] = {}
        if [index for index, _ in first] == list(range(len(first))):  # all of them decode
            with contextlib.suppress(UserError):  # its attention, if any, makes no map
                heat = self._heat(variables, [caption for _, caption in first])
        return examples.captioned(self._source, shown, heat)
