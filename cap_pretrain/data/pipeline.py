"""The input pipeline: from a step number to a batch, a pure function of (config, seed, step).

Everything that decides what is in a batch (shuffling, repeating, mixing, drawing, batching, the
rows of each host) happens in random-access `grain.MapDataset`s, whose element t is batch t. So a
run resumes at any step without replaying the steps before. Threads and worker processes, added by
`prefetch`, only decide when a batch is computed.
"""

import bisect
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import grain
import numpy as np

from cap_pretrain.data import images
from cap_pretrain.data.origins import Origins, text_row
from cap_pretrain.data.regions import check_augmentation, chosen, encoded, regions_of
from cap_pretrain.data.sources.base import Example, Source
from cap_pretrain.data.text.tokenizers import TextEncoder
from cap_pretrain.data.views import RANDOM_CROPS, View, is_features, prepared
from cap_pretrain.errors import UserError, did_you_mean

BROKEN_IN_A_ROW = 100  # images that do not decode, after which a dataset is taken to be corrupt

_GROUP = 32  # rows loaded together, so at most this many encoded images are in memory
_ORDER, _DRAW = 0, 1  # purposes of derived seeds; `buckets` has 2 and 3

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """How images become squares of `size` pixels in training; `flip` mirrors half of them.

    `crop` "none" squashes the whole image, as in the Cap recipe; "random" is a random resized crop;
    "window" is a square of most of the image at a random position. `regions` of each image are
    drawn, which needs whole images without flips. With `patch`, images keep their aspect ratio; see
    `views.View`.
    """

    size: int
    crop: Literal["none", "random", "window"] = "none"
    flip: bool = False
    regions: int = 0
    patch: int = 0


def train_dataset(  # noqa: PLR0913  # what batches are made of
    sources: Sequence[tuple[Source, float]],
    tokenizer: TextEncoder,
    image: ImageOptions,
    *,
    batch_size: int,
    seed: int,
    order: Callable[[int], int] | None = None,
    origins: Origins | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
) -> grain.MapDataset:
    """Return an endless dataset whose element t is this host's part of global batch t.

    Each member of the mixture is shuffled in each of its epochs, in which each example is seen
    exactly once. A member that is exhausted starts its next epoch. Read the dataset with
    `prefetch.iterate`: a plain `for` loop reads 500 batches ahead, Grain's default. Raises
    UserError if a source is empty; at an element, if `BROKEN_IN_A_ROW` images are broken.

    Args:
        sources: (source, weight) of each member; weights are relative and kept within 1%.
        tokenizer: encodes the captions; its `max_len` is T.
        image: size S, crop and flip of the images, and how many of their regions are drawn, K.
        batch_size: number of examples of the global batch, B.
        seed: not negative; decides the order, the captions drawn and the augmentations.
        order: maps rows of the run to positions in the concatenation of the sources, in place of
            shuffling and mixing by weight (see `buckets.Order`).
        origins: how captions of several origins are shown, if not all alike.
        rows: the rows of the global batch to load; by default all.

    Returns:
        A dataset of dicts, with b = len(rows):
            image: uint8 [b, S, S, 3]; of stored features float [b, 1 + N, D]; patches as of
                `naflex.packed`, uint8 [b, N, W].
            text: int32 [b, T], one of the image's captions, drawn by weight if it has `weights`,
                after its question, if any (see `tokenizers.encode_answer`); 0 if there is none.
            prompt: int32 [b], number of tokens of `text` that belong to the question, or 0.
            label: int32 [b], -1 if there is none.
            index: int64 [b], position drawn, in the concatenation of the sources.
            broken: bool [b], whether that image does not decode; the next that does replaces it.
            phrases, boxes: with regions, those of `regions.encoded`, [b, K, T] and [b, K, 4].
    """
    for source, _ in sources:
        _check_not_empty(source)
    if origins:
        origins.check(tokenizer)
    bounds = [0, *itertools.accumulate(len(source) for source, _ in sources)]
    # Positions are shuffled and mixed before anything is loaded, so the random numbers of an
    # example depend only on its row in the run, not on the member it comes from.
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
        image,
        origins=origins,
        seed=_derive(seed, _DRAW),
    )
    return _batched(load, sys.maxsize // batch_size, batch_size, rows)


def eval_batches(  # what a batch holds
    source: Source,
    tokenizer: TextEncoder,
    *,
    view: View,
    batch_size: int,
    limit: int | None = None,
    regions: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
) -> grain.MapDataset:
    """Return the batches that show every example exactly once, in order, as a sequence.

    They are dicts like those of `train_dataset`, with one more entry, mask: bool [b], False for
    padding and for images that do not decode (`broken`). The last batch is padded with zeros, so
    all hosts see the same number of batches of equal size. Nothing is random: the text is the first
    caption, and `regions` are the first ones; all captions are in `source[index]["captions"]`.

    `view` is how images are seen. `limit` shows only the first examples; `rows` are those of each
    global batch to load, by default all. Raises UserError if the source is empty. Use
    `prefetch.iterate` to prepare batches ahead of time.
    """
    load = _EvalRow(source, tokenizer, view, limit, regions)
    return _batched(functools.partial(map, load), -(-load.count // batch_size), batch_size, rows)


def _batched(
    load: Callable[[list[int]], Iterable[Row]],
    count: int,
    batch_size: int,
    rows: Sequence[int] | np.ndarray | None,
) -> grain.MapDataset:
    """Return the dataset of `count` batches, or of `rows` of each, whose rows `load` loads."""
    own = range(batch_size) if rows is None else [int(row) for row in rows]
    return grain.MapDataset.range(count).map(_Batch(load, batch_size, own))


class _Batch:
    """A function from the number of a batch to the batch."""

    def __init__(
        self,
        load: Callable[[list[int]], Iterable[Row]],
        batch_size: int,
        rows: Sequence[int] | np.ndarray,
    ):
        self._load, self._batch_size, self._rows = load, batch_size, rows

    def __call__(self, number: int) -> Row:
        first = int(number) * self._batch_size
        batch: Row = {}
        # Copy each row while it is in the CPU caches.
        for place, row in enumerate(self._load([first + row for row in self._rows])):
            for name, value in row.items():
                if not place:
                    batch[name] = np.empty((len(self._rows), *np.shape(value)), value.dtype)
                batch[name][place] = value
        return batch


class _TrainRows:
    """A function from row numbers of the run to rows of training batches."""

    def __init__(
        self,
        sources: Sequence[Source],
        positions: grain.MapDataset,
        tokenizer: TextEncoder,
        image: ImageOptions,
        *,
        origins: Origins | None = None,
        seed: int,
    ):
        if image.regions:
            check_augmentation(image.crop, image.flip)
        self._ends = list(itertools.accumulate(len(source) for source in sources))
        self._sources = list(sources)
        self._positions = positions
        self._tokenizer = tokenizer
        _check_crop(image.crop, ("none", *RANDOM_CROPS))
        self._options, self._origins, self._regions = image, origins, image.regions
        self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)

    def __call__(self, numbers: Sequence[int]) -> Iterator[Row]:
        for start in range(0, len(numbers), _GROUP):
            yield from self._group(numbers[start : start + _GROUP])

    def _group(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Yield rows by stages: Python runs several times slower once decoders flush the caches."""
        positions = [self._positions[number] for number in numbers]
        rngs = [self._rng(number) for number in numbers]
        # Drawn first, so augmentation options do not change which captions are drawn.
        drawn = [rng.random(2) for rng in rngs]
        where = [rng.random(self._regions) for rng in rngs]
        places = [self._place(position) for position in positions]
        examples = [source[index] for source, index in places]
        texts = [
            self._text(example, which, number)
            for example, (which, _), number in zip(examples, drawn, numbers, strict=True)
        ]
        for number, position, rng, (which, side), shares, (source, index), example, text in zip(
            numbers, positions, rngs, drawn, where, places, examples, texts, strict=True
        ):
            mirror = self._options.flip and side < 0.5
            image, skipped = self._image(example, rng, mirror), 0
            while isinstance(image, images.ImageError):
                skipped += 1
                if skipped == BROKEN_IN_A_ROW:
                    raise UserError(
                        f"data: all images broken in {source}: {BROKEN_IN_A_ROW} in a row from "
                        f"example {index} on do not decode (last error: {image}); build the "
                        "dataset again."
                    )
                example = source[(index + skipped) % len(source)]
                image = self._image(example, rng, mirror)
            row = {
                "image": image,
                **(self._text(example, which, number) if skipped else text),
                "label": np.int32(example["label"]),
                "index": np.int64(position),
                "broken": np.bool_(skipped > 0),
            }
            if self._regions:
                found = regions_of(source, (index + skipped) % len(source), example)
                row |= encoded(chosen(found, shares), self._regions, self._tokenizer)
            yield row

    def _text(self, example: Example, which: float, number: int) -> Row:
        return text_row(example, which, self._tokenizer, self._origins, number)

    def _place(self, position: int) -> tuple[Source, int]:
        """Return the source of a position in the concatenation, and the index in it."""
        member = bisect.bisect_right(self._ends, position)
        return self._sources[member], position - (self._ends[member - 1] if member else 0)

    def _rng(self, number: int) -> np.random.Generator:
        """Return the generator of a row, the same that `grain.MapDataset.random_map` uses."""
        return np.random.Generator(np.random.Philox(key=self._key, counter=number << 192))

    def _image(
        self, example: Example, rng: np.random.Generator, mirror: bool
    ) -> np.ndarray | images.ImageError:
        image, own = example["image"], self._options
        try:
            return prepared(image, own.size, own.crop, rng, patch=own.patch, mirror=mirror)
        except images.ImageError as error:
            return error


class _EvalRow:
    """A function from positions to rows of evaluation batches, with padding from `count` on."""

    def __init__(
        self,
        source: Source,
        tokenizer: TextEncoder,
        view: View,
        limit: int | None,
        regions: int,
    ):
        _check_not_empty(source)
        self._regions = regions
        self.count = len(source) if limit is None else min(limit, len(source))
        self._source = source
        self._tokenizer = tokenizer
        _check_crop(view.crop, ("none", "center"))
        self._view = view
        first = source[0]["image"]
        blank = view(np.zeros((view.size, view.size, 3), np.uint8))
        self._blank = np.zeros_like(first) if is_features(first) else blank

    def __call__(self, position: int) -> Row:
        row: Row = {
            "image": self._blank,
            "text": np.zeros(self._tokenizer.max_len, np.int32),
            "prompt": np.int32(0),
            "label": np.int32(0),
            "index": np.int64(0),
            "broken": np.bool_(False),
            "mask": np.bool_(False),
        }
        if self._regions:
            row |= encoded((), self._regions, self._tokenizer)
        if position >= self.count:
            return row
        example = self._source[position]
        if self._regions:
            found = regions_of(self._source, position, example)
            row |= encoded(found, self._regions, self._tokenizer)
        row |= text_row(example, 0.0, self._tokenizer)
        row["label"] = np.int32(example["label"])
        row["index"] = np.int64(position)
        try:
            row["image"] = self._view(example["image"])
        except images.ImageError:
            row["broken"] = np.bool_(True)
        row["mask"] = ~row["broken"]
        return row


def _check_not_empty(source: Source) -> None:
    if not len(source):
        raise UserError(f"data: {source} has no examples; name another dataset or split.")


def _check_crop(crop: str, known: Sequence[str]) -> None:
    if crop not in known:
        raise UserError(f"data.crop: {crop!r} is unknown here.{did_you_mean(crop, known)}")


def _derive(seed: int, *purpose: int) -> int:
    """Make a 32-bit seed; Grain shuffles epoch e with seed + e, so adjacent seeds would overlap."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0])
