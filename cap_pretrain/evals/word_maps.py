"""From attention, for tokens of a text over tokens of an encoder, to maps for words over images."""

import inspect
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cap_pretrain.data.text.tokenizers import Tokenizer
from cap_pretrain.errors import UserError
from cap_pretrain.learners.protocols import Attends

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


class Word(NamedTuple):
    """A word of a text, where it begins, and which tokens of the text it is made of."""

    text: str
    start: int
    tokens: tuple[int, ...]


def words_of(tokenizer: Tokenizer, ids: Iterable[int]) -> tuple[str, list[Word]]:
    """Returns the text of int `ids` [T] up to EOS or padding, and its words in order.

    Punctuation is in no word, except an apostrophe or hyphen in its midst.
    """
    ids = [int(i) for i in ids]
    ends = [k for k, i in enumerate(ids) if i in (tokenizer.eos_id, tokenizer.pad_id)]
    count = ends[0] if ends else len(ids)
    text = tokenizer.decode(ids[:count])
    starts = []  # of each token, and of what comes after them; a space belongs to what it precedes
    for k in range(count + 1):
        before = len(tokenizer.decode(ids[:k]))
        rest = text[before:]
        starts.append(before + len(rest) - len(rest.lstrip()))
    found = []
    for match in _WORD.finditer(text):
        overlap = (starts[k] < match.end() and starts[k + 1] > match.start() for k in range(count))
        tokens = tuple(k for k, some in enumerate(overlap) if some)
        found.append(Word(match[0], match.start(), tokens))
    return text, [word for word in found if word.tokens]


def on_grid(attention: np.ndarray) -> np.ndarray:
    """Attention [..., N] -> maps [..., H, W] that each sum to 1.

    The tokens are those of a square grid, row by row; a token before them, that of the class, is
    no part of the image and is left out.

    Raises:
      UserError: the tokens are no square grid, or there is but one.
    """
    count = attention.shape[-1]
    side = math.isqrt(count)
    if side < 2 or count - side**2 > 1:
        raise UserError(
            f"attention: that to {count} tokens is no map of an image; it takes a square grid of "
            "them, with or without one for the class before it."
        )
    attention = attention[..., count - side**2 :]
    maps = attention.reshape(*attention.shape[:-1], side, side).astype(np.float32)
    return maps / np.maximum(maps.sum((-2, -1), keepdims=True), np.finfo(np.float32).tiny)


def word_maps(attention: np.ndarray, words: Sequence[Word]) -> np.ndarray:
    """Attention [T, N] -> a map for each word, [len(words), H, W]: the mean of its tokens'."""
    maps = on_grid(attention)
    return np.array([maps[list(word.tokens)].mean(0) for word in words]).reshape(
        -1, *maps.shape[1:]
    )


def check_attends(learner: type, *, by_layer: bool = False) -> None:
    """Raises UserError if learners of this class have no attention, or none by layers."""
    if not issubclass(learner, Attends):
        raise UserError(
            f"attention: a learner of the kind {learner.__name__} pays none to parts of the image "
            "for words of a text; take a captioner."
        )
    if by_layer and "layer" not in inspect.signature(learner.attend).parameters:
        raise UserError(
            f"attention: a {learner.__name__} has one, not one in each layer; leave the layer out."
        )
