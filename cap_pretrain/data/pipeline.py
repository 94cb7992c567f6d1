"""From step number to batch: a pure function of (config, seed, step), on Grain.

Everything that decides *what* is in a batch happens in random-access `grain.MapDataset`s, whose
element t is batch t: shuffling, repeating, mixing, drawing, batching, the share of each host. So a
run starts at any step without replaying the ones before. Threads and worker processes come after
that (`prefetch`) and only decide *when* a batch is computed.
"""

import bisect
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import grain
import numpy as np

from cap_pretrain.data import images
from cap_pretrain.data.sources.base import Example, Source
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer, encode_answer
from cap_pretrain.errors import UserError, did_you_mean

BROKEN_IN_A_ROW = 100
"""So many neighbouring images that do not decode mean that the dataset is at fault."""

# Ways to crop at random, by the name in a config.
_RANDOM = {"random": images.random_resized_crop, "window": images.random_window}

_GROUP = 32  # rows whose examples are in memory at a time, encoded

_ORDER, _DRAW = 0, 1  # purposes of derived seeds; `buckets` has others

Row = dict[str, Any]


def train_dataset(
    sources: Sequence[tuple[Source, float]],
    tokenizer: SentencePieceTokenizer,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    crop: Literal["none", "random", "window"] = "none",
    flip: bool = False,
    order: Callable[[int], int] | None = None,
    rows: Sequence[int] | None = None,
) -> grain.MapDataset:
    """An endless dataset whose element t is this host's part of the global batch of step t.

    Every member of the mixture is shuffled anew in each of its epochs, in which each example comes
    exactly once; a member that ends just begins its next epoch. Read it with `prefetch.iterate`: a
    plain `for` loop reads 500 batches ahead, Grain's default.

    Args:
        sources: (source, weight) of each member; weights are relative and kept within 1%.
        tokenizer: encodes the captions; its `max_len` is T.
        image_size: side S of the square images.
        batch_size: number of examples of the global batch, B.
        seed: not negative; decides the order, the captions drawn and the augmentations.
        crop: "none" squashes the whole image to S x S, the recipe's choice; "random" is a random
            resized crop, "window" a square of most of it.
        flip: mirror half of the images.
        order: row of the run -> position in the concatenation of the sources, in place of shuffling
            and mixing them by weight (see `buckets.Order`).
        rows: which rows of the global batch; by default all.

    Returns:
        A dataset of dicts, b = len(rows):
            image: uint8 [b, S, S, 3]; of stored features float [b, 1 + N, D].
            text: int32 [b, T], one of the image's captions, drawn by their weights if they have
                some; all 0 when there is none. Where captions answer a question, that comes before
                (see `tokenizers.encode_answer`).
            prompt: int32 [b], how many tokens of `text` are the question's, 0 without one.
            label: int32 [b], -1 when there is none.
            index: int64 [b], the position drawn, in the concatenation of the sources.
            broken: bool [b], whether the image at that position does not decode, so that the
                nearest following example that does stands in for it.

    Raises:
        UserError: an empty source; and, when an element is computed, `BROKEN_IN_A_ROW` broken
            images in a row.
    """
    for source, _ in sources:
        _check_not_empty(source)
    bounds = [0, *itertools.accumulate(len(source) for source, _ in sources)]
    # Positions are shuffled and mixed, and only then loaded: an example's random numbers depend on
    # its place in the run alone, whatever member it comes from.
    if order is not None:
        positions = grain.MapDataset.range(sys.maxsize).map(order)
    else:
        members = [
            grain.MapDataset.range(start, stop).shuffle(seed=_derive(seed, _ORDER, k)).repeat()
            for k, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]
        positions = grain.MapDataset.mix(members, [weight for _, weight in sources])
    load = _TrainRows(
        [source for source, _ in sources],
        positions,
        tokenizer,
        image_size=image_size,
        crop=crop,
        flip=flip,
        seed=_derive(seed, _DRAW),
    )
    return _batched(load, sys.maxsize // batch_size, batch_size, rows)


def eval_batches(
    source: Source,
    tokenizer: SentencePieceTokenizer,
    *,
    image_size: int,
    batch_size: int,
    crop: Literal["none", "center"] = "none",
    limit: int | None = None,
    rows: Sequence[int] | None = None,
) -> grain.MapDataset:
    """The batches that show every example exactly once, in order, as a sequence.

    The last batch is padded with zeros, so all hosts see the same number of equally large batches.
    Nothing is drawn: the text is the first caption, and the other ones are at
    `source[index]["captions"]`. `prefetch.iterate` has the next batches prepared meanwhile.

    Args:
        source: what to show; `limit` examples of it when given.
        tokenizer: encodes the captions; its `max_len` is T.
        image_size: side S of the square images.
        batch_size: number of examples of the global batch, B.
        crop: "none" squashes the whole image; "center" takes the largest centred square.
        limit: the first so many examples only.
        rows: which rows of each global batch; by default all.

    Returns:
        A sequence of dicts as of `train_dataset`, and
            mask: bool [b], False for padding and for images that do not decode (`broken`).

    Raises:
        UserError: an empty source.
    """
    load = _EvalRow(source, tokenizer, image_size, crop, limit)
    return _batched(functools.partial(map, load), -(-load.count // batch_size), batch_size, rows)


def _batched(
    load: Callable[[list[int]], Iterable[Row]],
    count: int,
    batch_size: int,
    rows: Sequence[int] | None,
) -> grain.MapDataset:
    """The dataset of `count` batches, or of the `rows` of each, whose rows `load` loads."""
    own = range(batch_size) if rows is None else [int(row) for row in rows]
    return grain.MapDataset.range(count).map(_Batch(load, batch_size, own))


class _Batch:
    """Number of a batch -> the batch."""

    def __init__(
        self, load: Callable[[list[int]], Iterable[Row]], batch_size: int, rows: Sequence[int]
    ):
        self._load, self._batch_size, self._rows = load, batch_size, rows

    def __call__(self, number: int) -> Row:
        first, batch = int(number) * self._batch_size, {}
        # Each row is copied while it is in the caches.
        for place, row in enumerate(self._load([first + row for row in self._rows])):
            for name, value in row.items():
                if not place:
                    batch[name] = np.empty((len(self._rows), *np.shape(value)), value.dtype)
                batch[name][place] = value
        return batch


class _TrainRows:
    """Numbers of rows of the run -> rows of training batches."""

    def __init__(
        self,
        sources: Sequence[Source],
        positions: grain.MapDataset,
        tokenizer: SentencePieceTokenizer,
        *,
        image_size: int,
        crop: str,
        flip: bool,
        seed: int,
    ):
        self._ends = list(itertools.accumulate(len(source) for source in sources))
        self._sources = list(sources)
        self._positions = positions
        self._tokenizer = tokenizer
        self._size = image_size
        self._crop = _known_crop(crop, ("none", *_RANDOM))
        self._flip = flip
        self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)

    def __call__(self, numbers: Sequence[int]) -> Iterator[Row]:
        for start in range(0, len(numbers), _GROUP):
            yield from self._group(numbers[start : start + _GROUP])

    def _group(self, numbers: Sequence[int]) -> Iterator[Row]:
        """One stage after the other: Python that runs after a decoder, which has filled the caches
        with its own, takes several times as long as Python that runs after itself.
        """
        positions = [self._positions[number] for number in numbers]
        rngs = [self._rng(number) for number in numbers]
        # Drawn before anything else, so that the options of augmentation do not change them.
        drawn = [rng.random(2) for rng in rngs]
        places = [self._place(position) for position in positions]
        examples = [source[index] for source, index in places]
        texts = [
            _text(example, which, self._tokenizer)
            for example, (which, _) in zip(examples, drawn, strict=True)
        ]
        for position, rng, (which, side), (source, index), example, text in zip(
            positions, rngs, drawn, places, examples, texts, strict=True
        ):
            image, skipped = self._image(example, rng), 0
            while isinstance(image, images.ImageError):
                skipped += 1
                if skipped == BROKEN_IN_A_ROW:
                    raise UserError(
                        f"data: all images broken in {source}: {BROKEN_IN_A_ROW} in a row from "
                        f"example {index} on do not decode (the last one: {image}); build the "
                        "dataset anew."
                    )
                example = source[(index + skipped) % len(source)]
                image = self._image(example, rng)
            yield {
                "image": images.flip(image) if self._flip and side < 0.5 else image,
                **(_text(example, which, self._tokenizer) if skipped else text),
                "label": np.int32(example["label"]),
                "index": np.int64(position),
                "broken": np.bool_(skipped > 0),
            }

    def _place(self, position: int) -> tuple[Source, int]:
        """Which source a position in all of them is in, and where."""
        member = bisect.bisect_right(self._ends, position)
        return self._sources[member], position - (self._ends[member - 1] if member else 0)

    def _rng(self, number: int) -> np.random.Generator:
        """The random numbers of a row, as `grain.MapDataset.random_map` has them."""
        return np.random.Generator(np.random.Philox(key=self._key, counter=number << 192))

    def _image(self, example: Example, rng: np.random.Generator) -> np.ndarray | images.ImageError:
        try:
            return square(example["image"], self._size, self._crop, rng)
        except images.ImageError as error:
            return error


class _EvalRow:
    """Position -> a row of an evaluation batch; positions from `count` on are padding."""

    def __init__(
        self,
        source: Source,
        tokenizer: SentencePieceTokenizer,
        image_size: int,
        crop: str,
        limit: int | None,
    ):
        _check_not_empty(source)
        self.count = len(source) if limit is None else min(limit, len(source))
        self._source = source
        self._tokenizer = tokenizer
        self._size = image_size
        self._crop = _known_crop(crop, ("none", "center"))
        first = source[0]["image"]
        blank = np.zeros((image_size, image_size, 3), np.uint8)
        self._blank = np.zeros_like(first) if is_features(first) else blank

    def __call__(self, position: int) -> Row:
        row = {
            "image": self._blank,
            "text": np.zeros(self._tokenizer.max_len, np.int32),
            "prompt": np.int32(0),
            "label": np.int32(0),
            "index": np.int64(0),
            "broken": np.bool_(False),
            "mask": np.bool_(False),
        }
        if position >= self.count:
            return row
        example = self._source[position]
        row |= _text(example, 0.0, self._tokenizer)
        row["label"] = np.int32(example["label"])
        row["index"] = np.int64(position)
        try:
            row["image"] = square(example["image"], self._size, self._crop)
        except images.ImageError:
            row["broken"] = np.bool_(True)
        row["mask"] = ~row["broken"]
        return row


def is_features(image: bytes | np.ndarray) -> bool:
    """Whether an example's `image` is what an encoder made of it: float [1 + N, D]."""
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"


def picture(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """Returns the whole image as uint8 [size, size, 3], to be looked at.

    Raises:
        images.ImageError: `image` does not decode.
        UserError: there are features in its place.
    """
    if is_features(image):
        raise UserError(
            "data: the dataset holds features of an encoder, so there are no images to look at; "
            "name the one that they were made from."
        )
    return square(image, size, "none")


def square(
    image: bytes | np.ndarray, size: int, crop: str, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Returns uint8 [size, size, 3], or features as they are.

    Raises:
        images.ImageError: `image` does not decode.
    """
    if is_features(image):
        return image
    if crop in _RANDOM:
        return _RANDOM[crop](image, size, rng)
    return images.center_crop(image, size) if crop == "center" else images.resize(image, size)


def _text(example: Example, where: float, tokenizer: SentencePieceTokenizer) -> Row:
    """Returns `text` and `prompt` of a row, with the caption at `where`, of [0, 1), in its list."""
    captions, weights = example["captions"], example.get("weights")
    if weights:
        ends = np.cumsum(weights)
        which = int(np.searchsorted(ends[:-1], where * ends[-1], side="right"))
    else:
        which = int(where * len(captions))
    caption = captions[which] if captions else None
    ids, given = encode_answer(tokenizer, example.get("question", ""), caption)
    return {"text": ids, "prompt": np.int32(given)}


def _check_not_empty(source: Source) -> None:
    if not len(source):
        raise UserError(f"data: {source} has no examples; name another dataset or split.")


def _known_crop(crop: str, known: Sequence[str]) -> str:
    if crop not in known:
        raise UserError(f"data.crop: there is no {crop!r} here.{did_you_mean(crop, known)}")
    return crop


def _derive(seed: int, *purpose: int) -> int:
    """A 32-bit seed for one purpose.

    Grain shuffles epoch e with seed + e, so nearby seeds may not be handed to it: run 1 would see
    the second epoch of run 0 first.
    """
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0])
