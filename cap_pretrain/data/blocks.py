"""An order of examples in which each host reads whole blocks, each once an epoch.

A shuffle of all records makes every host read everywhere. Here an epoch permutes blocks of records
that are stored together, and cuts the sequence of their records into `lanes` of equal length. Each
lane is shuffled within windows of some blocks and makes the same rows of every batch. So a host
reads only the blocks of the lanes of its rows, two windows at a time, and batch t still is a
function of (config, seed, t), the same for any number of hosts.

Blocks that follow each other in the dataset go into different windows, so that the windows of all
lanes at one time together are an even sample of the dataset, even if it is sorted.
"""

import bisect
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.data.mixing import GOLDEN, Mixing
from cap_pretrain.data.sources import base
from cap_pretrain.data.sources.base import Source
from cap_pretrain.data.sources.open import is_streamed
from cap_pretrain.errors import UserError

T = TypeVar("T")

MOST_LANES = 256
"""Lanes are by default the largest divisor of the batch size up to this: 64 hosts have 4 each."""

WINDOW_EXAMPLES = 2**24
"""Most examples in one window of all lanes, whose order is kept in memory, 2 to 4 bytes each."""

_BLOCKS, _WINDOWS = 4, 5  # purposes of derived seeds; `pipeline` and `buckets` have 0 to 3


def order_of(section: ConfigDict) -> str:
    """Return the order that the section `config.data` chooses: "global" or "blocks"."""
    if section.order != "auto":
        return section.order
    names = [name for name, _ in base.parse_mixture(section.name)]
    streamed = any(is_streamed(name, section.dir) for name in names)
    return "blocks" if streamed and not section.buckets else "global"


def settle(section: ConfigDict, batch_size: int) -> None:
    """Set `order` and `lanes` of the section `config.data` if they are automatic."""
    section.order = order_of(section)
    if section.order == "blocks" and not section.lanes:
        most = min(batch_size, MOST_LANES)
        section.lanes = next(n for n in range(most, 0, -1) if batch_size % n == 0)


def share_read(section: ConfigDict, rows: Sequence[int] | np.ndarray, batch_size: int) -> float:
    """Return the share of all lanes that a host reads which loads these rows of a batch."""
    section = section.copy_and_resolve_references()
    settle(section, batch_size)
    lanes = section.lanes or 1
    return len({int(row) * lanes // batch_size for row in rows}) / lanes


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the sequence of an epoch is cut; see `config.data`."""

    block: int  # most examples of a block
    lanes: int  # V
    cache_gb: float  # GB of two windows of all lanes and members


class BlockOrder:
    """A function from rows of the run to positions in the concatenation of the sources.

    Each member of a mixture has its own epochs. In each, every example is shown at most once, and
    at most V - 1 examples, others each time, are left out. Lane v makes rows [v B / V, (v + 1) B /
    V) of every batch of B rows and draws them from all members by weight, so that each batch, too,
    has nearly their proportions. A position takes a few microseconds, the first one of a window or
    epoch more.

    Args:
        mixture: (source, weight) of each member.
        layout: blocks, lanes and windows.
        batch_size: of the batches now, B.
        seed: of the run.
        offset: row of the run with which batch 0 begins; see `schedule.BatchSizes`.

    Attributes:
        examples: examples of an epoch, those left out not counted.

    Raises:
        UserError: the lanes do not divide the batch size or an earlier one, a member has fewer
            examples than there are lanes, or the budget has no room for two blocks of each lane.
    """

    def __init__(
        self,
        mixture: Sequence[tuple[Source, float]],
        layout: Layout,
        *,
        batch_size: int,
        seed: int,
        offset: int = 0,
    ):
        self._layout, lanes = layout, layout.lanes
        if batch_size % lanes or offset % lanes:
            raise UserError(
                f"data.lanes: {lanes} lanes do not divide batch_size={batch_size}, or an earlier "
                "batch size of this run; choose batch sizes that are multiples of it."
            )
        self._batch_size, self._each = batch_size, batch_size // lanes
        self._offset = offset
        starts = itertools.accumulate((len(source) for source, _ in mixture), initial=0)
        self._members = [
            _Member(source, layout, first=first, key=(seed, number))
            for number, ((source, _), first) in enumerate(zip(mixture, starts, strict=False))
        ]
        weights = np.array([weight for _, weight in mixture])
        self._mixing = Mixing(weights, lanes) if len(mixture) > 1 else None
        _settle_windows(self._members, weights / weights.sum(), layout)
        self.examples = sum(lanes * member.lane for member in self._members)

    def __call__(self, row: int) -> int:
        """Return the position that row `row` of the run shows."""
        batch, place = divmod(row - self._offset, self._batch_size)
        lane, within = divmod(place, self._each)
        index = batch * self._each + within + self._offset // self._layout.lanes
        member = 0
        if self._mixing:
            member, index = self._mixing.drawn(lane, index)
        return self._members[member].position(lane, index)

    def lanes_of(self, rows: Iterable[int]) -> list[int]:
        """Return the lanes that make these rows of a batch, ascending."""
        return sorted({int(row) // self._each for row in rows})

    def windows(self, step: int, lanes: Sequence[int]) -> np.ndarray:
        """Return the first and last window, numbered through all epochs, that batch `step` reads.

        int64 [members, 2, lanes]. A member that the batch does not draw from counts with the window
        of its next example.
        """
        first = step * self._each + self._offset // self._layout.lanes
        ends = (first, first + self._each)
        found = []
        for number, member in enumerate(self._members):
            counts = [
                self._mixing.count(number, lanes, end) if self._mixing else np.full(len(lanes), end)
                for end in ends
            ]
            last = np.maximum(counts[0], counts[1] - 1)
            found.append([member.windows_of(counts[0]), member.windows_of(last)])
        return np.array(found, np.int64).reshape(len(self._members), 2, len(lanes))

    def needed(self, step: int, lanes: Sequence[int]) -> list[list[tuple[int, int]]]:
        """Return for each member the example ranges that lanes read from batch `step` on.

        These are the parts of blocks in the windows of batch `step`, and then in the next windows.
        """
        found = []
        for member, (first, last) in zip(self._members, self.windows(step, lanes), strict=True):
            now = zip(lanes, first.tolist(), last.tolist(), strict=True)
            windows = [(lane, n) for lane, start, end in now for n in range(start, end + 1)]
            windows += zip(lanes, (last + 1).tolist(), strict=True)
            found.append([r for lane, number in windows for r in member.ranges(lane, number)])
        return found

    def describe(self, rows: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """Return lines for the log: blocks, lanes, windows and their bytes, what is left out.

        If a host that loads `rows` of each batch reads more than it shows, a line says so.
        """
        lanes, members = self._layout.lanes, self._members
        windows = " and ".join(f"{member.blocks:,}" for member in members)
        text = f"Order: blocks of {self._layout.block}, {lanes} lanes, windows of {windows} blocks"
        held = 2 * lanes * sum(member.window * member.example_bytes for member in members)
        if held:
            text += (
                f"; two windows of all lanes have {held / 1e9:,.3g} GB, the disk space that remote "
                "data need over all hosts"
            )
        if left_out := sum(member.count % lanes for member in members):
            text += f"; an epoch leaves out {left_out:,} examples, others each time"
        lines = [f"{text}."]
        read = 1.0 if rows is None else len(self.lanes_of(rows)) * self._each / len(rows)
        if read > 1:
            lines.append(
                f"data.lanes: this host reads {read:.2f} times as much as it shows, because other "
                f"hosts show parts of its lanes; a number of hosts that divides {lanes} avoids it."
            )
        return lines


class ReadAhead:
    """A function that announces to the sources what batches from `step` on will read.

    It does so only when the windows of the lanes of `rows` change, so it may be called at every
    step (see `prefetch.iterate`).
    """

    def __init__(self, order: BlockOrder, sources: Sequence[Source], rows: Iterable[int]):
        self._order, self._sources = order, sources
        self._lanes = order.lanes_of(rows)
        self._announced: np.ndarray | None = None

    def __call__(self, step: int) -> None:
        """Announce what is needed from batch `step` on."""
        windows = self._order.windows(step, self._lanes)
        if self._announced is not None and np.array_equal(windows, self._announced):
            return
        for source, ranges in zip(
            self._sources, self._order.needed(step, self._lanes), strict=True
        ):
            base.read_ahead(source, ranges)
        self._announced = windows


class _Epoch(NamedTuple):
    """The permuted blocks of an epoch, int32 [n], and where they begin in it, int64 [n + 1]."""

    order: np.ndarray
    starts: np.ndarray


class _Window(NamedTuple):
    """A window of a lane: its examples x = 0, 1, … in permuted order.

    The parts of blocks in it end at the examples `ends`, and what is added to x to get a position
    is `shifts`.
    """

    ends: list[int]
    shifts: list[int]
    order: np.ndarray


class _Member:
    """The order of one dataset of a mixture.

    `first` is its place in the concatenation and `key` the seed and its number. `_settle_windows`
    sets `windows`, their number in an epoch of a lane.
    """

    def __init__(self, source: Source, layout: Layout, *, first: int, key: tuple[int, int]):
        self._first, self._key, self._lanes = first, key, layout.lanes
        self.count = len(source)
        self.lane = self.count // layout.lanes  # examples of a lane in an epoch
        if not self.lane:
            raise UserError(
                f"data.lanes: {source} has {self.count:,} examples, too few for {layout.lanes} "
                "lanes; set data.order=global, or fewer lanes that divide batch_size."
            )
        self._bounds = base.block_bounds(source, layout.block)
        self.block = self.count / (len(self._bounds) - 1)  # examples of a block, on average
        self.example_bytes = base.example_bytes(source)
        self.windows = 1
        self._epochs: _Newest[_Epoch] = _Newest()
        self._kept: _Newest[_Window] = _Newest()

    @property
    def window(self) -> int:
        """The most examples of a window."""
        return -(-self.lane // self.windows)

    @property
    def blocks(self) -> int:
        """The blocks that a window's examples make up."""
        return max(1, round(self.window / self.block))

    def position(self, lane: int, index: int) -> int:
        """Return the position of example `index` of a lane, counted through all epochs."""
        epoch, place = divmod(index, self.lane)
        number = ((place + 1) * self.windows - 1) // self.lane
        window = self._kept.get(lane, epoch * self.windows + number, self._make_window)
        x = int(window.order[place - number * self.lane // self.windows])
        return x + window.shifts[bisect.bisect_right(window.ends, x)]

    def windows_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the windows, numbered through all epochs, of examples of lanes."""
        epochs, places = np.divmod(indices, self.lane)
        return epochs * self.windows + ((places + 1) * self.windows - 1) // self.lane

    def ranges(self, lane: int, number: int) -> list[tuple[int, int]]:
        """Return the example ranges of a window of a lane, in the member."""
        ends, shifts = self._parts(lane, number)
        starts = [0, *ends[:-1]]
        return [
            (start + shift - self._first, end + shift - self._first)
            for start, end, shift in zip(starts, ends, shifts, strict=True)
        ]

    def _make_window(self, lane: int, number: int) -> _Window:
        ends, shifts = self._parts(lane, number)
        rng = np.random.default_rng([*self._key, _WINDOWS, lane, number])
        dtype = np.uint16 if ends[-1] <= 2**16 else np.uint32
        return _Window(ends, shifts, rng.permutation(np.arange(ends[-1], dtype=dtype)))

    def _parts(self, lane: int, number: int) -> tuple[list[int], list[int]]:
        """Return `ends` and `shifts` of a window."""
        epoch, window = divmod(number, self.windows)
        order, starts = self._epochs.get(0, epoch, self._make_epoch)
        start, stop = (
            lane * self.lane + n * self.lane // self.windows for n in (window, window + 1)
        )
        first = int(starts.searchsorted(start, side="right")) - 1
        last = int(starts.searchsorted(stop))
        ends = np.minimum(starts[first + 1 : last + 1], stop) - start
        shifts = self._bounds[order[first:last]] - starts[first:last] + (start + self._first)
        return ends.tolist(), shifts.tolist()

    def _make_epoch(self, _: int, epoch: int) -> _Epoch:
        rng = np.random.default_rng([*self._key, _BLOCKS, epoch])
        blocks = len(self._bounds) - 1
        rows, rest = divmod(blocks, self.windows)
        grid = np.arange(blocks - rest, dtype=np.int32).reshape(rows, self.windows)
        if self.windows > 1:  # successive blocks, a row, go to one window each
            grid = rng.permuted(grid, axis=1)
        grid = rng.permuted(np.ascontiguousarray(grid.T), axis=1)  # and to any lane
        # Lane v gets the same share of each row of the grid, rounded up or down so that its blocks
        # up to any window are about as many as it needs.
        shares = np.arange(self._lanes + 1)[:, None] * rows / self._lanes
        edges = (shares + np.arange(self.windows) * GOLDEN % 1).astype(np.int64)
        counts = np.diff(edges, axis=0).ravel()
        begins = (edges[:-1] + np.arange(self.windows) * rows).ravel()
        shifts = begins - np.cumsum(counts) + counts
        order = grid.ravel()[np.repeat(shifts, counts) + np.arange(grid.size)]
        if rest:
            places = np.arange(rest) * len(order) // rest
            order = np.insert(order, places, blocks - 1 - rng.permutation(rest))
        starts = np.zeros(blocks + 1, np.int64)
        np.cumsum(np.diff(self._bounds)[order], out=starts[1:])
        return _Epoch(order, starts)


class _Newest(Generic[T]):
    """Values by key and number, of which each key keeps the newest even and the newest odd one.

    Several threads may ask for them. A copy in another process starts empty.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[int, T]] = {}
        self._making = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Newest, ()

    def get(self, key: int, number: int, make: Callable[[int, int], T]) -> T:
        """Return the value, made by `make(key, number)` if it is not kept."""
        place = (key, number % 2)
        found = self._kept.get(place)
        if found is None or found[0] != number:
            with self._making:
                found = self._kept.get(place)
                if found is None or found[0] != number:
                    found = self._kept[place] = (number, make(key, number))
        return found[1]


def _settle_windows(members: Sequence[_Member], shares: np.ndarray, layout: Layout) -> None:
    """Set the number of windows of each member, whose `shares` of a batch sum up to 1.

    The windows of all members last equally long, in as many blocks as the budget allows; those of a
    member that fits as a whole are its lanes. Raises UserError if one has no room for a block.
    """
    room = [layout.cache_gb * 1e9 / 2 / layout.lanes, WINDOW_EXAMPLES / layout.lanes]
    costs = np.array([[member.example_bytes, 1.0] for member in members])  # of an example
    lengths = np.array([float(member.lane) for member in members])
    open_ = np.ones(len(members), bool)
    while open_.any():
        left = np.maximum(room - lengths[~open_] @ costs[~open_], 0)
        spent = shares[open_] @ costs[open_]  # by one row of a lane
        rows = min(a / b for a, b in zip(left, spent, strict=True) if b)
        whole = open_ & (shares * rows >= lengths)
        if not whole.any():
            lengths[open_] = shares[open_] * rows
            break
        open_ &= ~whole
    for member, length in zip(members, lengths, strict=True):
        blocks = length / member.block
        if length < member.lane and blocks < 1:
            needed = layout.cache_gb / blocks if blocks else math.inf
            size = f"blocks of {member.block:,.0f} examples"
            if 2 * layout.lanes * member.block * member.example_bytes <= layout.cache_gb * 1e9:
                raise UserError(
                    f"data.lanes: windows of {layout.lanes} lanes with {size} are too large for "
                    "the memory; lower data.lanes, or set data.order=global."
                )
            raise UserError(
                f"data.cache_gb: {layout.cache_gb:g} GB do not hold two {size} for each of "
                f"{layout.lanes} lanes, about {needed:,.3g} GB; give more, lower data.lanes, or "
                "set data.order=global."
            )
        window = member.lane if length >= member.lane else math.floor(blocks) * member.block
        member.windows = max(1, math.ceil(member.lane / window))
