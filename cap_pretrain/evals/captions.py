"""Sample captions of the same images each time, to see with one's own eyes what was learned."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from cap_pretrain import decoding
from cap_pretrain.evals import Context, Result
from cap_pretrain.learners.captioner import PAD


class Captioning:
    """Greedy captions of the examples of a source, in batches under one `jax.jit`."""

    def __init__(self, context: Context, source, *, batch_size: int, limit: int | None):
        self._context, self._source = context, source
        self._batch_size, self._limit = batch_size, limit
        length, eos = context.config.text.length, context.tokenizer.eos_id

        def caption(learner, images):
            return decoding.greedy(
                learner.decode_step,
                learner.init_decoding(images),
                batch=len(images),
                length=length,
                start=PAD,
                eos=eos,
            )

        self._caption = context.jit(caption)
        self._gather = context.jit(lambda _, arrays: arrays)

    def __call__(self, variables) -> Iterator[tuple[int, str]]:
        """Yields (index in the source, caption), in order."""
        for batch, _ in self._context.batches(self._source, self._batch_size, self._limit):
            tokens = self._caption(variables, batch["image"])
            where = self._gather(variables, {k: batch[k] for k in ("index", "mask")})
            tokens, where = jax.device_get((tokens, where))
            for ids, index, real in zip(tokens, where["index"], where["mask"], strict=True):
                if real:
                    yield int(index), self._context.tokenizer.decode(ids)


class Captions:
    """Captions of the first images of a split, with their references."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings.

        Attributes:
          data: dataset; "" is the run's own.
          split: "" is `data.eval_split`.
          count: images that are captioned.
          shown: how many of them the console shows.
        """

        data: str = ""
        split: str = ""
        count: int = 32
        shown: int = 5

    def __init__(self, context: Context, options: Options):
        self._options = options
        self._source = context.source(options.split, options.data)
        self._captioning = Captioning(
            context, self._source, batch_size=options.count, limit=options.count
        )

    def __call__(self, variables) -> Result:
        captions = dict(self._captioning(variables))
        samples = [
            {"id": e["id"], "caption": caption, "references": list(e["captions"])}
            for caption, e in ((c, self._source[i]) for i, c in captions.items())
        ]
        # Captioners are known to collapse to one sentence without anybody noticing.
        distinct = len(set(captions.values())) / max(len(captions), 1)
        lengths = [len(c.split()) for c in captions.values()]
        lines = []
        for sample in samples[: self._options.shown]:
            lines.append(f"{sample['id']}: {sample['caption']}")
            lines.append(
                f"    reference: {sample['references'][0]}" if sample["references"] else ""
            )
        figures = {"distinct_share": distinct, "mean_words": float(np.mean(lengths))}
        return Result(figures, {"samples": samples}, tuple(filter(None, lines)))
