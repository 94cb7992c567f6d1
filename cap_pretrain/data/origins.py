"""Captions of several origins, such as alt texts and synthetic ones: which is shown when, and how.

`data.fields.captions` names the features that hold them, with weights that may change during a run:
"alt_text:1@0,0@0.5+long" begins with both, and from the middle of the run on shows long ones only.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.data.sources.base import Example, parse_captions
from cap_pretrain.data.text.tokenizers import TextEncoder, encode_answer
from cap_pretrain.data.weights import Weight
from cap_pretrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Origins:
    """How captions are shown in training, by the order of their features in `data.fields`.

    Attributes:
        weights: Weight of each origin over the run.
        prefixes: What the captions of each origin begin with. The model is given it, like a
            question, and does not learn to predict it.
        lengths: Most tokens of a caption of each origin, EOS included, prefix excluded. 0: all that
            fit.
        examples: Number of examples that the run shows. 0: the weights are those of its beginning.
    """

    weights: tuple[Weight, ...]
    prefixes: tuple[str, ...]
    lengths: tuple[int, ...]
    examples: int = 0

    @classmethod
    def of(cls, data: ConfigDict, examples: int = 0) -> "Origins | None":
        """Return the origins of the `data` section of a config; raise UserError if invalid.

        None: the weights are constant, and all captions are shown alike.
        """
        weights = tuple(weight for _, weight in parse_captions(data.fields.captions))
        count = len(weights)
        prefixes = _listed(data.caption_prefixes, "caption_prefixes", str, count)
        lengths = _listed(data.caption_lengths, "caption_lengths", int, count)
        if any(length < 0 or length == 1 for length in lengths):
            raise UserError(
                f"data.caption_lengths: {data.caption_lengths!r}: give at least 2, a token and the "
                "end of the text, or 0 for no limit."
            )
        if all(weight.constant for weight in weights) and not any(prefixes) and not any(lengths):
            return None
        if data.buckets:
            raise UserError(
                "data.buckets: captions grouped by length have no origins; set data.buckets=False, "
                "or constant weights in data.fields.captions without data.caption_prefixes and "
                "data.caption_lengths."
            )
        return cls(weights, prefixes, lengths, examples)

    def check(self, tokenizer: TextEncoder) -> None:
        """Raise UserError if the tokenizer gives two prefixes the same ids."""
        known: dict[bytes, str] = {}
        for prefix in dict.fromkeys(self.prefixes):
            ids = encode_answer(tokenizer, prefix, None)[0].tobytes()
            if known.setdefault(ids, prefix) != prefix:
                raise UserError(
                    f"data.caption_prefixes: the tokenizer gives {known[ids]!r} and {prefix!r} the "
                    "same tokens; choose other words."
                )

    def at(self, row: int) -> list[float]:
        """Return the weight of each origin at a row of the run, counted from 0."""
        share = min(1.0, row / self.examples) if self.examples else 0.0
        return [weight.then(share) for weight in self.weights]


def _listed(values: Any, field: str, kind: type, count: int) -> tuple:
    """Return the values of a field with one value by origin; an empty one has `kind()` for each."""
    if not values:
        return (kind(),) * count
    right = isinstance(values, tuple | list) and all(type(value) is kind for value in values)
    if not right or len(values) != count:
        raise UserError(
            f"data.{field}: {values!r} is not a tuple of {count} values of {kind.__name__}, one "
            "for each feature of data.fields.captions."
        )
    return tuple(values)


def text_row(
    example: Example,
    where: float,
    tokenizer: TextEncoder,
    origins: Origins | None = None,
    row: int = 0,
) -> dict[str, Any]:
    """Return `text` and `prompt` of a row of a batch.

    Args:
        example: An example of a source.
        where: In [0, 1), chooses the caption by weight.
        tokenizer: Encodes the text.
        origins: How captions of several origins are shown. None: by the weights of the example.
        row: Number of the row in the run.
    """
    captions, weights = example["captions"], example.get("weights")
    question, limit = example.get("question", ""), 0
    of = example.get("origins") or [0] * len(captions)
    if origins and captions:
        now = origins.at(row)
        weights = [now[origin] / of.count(origin) for origin in of]
    which = drawn(weights, len(captions), where)
    if origins and captions:
        question = " ".join(filter(None, (origins.prefixes[of[which]], question)))
        limit = origins.lengths[of[which]]
    caption = captions[which] if captions else None
    ids, given = encode_answer(tokenizer, question, caption, limit)
    return {"text": ids, "prompt": np.int32(given)}


def drawn(weights: Sequence[float] | None, count: int, where: float) -> int:
    """Return which of `count` captions is drawn; all are equally likely if no weight is positive.

    `where`, in [0, 1), chooses by weight.
    """
    if not weights or not any(weights):
        return int(where * count)
    ends = np.cumsum(weights)
    return int(np.searchsorted(ends[:-1], where * ends[-1], side="right"))
