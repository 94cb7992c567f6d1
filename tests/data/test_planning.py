"""Each of 64 simulated hosts fetches what it shows, once, within its budget.

The order, the sources and what plans and fetches are real. The store counts what is asked of it and
makes up the bytes of records, which are not written to the disk.
"""

import os
import threading
import time
from typing import NamedTuple

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec.spec import AbstractFileSystem

from cap_pretrain.data import blocks
from cap_pretrain.data.sources.array_record import RangedRecords
from cap_pretrain.data.sources.base import file_bounds
from cap_pretrain.data.sources.ranges import Ranges
from cap_pretrain.data.sources.riegeli import chunks_of
from cap_pretrain.data.sources.storage import Remote

SHARDS, RECORDS, SIZE = 2000, 6000, 25_000  # CC12M: 12 million examples of 25 KB
HOSTS, BATCH, RATE = 64, 8192, 140_000  # examples a second
LAYOUT = blocks.Layout(block=256, lanes=256, cache_gb=215)  # for windows of 62 blocks


class Counting(AbstractFileSystem):
    """A store of equal files whose last bytes are `tail`, and the others zeros."""

    protocol = "counting"
    tail, size, ranges = b"", 0, None
    requests = fetched = peak = 0

    def info(self, path, **kwargs):
        return {"name": path, "size": self.size, "type": "file", "etag": "0"}

    def cat_file(self, path, start=None, end=None, **kwargs):
        Counting.requests += 1
        Counting.fetched += end - start
        Counting.peak = max(Counting.peak, self.ranges._slot.used)
        first = self.size - len(self.tail)
        zeros = bytes(max(0, min(end, first) - start))
        return zeros + self.tail[max(0, start - first) : max(0, end - first)]


fsspec.register_implementation("counting", Counting)


class Shard(NamedTuple):
    filename: str
    skip: int = 0
    take: int = RECORDS
    examples_in_shard: int = RECORDS


class Dataset:
    """The source of a host."""

    class_names = ()
    example_bytes = float(SIZE)

    def __init__(self, ranges):
        self.records = RangedRecords([Shard(name) for name in ranges.names()], ranges, LAYOUT.block)
        self.read_ahead = self.records.read_ahead

    def __len__(self):
        return len(self.records)

    def block_bounds(self, size):
        return file_bounds(self.records.ends, size)


@pytest.fixture(scope="module")
def tail(tmp_path_factory):
    """The last bytes of a file of RECORDS records, and its size."""
    path = tmp_path_factory.mktemp("tail") / "file"
    writer, rng = ArrayRecordWriter(str(path), "group_size:1"), np.random.default_rng(0)
    content = rng.bytes(2 * SIZE)
    for size in rng.integers(SIZE // 2, SIZE * 3 // 2, RECORDS):
        writer.write(content[:size])
    writer.close()
    whole = np.memmap(path, np.uint8, "r")
    chunks = chunks_of(lambda start, stop: whole[start:stop].tobytes(), len(whole), RECORDS)
    path.unlink()
    return whole[int(chunks.offsets[-1]) :].tobytes(), len(whole)


def settled():
    """Wait until everything that is planned has been fetched."""
    while any(thread.name == "ranges" for thread in threading.enumerate()):
        time.sleep(0.001)


def simulate(host, tmp_path, monkeypatch, tail):
    """Return fetched over needed, requests and bytes a second, and peak over budget, of a host."""
    monkeypatch.setattr(Counting, "tail", tail[0])
    monkeypatch.setattr(Counting, "size", tail[1])
    write = os.pwrite

    def write_end(file, data, offset):  # with the last page of records, the list of records begins
        skipped = max(0, len(data) - 100_000)
        write(file, data[skipped:], offset + skipped)
        return len(data)

    monkeypatch.setattr(os, "pwrite", write_end)
    names = [f"cc12m-train.array_record-{i:05d}-of-{SHARDS:05d}" for i in range(SHARDS)]
    files = {name: Counting().info(name) for name in names}
    budget = LAYOUT.cache_gb * 1e9 / HOSTS
    ranges = Ranges(Remote("counting://bucket"), files, str(tmp_path / str(host)), budget)
    Counting.ranges, source = ranges, Dataset(ranges)
    order = blocks.BlockOrder([(source, 1.0)], LAYOUT, batch_size=BATCH, seed=0)
    rows = range(host * BATCH // HOSTS, (host + 1) * BATCH // HOSTS)
    ahead = blocks.ReadAhead(order, [source], rows)
    block = LAYOUT.block * SIZE * 1.1

    Counting.requests = Counting.fetched = Counting.peak = 0
    first_windows = set(order.windows(0, ahead._lanes)[0, 0].tolist())
    assert first_windows == {0}, "the first batch needs one window of each lane"
    ahead(0)
    settled()
    assert Counting.fetched <= budget + block
    Counting.requests = Counting.fetched = 0
    steps = order.examples // BATCH
    for step in range(steps + 2):  # after as many windows as an epoch has
        ahead(step)
        if step % 97 == 0:
            settled()
            for row in rows:
                record = order(step * BATCH + row)
                found = source.records._blocks_of(record // RECORDS)
                span = found.span(record % RECORDS // LAYOUT.block)
                assert ranges.has(names[record // RECORDS], [span]), "read before it was fetched"
    settled()
    needed = steps * len(rows) * tail[1] / RECORDS
    seconds = steps * BATCH / RATE
    return {
        "fetched/needed": Counting.fetched / needed,
        "requests/s": Counting.requests / seconds,
        "MB/s": Counting.fetched / seconds / 1e6,
        "GB/epoch": Counting.fetched / 1e9,
        "peak GB": Counting.peak / 1e9,
        "budget GB": budget / 1e9,
        "over GB": (Counting.peak - budget - block) / 1e9,
    }


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 63])
def test_a_host_of_64_fetches_what_it_shows_once(host, tmp_path, monkeypatch, tail):
    found = simulate(host, tmp_path, monkeypatch, tail)
    print({name: round(value, 3) for name, value in found.items()})
    assert 0.98 <= found["fetched/needed"] <= 1.05
    assert found["requests/s"] <= 30 and found["MB/s"] <= 60
    assert found["over GB"] <= 0
