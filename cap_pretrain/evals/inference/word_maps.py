"""Attention maps of words over images, from attention of text tokens over encoder tokens."""

import inspect
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cap_pretrain import naflex
from cap_pretrain.data.text.tokenizers import Tokenizer
from cap_pretrain.errors import UserError
from cap_pretrain.learners.protocols import Attends

WORD = re.compile(r"\w+(?:['’-]\w+)*")


class Word(NamedTuple):
    """A word, the index of its first character, and the indices of the tokens that overlap it."""

    text: str
    start: int
    tokens: tuple[int, ...]


def words_of(tokenizer: Tokenizer, ids: Iterable[int]) -> tuple[str, list[Word]]:
    """Return the text of int `ids` [T] up to EOS or padding, and its words in order.

    Words contain no punctuation, except apostrophes and hyphens between letters.
    """
    ids = [int(i) for i in ids]
    ends = [k for k, i in enumerate(ids) if i in (tokenizer.eos_id, tokenizer.pad_id)]
    count = ends[0] if ends else len(ids)
    text = tokenizer.decode(ids[:count])
    # Where each token starts, and where the last one ends; a space belongs to what follows it.
    starts = []
    for k in range(count + 1):
        before = len(tokenizer.decode(ids[:k]))
        rest = text[before:]
        starts.append(before + len(rest) - len(rest.lstrip()))
    found = []
    for match in WORD.finditer(text):
        overlap = (starts[k] < match.end() and starts[k + 1] > match.start() for k in range(count))
        tokens = tuple(k for k, some in enumerate(overlap) if some)
        found.append(Word(match[0], match.start(), tokens))
    return text, [word for word in found if word.tokens]


def on_grid(attention: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
    """Arrange attention [..., N] over encoder tokens as maps float32 [..., H, W] that sum to 1.

    The tokens form a square grid, row by row, which a class token may precede; the class token is
    not part of the image and is left out. The grid of an `image` as patches (`naflex`) is that of
    the image, and padding is left out. Raises UserError if the tokens form no grid or there is only
    one.
    """
    count = attention.shape[-1]
    if image is not None and naflex.is_packed(image):
        grid = naflex.grid_of(image)
        first = count - len(image)
        return _normalized(attention[..., first : first + math.prod(grid)], grid)
    side = math.isqrt(count)
    if side < 2 or count - side**2 > 1:
        raise UserError(
            f"attention: {count} tokens do not form a map of the image; expected a square grid, "
            "with or without a class token before it."
        )
    return _normalized(attention[..., count - side**2 :], (side, side))


def _normalized(attention: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    maps = attention.reshape(*attention.shape[:-1], *grid).astype(np.float32)
    return maps / np.maximum(maps.sum((-2, -1), keepdims=True), np.finfo(np.float32).tiny)


def word_maps(
    attention: np.ndarray, words: Sequence[Word], image: np.ndarray | None = None
) -> np.ndarray:
    """Return a map for each word, the mean over its tokens: float32 [len(words), H, W].

    `attention`, [T, N], is that of each text token over the encoder's; `words` are of `words_of`,
    and `image` is as for `on_grid`.
    """
    maps = on_grid(attention, image)
    return np.array([maps[list(word.tokens)].mean(0) for word in words]).reshape(
        -1, *maps.shape[1:]
    )


def check_attends(learner: type, *, by_layer: bool = False) -> None:
    """Raise UserError if a learner has no attention over images (`by_layer`: of single layers)."""
    if not issubclass(learner, Attends):
        raise UserError(
            f"attention: a {learner.__name__} has no attention from words to parts of the image; "
            "use a captioner."
        )
    if by_layer and "layer" not in inspect.signature(learner.attend).parameters:
        raise UserError(
            f"attention: a {learner.__name__} has one attention map, not one per layer; leave the "
            "layer out."
        )
