"""Batches of captions of one length, in proportion to how frequent the lengths are.

As recurrent captioners are trained that read no padding: every (image, caption) pair is seen at
most once in an epoch. Which pairs make up batch t is computed from t alone, as elsewhere in the
pipeline. Each length is shuffled by itself and cut into batches, and these are shuffled in turn.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from cap_pretrain.data.sources.base import Example, Source, without_image
from cap_pretrain.data.text.tokenizers import Tokenizer, encode_answer
from cap_pretrain.errors import UserError

_PAIRS, _BATCHES = 2, 3  # purposes of seeds; the pipeline has others


class PairsOfOneLength:
    """Images, each with the one of its captions that has a certain length. A `Source`."""

    def __init__(self, source: Source, pairs: np.ndarray, length: int):
        """`pairs` int [n, 2]: index in the source, and which of its captions."""
        self._source, self._pairs, self.length = source, pairs, length
        self.class_names = source.class_names

    def __str__(self) -> str:
        return f"{self._source}, captions of {self.length} tokens"

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, caption = self._pairs[index].tolist()
        example = self._source[image]
        return example | {"captions": [example["captions"][caption]], "weights": []}


def by_length(source: Source, tokenizer: Tokenizer) -> list[PairsOfOneLength]:
    """Groups the captions of a source by their tokens, EOS included, as they are after cutting.

    A question before a caption counts with it. Every record is read once.

    Raises:
        UserError: there are no captions.
    """
    found = np.array(list(_lengths(source, tokenizer)), np.int64).reshape(-1, 3)
    if not len(found):
        raise UserError(
            f"data.buckets: {source} has no captions; name another dataset or set data.fields."
        )
    return [
        PairsOfOneLength(source, found[found[:, 2] == length, :2], int(length))
        for length in np.unique(found[:, 2])
    ]


def _lengths(source: Source, tokenizer: Tokenizer) -> Iterator[tuple[int, int, int]]:
    """Yields (index, which caption, its tokens)."""
    for index in range(len(source)):
        example = without_image(source, index)
        for which, caption in enumerate(example["captions"]):
            ids, _ = encode_answer(tokenizer, example.get("question", ""), caption)
            yield index, which, np.count_nonzero(ids != tokenizer.pad_id)


class Order:
    """Which pair is row j of the run, for any j: row j belongs to batch j // batch_size.

    Of each length, an epoch leaves out what does not fill a batch: other pairs in each.

    Args:
        groups: the pairs by length; a pair is numbered by its place in all of them.
        batch_size: B, rows of a batch.
        seed: not negative.

    Attributes:
        batches: in an epoch, in each as many.

    Raises:
        UserError: no length has a whole batch.
    """

    def __init__(self, groups: Sequence[PairsOfOneLength], batch_size: int, seed: int):
        self._counts = tuple((group.length, len(group)) for group in groups)
        self._batch_size, self._seed = batch_size, seed
        self.batches = sum(count // batch_size for _, count in self._counts)
        if not self.batches:
            raise UserError(
                f"batch_size: no length has {batch_size} captions (data.buckets), the most frequent"
                f" one has {max(map(len, groups))}; choose a smaller batch."
            )

    def __call__(self, row: int) -> int:
        epoch, row = divmod(row, self.batches * self._batch_size)
        return int(_epoch(self._counts, self._batch_size, self._seed, epoch)[row])


# Remembered, as an epoch is computed as a whole; while one ends, the next one begins.
@functools.lru_cache(maxsize=2)
def _epoch(
    counts: tuple[tuple[int, int], ...], batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    """The pairs of an epoch in the order of its rows, int [batches * batch_size].

    Args:
        counts: (length, number of pairs) of each length.
        batch_size, seed: as of the run.
        epoch: which.
    """
    batches, start = [], 0
    for length, count in counts:
        order = np.random.default_rng([seed, _PAIRS, epoch, length]).permutation(count)
        batches.append((start + order[: count - count % batch_size]).reshape(-1, batch_size))
        start += count
    rng = np.random.default_rng([seed, _BATCHES, epoch])
    return rng.permutation(np.concatenate(batches)).reshape(-1)


def describe(groups: Sequence[PairsOfOneLength], batch_size: int) -> str:
    """What people are told: what an epoch leaves out, and which lengths never come."""
    pairs = sum(map(len, groups))
    never = [group for group in groups if len(group) < batch_size]
    left_out = sum(len(group) % batch_size for group in groups)
    told = (
        f"Batches of one length: {pairs:,} captions of {groups[0].length} to {groups[-1].length} "
        f"tokens; an epoch has {(pairs - left_out) // batch_size:,} batches and leaves out "
        f"{left_out:,} captions, other ones each time"
    )
    if never:
        lengths = ", ".join(f"{group.length} ({len(group)})" for group in never)
        told += f"; too few to come at all, tokens (captions): {lengths}"
    return told + "."
