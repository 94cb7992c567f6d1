"""Batches in which all captions have the same length, for recurrent captioners without padding.

Lengths occur in proportion to their frequency, and an epoch shows each (image, caption) pair at
most once. The pairs of each length are shuffled and cut into batches, and then all batches are
shuffled. As elsewhere in the pipeline, the pairs of batch t are computed from t alone.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from cap_pretrain.data.sources import passes
from cap_pretrain.data.sources.base import Example, Source, without_image
from cap_pretrain.data.text.tokenizers import Tokenizer, encode_answer
from cap_pretrain.errors import UserError

_PAIRS, _BATCHES = 2, 3  # purposes of derived seeds; `pipeline` has 0 and 1


class PairsOfOneLength:
    """The (image, caption) pairs of a source whose captions have one length. A `Source`.

    `pairs`, int [n, 2], lists the index of an example and that of one of its captions. `length` is
    the number of tokens of these captions, EOS included.
    """

    def __init__(self, source: Source, pairs: np.ndarray, length: int):
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
    """Group the captions of a source by length, in ascending order; every record is read once.

    The length is the number of tokens after truncation, including EOS and the question before the
    caption, if any. Raises UserError if there are no captions.
    """
    read = lambda: np.array(list(_lengths(source, tokenizer)), np.int64).reshape(-1, 3)
    identity = getattr(tokenizer, "identity", "")
    found = passes.kept(source, f"lengths {identity}", read) if identity else read()
    if not len(found):
        raise UserError(
            f"data.buckets: {source} has no captions; name another dataset or set data.fields."
        )
    return [
        PairsOfOneLength(source, found[found[:, 2] == length, :2], int(length))
        for length in np.unique(found[:, 2])
    ]


def _lengths(source: Source, tokenizer: Tokenizer) -> Iterator[tuple[int, int, int]]:
    """Yield (index of the example, index of the caption, number of tokens)."""
    for index in itertools.chain.from_iterable(passes.whole(source)):
        example = without_image(source, index)
        for which, caption in enumerate(example["captions"]):
            ids, _ = encode_answer(tokenizer, example.get("question", ""), caption)
            yield index, which, int(np.count_nonzero(ids != tokenizer.pad_id))


class Order:
    """A function from rows of the run to pairs, where row j belongs to batch j // batch_size.

    Pairs are numbered by position in the concatenation of `groups`. Those of a length that do not
    fill a batch are left out of an epoch; different ones in each. An epoch has `batches` batches
    and `examples` pairs, the same in every one; raises UserError if no length has enough pairs for
    a batch.
    """

    def __init__(self, groups: Sequence[PairsOfOneLength], batch_size: int, seed: int):
        self._counts = tuple((group.length, len(group)) for group in groups)
        self._batch_size, self._seed = batch_size, seed
        self.batches = sum(count // batch_size for _, count in self._counts)
        if not self.batches:
            raise UserError(
                f"batch_size: no length has {batch_size} captions (data.buckets); the most frequent"
                f" one has {max(map(len, groups))}. Choose a smaller batch."
            )

    @property
    def examples(self) -> int:
        """The number of pairs that an epoch shows."""
        return self.batches * self._batch_size

    def __call__(self, row: int) -> int:
        """Return the number of the pair that row `row` of the run shows."""
        epoch, row = divmod(row, self.batches * self._batch_size)
        return int(_epoch(self._counts, self._batch_size, self._seed, epoch)[row])


# Cached because an epoch is computed as a whole. Two, because threads may be in adjacent epochs.
@functools.lru_cache(maxsize=2)
def _epoch(
    counts: tuple[tuple[int, int], ...], batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    """Return the pairs of an epoch by row, int [n]; `counts` lists (length, number of pairs)."""
    batches, start = [], 0
    for length, count in counts:
        order = np.random.default_rng([seed, _PAIRS, epoch, length]).permutation(count)
        batches.append((start + order[: count - count % batch_size]).reshape(-1, batch_size))
        start += count
    rng = np.random.default_rng([seed, _BATCHES, epoch])
    return rng.permutation(np.concatenate(batches)).reshape(-1)


def describe(groups: Sequence[PairsOfOneLength], batch_size: int) -> str:
    """Return a line for the log: the size of an epoch, and which captions it leaves out."""
    pairs = sum(map(len, groups))
    too_few = [group for group in groups if len(group) < batch_size]
    left_out = sum(len(group) % batch_size for group in groups)
    text = (
        f"Batches of one length: {pairs:,} captions of {groups[0].length} to {groups[-1].length} "
        f"tokens; an epoch has {(pairs - left_out) // batch_size:,} batches and leaves out "
        f"{left_out:,} captions, different ones each time"
    )
    if too_few:
        lengths = ", ".join(f"{group.length} ({len(group)})" for group in too_few)
        text += f"; too few to fill a batch, tokens (captions): {lengths}"
    return text + "."
