"""The order by blocks shows each example at most once an epoch, on every number of hosts alike."""

import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from cap_pretrain import config as configs
from cap_pretrain.data import blocks
from cap_pretrain.data.mixing import Mixing
from cap_pretrain.data.sources import base
from cap_pretrain.errors import UserError


class Shards:
    """Examples in files of these lengths, which notes what it is asked to read ahead."""

    class_names: list[str] = []

    def __init__(self, *counts, example_bytes=0.0):
        self._ends = np.cumsum(counts).tolist()
        self.example_bytes, self.ahead = example_bytes, []

    def __str__(self):
        return "dataset 'shards'"

    def __len__(self):
        return self._ends[-1]

    def block_bounds(self, size):
        return base.file_bounds(self._ends, size)

    def read_ahead(self, ranges):
        self.ahead.append(ranges)


class Case:
    """A random run: shards, blocks, lanes, windows, a mixture, and a change of the batch size."""

    def __init__(self, seed):
        draw = random.Random(seed)
        self.lanes = draw.choice([1, 2, 3, 4, 6, 8, 12])
        self.batch_size = self.lanes * draw.randint(1, 5)
        self.earlier = self.lanes * draw.randint(1, 5), draw.randint(0, 20)  # size, steps
        self.members = [
            Shards(
                *(draw.randint(1, 90) for _ in range(draw.randint(1, 12))),
                self.lanes,  # enough for a lane
                example_bytes=draw.choice([0.0, 1.0]),
            )
            for _ in range(draw.choice([1, 1, 2, 3]))
        ]
        self.weights = [draw.choice([0.2, 1, 3]) for _ in self.members]
        self.layout = blocks.Layout(draw.choice([1, 7, 16, 100]), self.lanes, 1.0)
        # A window of a few blocks: the layout's budget in GB holds so many examples.
        examples = 2 * self.lanes * self.layout.block * len(self.members) * draw.randint(6, 40)
        self.layout = blocks.Layout(self.layout.block, self.lanes, examples / 1e9)
        self.steps = 2 + 4 * sum(map(len, self.members)) // self.batch_size
        self.seed = seed

    @property
    def offset(self):
        size, steps = self.earlier
        return steps * (size - self.batch_size)

    def order(self, batch_size=None, offset=None):
        return blocks.BlockOrder(
            list(zip(self.members, self.weights, strict=True)),
            self.layout,
            batch_size=batch_size or self.batch_size,
            seed=self.seed,
            offset=self.offset if offset is None else offset,
        )

    def batches(self, order, rows):
        """Return positions [steps, rows] from the change of the batch size on, and those before."""
        size, first = self.earlier
        before = self.order(size, 0)
        row = lambda t, j: self.offset + t * self.batch_size + j
        return (
            np.array([[before(t * size + j) for j in range(size)] for t in range(first)], int),
            np.array([[order(row(t, j)) for j in rows] for t in range(first, first + self.steps)]),
        )


def seeds(start: int, fast: int, slow: int) -> list:
    """Return seeds from `start` on, of which the last ones are for slow tests."""
    numbers = range(start, start + fast + slow)
    return [*numbers[:fast], *(pytest.param(n, marks=pytest.mark.slow) for n in numbers[fast:])]


@pytest.mark.parametrize("seed", seeds(0, 6, 30))
def test_each_example_comes_once_an_epoch_on_any_number_of_hosts(seed):
    case = Case(seed)
    order, everything = case.order(), range(case.batch_size)
    before, after = case.batches(order, everything)
    each = case.batch_size // case.lanes
    lanes = [  # what each lane shows, in order, whatever the batch size
        np.concatenate(
            [b.reshape(len(b), case.lanes, -1)[:, lane].ravel() for b in (before, after) if len(b)]
        )
        for lane in range(case.lanes)
    ]
    first = 0
    for member in case.members:
        length = len(member) // case.lanes
        own = [lane[(lane >= first) & (lane < first + len(member))] for lane in lanes]
        for start in range(0, min(map(len, own)) - length + 1, length):
            epoch = np.concatenate([lane[start : start + length] for lane in own])
            assert len(np.unique(epoch)) == case.lanes * length > len(member) - case.lanes
        first += len(member)
    assert order.examples == sum(case.lanes * (len(m) // case.lanes) for m in case.members)
    # Hosts that divide the batch, whole lanes or not, together show the same rows.
    for hosts in (n for n in (2, 3, 4, 5) if case.batch_size % n == 0):
        parts = np.split(np.arange(case.batch_size), hosts)
        read = [case.batches(pickle.loads(pickle.dumps(order)), rows)[1] for rows in parts]
        np.testing.assert_array_equal(np.concatenate(read, axis=1), after)
    # A resume in the middle begins with the same batches; their order may be read backwards, too.
    rng, resumed = np.random.default_rng(seed), case.order()
    for t in rng.integers(case.steps, size=8):
        j = int(rng.integers(case.batch_size))
        row = case.offset + (case.earlier[1] + int(t)) * case.batch_size + j
        assert resumed(row) == after[t, j]
        assert resumed.lanes_of([j]) == [j // each]


@pytest.mark.parametrize("seed", seeds(100, 5, 20))
def test_what_is_read_ahead_is_what_is_read(seed):
    """Each batch shows only what its windows hold, of which there are two, within the budget."""
    case = Case(seed)
    order = case.order()
    rows = sorted(random.Random(seed).sample(range(case.batch_size), -(-case.batch_size // 2)))
    lanes, first = order.lanes_of(rows), case.earlier[1]
    ahead = blocks.ReadAhead(order, case.members, rows)
    bounds = np.cumsum([0, *map(len, case.members)])
    case.steps = min(case.steps, 100)
    _, positions = case.batches(order, rows)
    previous, changes = None, 0
    for t, shown in enumerate(positions):
        ahead(first + t)
        needed = order.needed(first + t, lanes)
        for member, (source, ranges) in enumerate(zip(case.members, needed, strict=True)):
            assert source.ahead[-1] == ranges
            held = [np.arange(a, b) for a, b in ranges]
            assert all(0 <= a < b <= len(source) for a, b in ranges)
            own = shown[(shown >= bounds[member]) & (shown < bounds[member + 1])] - bounds[member]
            assert np.isin(own, np.concatenate(held)).all()
        windows = order.windows(first + t, lanes)
        if case.batch_size == case.lanes:  # a batch of one row of each lane is in one window
            sizes = [sum(b - a for a, b in ranges) for ranges in needed]
            used = sum(n * m.example_bytes for n, m in zip(sizes, case.members, strict=True))
            assert used <= case.layout.cache_gb * 1e9
        changes += previous is None or not np.array_equal(previous, windows)
        previous = windows
    assert len(case.members[0].ahead) == changes


def order_of(count, *, window=0, gb=0, example_bytes=25_000, lanes=256, batch_size=8192, **kwargs):
    """Return the order of `count` examples in blocks of 256 and windows of `window` blocks."""
    gb = gb or (2 * lanes * (window + 0.5) * 256 * example_bytes / 1e9 if window else 1e9)
    layout = blocks.Layout(256, lanes, gb)
    source = Shards(count, example_bytes=example_bytes)
    return blocks.BlockOrder([(source, 1.0)], layout, batch_size=batch_size, seed=0, **kwargs)


@pytest.mark.parametrize(
    ("count", "gb", "bound"),
    [
        pytest.param(12_000_000, 64, 1.2, marks=pytest.mark.slow),
        (12_000_000, 210, 1.1),
        pytest.param(12_000_000, 620, 1.05, marks=pytest.mark.slow),
        pytest.param(1_000_000_000, 64, 1.25, marks=pytest.mark.slow),
    ],
)
def test_batches_of_sorted_data_have_all_classes(count, gb, bound):
    """Chi-squared per degree of freedom of the classes of a batch; 1 is a perfect shuffle."""
    order, found = order_of(count, gb=gb), []
    for batch in (0, 1, 200, 201, 1000, 1001):
        shown = np.array([order(row) for row in range(8192 * batch, 8192 * (batch + 1))])
        counts = np.bincount(shown // (count // 1000), minlength=1000)
        found.append(np.square(counts - 8.192).sum() / 8.192 / 999)
    held = f"cache_gb={gb}: windows of {order._members[0].blocks} blocks"
    print(f"{count:,} examples, {held}, chi-squared {np.mean(found):.2f}")
    assert np.mean(found) < bound


@pytest.mark.parametrize("seed", range(6))
def test_mixtures_keep_their_weights_in_every_batch_and_lane(seed):
    rng = np.random.default_rng(seed)
    weights, lanes = rng.exponential(size=rng.integers(2, 6)), int(rng.choice([1, 8, 30, 256]))
    mixing, shares = Mixing(weights, lanes), weights / weights.sum()
    for first in (0, 10**9):
        for row in range(first, first + 40):
            members = [mixing.drawn(lane, row)[0] for lane in range(lanes)]
            counts = np.bincount(members, minlength=len(weights))
            assert (np.abs(counts - lanes * shares) < 1.01).all()  # of a batch of a row of each
    for lane in {0, lanes // 2, lanes - 1}:
        drawn = [mixing.drawn(lane, row) for row in range(500)]
        for member, share in enumerate(shares):
            own = [index for which, index in drawn if which == member]
            assert own == list(range(len(own)))
            assert abs(len(own) - 500 * share) < 4
            assert mixing.count(member, [lane], 500).tolist() == [len(own)]
    total = 10**8
    counts = [int(mixing.count(member, [0], total)[0]) for member in range(len(shares))]
    np.testing.assert_allclose(counts, total * shares, rtol=0.01)
    assert sum(counts) == total


def test_what_does_not_fit_is_refused():
    small, large = (Shards(n, example_bytes=1e6) for n in (200, 100_000))
    make = lambda source, layout, **kwargs: blocks.BlockOrder([(source, 1.0)], layout, **kwargs)
    layout = blocks.Layout(256, 256, 64.0)
    with pytest.raises(UserError, match=r"data.lanes: .*200 examples, too few for 256.*global"):
        make(small, layout, batch_size=512, seed=0)
    with pytest.raises(UserError, match=r"data.cache_gb: 64 GB .*two blocks.*about 131 GB"):
        make(large, layout, batch_size=512, seed=0)
    with pytest.raises(UserError, match=r"data.lanes: 256 .*batch_size=500"):
        make(large, layout, batch_size=500, seed=0)
    with pytest.raises(UserError, match=r"data.lanes: 256 .*earlier batch"):
        make(large, layout, batch_size=512, seed=0, offset=-12)


def test_the_log_says_what_is_read():
    (line,) = order_of(10**9 + 3, window=19).describe()
    assert line == (
        "Order: blocks of 256, 256 lanes, windows of 19 blocks; two windows of all lanes have "
        "62.2 GB, the disk space that remote data need over all hosts; an epoch leaves out 3 "
        "examples, others each time."
    )
    order = order_of(12_000_000, window=64, batch_size=6144)
    assert len(order.describe(range(6144 // 64))) == 1
    _, line = order.describe(range(6144 // 48))
    assert line.startswith("data.lanes: this host reads 1.12 times as much as it shows")


@pytest.mark.parametrize(
    ("name", "fields", "order", "lanes"),
    [
        ("scenes", {}, "global", 0),
        ("scenes", {"order": "blocks"}, "blocks", 192),
        ("scenes", {"order": "blocks", "lanes": 3}, "blocks", 3),
        ("scenes:0.5+gs://bucket/data", {}, "blocks", 192),
        ("scenes:0.5+gs://bucket/data", {"order": "global"}, "global", 0),
        ("gs://bucket/data", {"buckets": True}, "global", 0),
        ("wds:/data/{00..12}.tar", {}, "blocks", 192),
        ("parquet:/data/*.parquet", {}, "blocks", 192),
        ("coco_captions", {"dir": "gs://bucket"}, "blocks", 192),
        ("/data/coco", {"dir": "gs://bucket"}, "global", 0),
        ("scenes", {"dir": "gs://bucket"}, "global", 0),
    ],
)
def test_remote_data_is_ordered_by_blocks(name, fields, order, lanes):
    section = configs.default().data
    section.name = name
    section.update(fields)
    blocks.settle(section, 576)
    assert (section.order, section.lanes) == (order, lanes)


_BILLION = """
import time
from cap_pretrain.data import blocks

class Source:
    class_names, example_bytes = [], 25e3
    def __len__(self): return 10**9

start = time.process_time()
layout = blocks.Layout(256, 256, 64.0)
order = blocks.BlockOrder([(Source(), 1.0)], layout, batch_size=8192, seed=0)
order(0)
seconds = time.process_time() - start
for row in range(8192):
    order(row)
start = time.process_time()
for row in range(8192, 3 * 8192):
    order(row)
each = (time.process_time() - start) / (2 * 8192)
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak) * 1024 / 1e6, 1e6 * each)
"""


def test_a_billion_examples_take_little_time_and_memory():
    done = subprocess.run([sys.executable, "-c", _BILLION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, megabytes, microseconds = map(float, done.stdout.split())
    print(f"{seconds:.2f} s, {megabytes:.0f} MB, {microseconds:.1f} microseconds an example")
    assert seconds < 2 and megabytes < 500 and microseconds < 30, done.stdout
