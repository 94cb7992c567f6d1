"""Captions, or answers to questions, that a learner writes for the images of a source."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from cap_pretrain import rng
from cap_pretrain.data.sources.base import Source
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context
from cap_pretrain.learners.protocols import WritesCaptions, learner_type
from cap_pretrain.models.decoding import Decoding, write_captions
from cap_pretrain.models.text import PAD


class Captioning:
    """Writes captions of the examples of a source, or answers to their questions, in batches.

    `limit` takes only the first so many examples; None is all. Samples depend on the run's seed and
    the example's index alone. Raises UserError if the learner cannot write captions.
    """

    def __init__(
        self, context: Context, source: Source, *, batch_size: int, limit: int | None, how: Decoding
    ):
        learner = learner_type(context.graphdef)
        if not issubclass(learner, WritesCaptions):
            raise UserError(
                f"evals: this evaluator needs captions, which a {learner.__name__} does not write; "
                "use a captioner, or remove the evaluator."
            )
        self._context, self._source = context, source
        self._batch_size, self._limit = batch_size, limit
        length, seed = context.config.text.length, context.config.seed

        def caption(learner, batch):
            keys = jax.vmap(lambda i: rng.key(seed, i, "captions"))(batch["index"])
            given = jnp.arange(length) < batch["prompt"][:, None]
            prompt = jnp.where(given, batch["text"], PAD)
            eos = context.tokenizer.eos_id
            return write_captions(
                learner, batch["image"], how, length=length, eos=eos, keys=keys, prompt=prompt
            )

        self._caption = context.jit(caption)
        self._gather = context.jit(lambda _, arrays: arrays)

    def __call__(self, variables: Any) -> Iterator[tuple[int, str]]:
        """Yield (index, caption without the question) in order, for images that can be decoded."""
        for batch, _ in self._context.batches(self._source, self._batch_size, self._limit):
            tokens = self._caption(variables, batch)
            where = self._gather(variables, [batch[k] for k in ("index", "prompt", "mask")])
            for ids, index, given, real in zip(*jax.device_get([tokens, *where]), strict=True):
                if real:
                    yield int(index), self._context.tokenizer.decode(ids[given:])
