"""Sample captions of the same images each time, to see with one's own eyes what was learned."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain import rng
from cap_pretrain.data import pipeline
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.learners.protocols import WritesCaptions, learner_type
from cap_pretrain.models.decoding import Decoding, write_captions
from cap_pretrain.models.text import PAD


class Captioning:
    """Captions of the examples of a source, or answers to their questions, in batches.

    Args:
      context: what evaluators work with.
      source: the examples.
      batch_size: images a batch.
      limit: only the first so many examples.
      how: the decoding. What is drawn depends on the run's seed and the example's index alone.

    Raises:
      UserError: the learner writes no captions.
    """

    def __init__(
        self, context: Context, source, *, batch_size: int, limit: int | None, how: Decoding
    ):
        learner = learner_type(context.graphdef)
        if not issubclass(learner, WritesCaptions):
            raise UserError(
                "evals: this evaluator reads captions, and a learner of the kind "
                f"{learner.__name__} writes none; take a captioner, or leave it out."
            )
        self._context, self._source = context, source
        self._batch_size, self._limit = batch_size, limit
        length, eos, seed = (
            context.config.text.length,
            context.tokenizer.eos_id,
            context.config.seed,
        )

        def caption(learner, batch):
            keys = jax.vmap(lambda i: rng.key(seed, i, "captions"))(batch["index"])
            given = jnp.arange(length) < batch["prompt"][:, None]
            prompt = jnp.where(given, batch["text"], PAD)
            return write_captions(
                learner, batch["image"], how, length=length, eos=eos, keys=keys, prompt=prompt
            )

        self._caption = context.jit(caption)
        self._gather = context.jit(lambda _, arrays: arrays)

    def __call__(self, variables) -> Iterator[tuple[int, str]]:
        """Yields (index in the source, caption without the question), in order."""
        for batch, _ in self._context.batches(self._source, self._batch_size, self._limit):
            tokens = self._caption(variables, batch)
            where = self._gather(variables, [batch[k] for k in ("index", "prompt", "mask")])
            for ids, index, given, real in zip(*jax.device_get([tokens, *where]), strict=True):
                if real:
                    yield int(index), self._context.tokenizer.decode(ids[given:])


class Captions:
    """Captions of the first images of a split, with their references."""

    @dataclasses.dataclass(frozen=True)
    class Options(Decoding):
        """Settings: how captions are decoded (see `Decoding`), and

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
        self._context, self._options = context, options
        self._source = context.source(options.split, options.data)
        self._captioning = Captioning(
            context, self._source, batch_size=options.count, limit=options.count, how=options
        )
        named = context.named(options.split, options.data)
        self._details = {"protocol": options.described, **named}

    def __call__(self, variables) -> Result:
        size = self._context.config.data.image_size
        samples, pictures, lines = [], [], []
        for index, caption in self._captioning(variables):
            example = self._source[index]
            references = list(example["captions"])
            question = example.get("question", "")
            sample = {"index": index, "id": example["id"]}
            sample |= {"question": question} if question else {}
            samples.append(sample | {"caption": caption, "references": references})
            if len(samples) <= self._options.shown:
                if not pipeline.is_features(example["image"]):
                    pictures.append((pipeline.picture(example["image"], size), caption))
                lines.append(" ".join(filter(None, (f"{example['id']}:", question, caption))))
                lines += [f"    reference: {reference}" for reference in references[:1]]
        captions = [sample["caption"] for sample in samples]
        figures = {
            # Captioners are known to collapse to one sentence without anybody noticing.
            "distinct_share": len(set(captions)) / max(len(captions), 1),
            "mean_words": float(np.mean([len(caption.split()) for caption in captions])),
        }
        details = self._details | {"images": len(samples), "samples": samples}
        return Result(figures, details, tuple(lines), tuple(pictures))
