"""Captions, or answers to questions, that a learner writes for the images of a source."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain import rng
from cap_pretrain.data.sources.base import Source
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context
from cap_pretrain.learners.protocols import WritesCaptions
from cap_pretrain.models.decoding import Decoding, write_all
from cap_pretrain.models.text import PAD


class Caption(NamedTuple):
    """A caption of an image, or an answer to a question.

    Attributes:
        text: The caption, without the question.
        log_prob: Its log-probability under the learner in nats: the sum over its tokens, including
            the one that ends it; of the softmax of the logits as they are, before any rule,
            temperature or restriction of the decoding.
        tokens: The number of these tokens.
    """

    text: str
    log_prob: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """Return the fields, and the mean log-probability of a token, as JSON."""
        total = self.log_prob if math.isfinite(self.log_prob) else None
        mean = None if total is None else total / max(self.tokens, 1)
        return {
            "caption": self.text,
            "log_prob": total,
            "log_prob_per_token": mean,
            "tokens": self.tokens,
        }


def read_captions(
    tokenizer: Any, tokens: np.ndarray, log_p: np.ndarray, given: int
) -> list[Caption]:
    """Return the captions that a decoder wrote for one image, at least one.

    Args:
        tokenizer: The tokenizer of the learner.
        tokens: int32 [n, length], as in `decoding.Written`.
        log_p: float32 [n], likewise; -inf marks captions that were not found.
        given: Number of tokens of the question.
    """
    found = []
    for ids, score in zip(tokens, log_p, strict=True):
        if np.isfinite(score):
            written = int(np.max(np.flatnonzero(ids != PAD), initial=given - 1)) + 1
            found.append(Caption(tokenizer.decode(ids[given:]), float(score), written - given))
    return found or [Caption(tokenizer.decode(tokens[0, given:]), float("-inf"), 0)]


class Captioning:
    """Writes captions of the examples of a source, or answers to their questions, in batches.

    `limit` takes only the first so many examples; None is all. Samples depend on the run's seed and
    the example's index alone. Raises UserError if the learner cannot write captions.
    """

    def __init__(
        self,
        context: Context,
        source: Source,
        *,
        batch_size: int,
        limit: int | None,
        how: Decoding,
        part: str = "",
    ):
        able = context.able(WritesCaptions, part)
        if able is None:
            raise UserError(
                f"evals: this evaluator needs captions, which a {context.kind.__name__} does not "
                "write; use a captioner, or remove the evaluator."
            )
        self.context = context = able
        self._context, self._source = context, source
        self._batch_size, self._limit = batch_size, limit
        self._beams = how.beams if how.method == "beam" else 1
        length, seed = context.config.text.length, context.config.seed

        def caption(learner, batch):
            keys = jax.vmap(lambda i: rng.key(seed, i, "captions"))(batch["index"])
            given = jnp.arange(length) < batch["prompt"][:, None]
            prompt = jnp.where(given, batch["text"], PAD)
            eos = context.tokenizer.eos_id
            return write_all(
                learner, batch["image"], how, length=length, eos=eos, keys=keys, prompt=prompt
            )

        self._several = how.captions > 1
        self._caption = context.jit(caption)
        self._gather = context.jit(lambda _, arrays: arrays)

    def passes(self, images: int) -> float:
        """Return the forward passes that take as long as captions of so many images, about.

        Tokens are written one by one, so decoding keeps a device less busy than training does.
        """
        return 2.0 * images * (1 + self._beams) / 2

    def __call__(self, variables: Any) -> Iterator[tuple[int, str]]:
        """Yield (index, first caption) in order, for images that can be decoded."""
        for index, captions in self.scored(variables):
            yield index, captions[0].text

    def scored(self, variables: Any) -> Iterator[tuple[int, list[Caption]]]:
        """Yield (index, captions) in order, for images that can be decoded."""
        for batch, _ in self._context.batches(self._source, self._batch_size, self._limit):
            written = self._caption(variables, batch)
            where = self._gather(variables, [batch[k] for k in ("index", "prompt", "mask")])
            found = jax.device_get([*written, *where])
            for tokens, log_p, index, given, real in zip(*found, strict=True):
                if real:
                    yield int(index), read_captions(self._context.tokenizer, tokens, log_p, given)

    def recorded(self, captions: list[Caption]) -> dict[str, Any]:
        """Return all captions as JSON where several are asked for, else nothing."""
        return {"captions": [one.as_json() for one in captions]} if self._several else {}
