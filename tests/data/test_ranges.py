"""Ranges of remote files are read as they are, within a budget, whoever reads and removes them."""

import pickle
import random
import threading

import fsspec
import pytest

from cap_pretrain.data.sources.ranges import Ranges
from cap_pretrain.data.sources.storage import Remote
from cap_pretrain.errors import UserError

BUDGET, LONGEST = 2_000_000, 200_000


@pytest.fixture(scope="module")
def content():
    rng = random.Random(0)
    return {f"{i}.bin": rng.randbytes(1_500_000 + 777 * i) for i in range(4)}


@pytest.fixture
def bucket(content):
    fs = fsspec.filesystem("memory")
    for name, data in content.items():
        fs.pipe_file(f"/ranges/{name}", data)
    return Remote("memory://ranges")


def allocated(ranges):
    """Return the bytes on the disk of all local files."""
    return sum(ranges.path(name).stat().st_blocks * 512 for name in ranges.names())


def spans(rng, content, count):
    for _ in range(count):
        name = rng.choice(list(content))
        start = rng.randrange(len(content[name]))
        yield name, start, min(len(content[name]), start + rng.randrange(LONGEST))


def test_threads_and_workers_read_the_same_bytes_within_the_budget(bucket, content, tmp_path):
    ranges = Ranges(bucket, bucket.files(), str(tmp_path), BUDGET)
    readers = [ranges, pickle.loads(pickle.dumps(ranges))] * 2
    wrong, peak = [], [0]

    def read(number):
        for name, start, stop in spans(random.Random(number), content, 60):
            if readers[number].read(name, start, stop) != content[name][start:stop]:
                wrong.append((name, start, stop))
            peak[0] = max(peak[0], ranges._sparse.slot.used)

    threads = [threading.Thread(target=read, args=[n]) for n in range(len(readers))]
    for thread in threads:
        thread.start()
    for start in range(0, 1_000_000, 100_000):
        ranges.plan([(name, start, start + 100_000) for name in content])
    for thread in threads:
        thread.join()
    assert not wrong
    assert BUDGET / 2 < peak[0] <= BUDGET + LONGEST
    assert allocated(ranges) <= BUDGET + LONGEST


def test_a_file_that_changes_is_an_error(bucket, content, tmp_path):
    ranges = Ranges(bucket, bucket.files(), str(tmp_path), BUDGET)
    assert ranges.read("1.bin", 10, 20) == content["1.bin"][10:20]
    fsspec.filesystem("memory").pipe_file("/ranges/1.bin", content["1.bin"][::-1])
    assert ranges.read("1.bin", 20, 30) == content["1.bin"][20:30], "what was fetched stays"
    with pytest.raises(UserError, match=r"1.bin: changed while it was in use"):
        ranges.read("1.bin", 100_000, 100_010)


def test_names_of_files_do_not_leave_the_folder_or_collide_with_its_own(tmp_path):
    fs, names = fsspec.filesystem("memory"), ["pages", "files.json", "..", "a/../../b", "a%2Fb"]
    entries = {name: {"size": 5000, "name": name} for name in names}
    ranges = Ranges(Remote("memory://names"), entries, str(tmp_path), BUDGET)
    paths = [ranges.path(name) for name in names]
    assert len(set(paths)) == len(names)
    assert len({path.resolve().parent for path in paths}) == 1
    fs.pipe_file("/names/pages", bytes(range(250)) * 20)
    assert ranges.read("pages", 300, 400) == (bytes(range(250)) * 20)[300:400]
    assert ranges.read("pages", 0, 5000) == bytes(range(250)) * 20
