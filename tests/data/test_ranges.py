"""Ranges of remote files are read as they are, within a budget, whoever reads and removes them."""

import errno
import os
import pickle
import random
import threading
import time

import fsspec
import pytest

from cap_pretrain.data.sources import holes, slots
from cap_pretrain.data.sources.ranges import THREADS, Ranges
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
            peak[0] = max(peak[0], ranges._slot.used)

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


@pytest.fixture
def end(monkeypatch):
    """Return a function that gives up slots, as if this process were killed, or its workers."""
    files = {"hold": [], "join": []}

    def kept(kind):
        lock = getattr(holes, kind)
        return lambda slot: files[kind].append(lock(slot))

    monkeypatch.setattr(holes, "hold", kept("hold"))
    monkeypatch.setattr(slots, "join", kept("join"))

    def end(kind):
        (slots.Slot._held if kind == "hold" else slots.Slot._joined).clear()
        while files[kind]:
            os.close(files[kind].pop())

    return end


def test_files_that_were_deleted_or_cut_are_fetched_again(bucket, content, tmp_path, end):
    ranges = Ranges(bucket, bucket.files(), str(tmp_path), 2 * BUDGET)
    for name in content:
        ranges.read(name, 0, LONGEST)
    ranges.path("0.bin").unlink()
    os.truncate(ranges.path("1.bin"), 5000)
    with pytest.raises(UserError, match=r"0.bin was deleted while in use; start again"):
        pickle.loads(pickle.dumps(ranges)).read("0.bin", 0, 10)
    end("join")
    end("hold")
    ranges = Ranges(bucket, bucket.files(), str(tmp_path), 2 * BUDGET)
    assert [ranges.has(name, [(0, LONGEST)]) for name in content] == [False, False, True, True]
    assert all(ranges.read(name, 0, LONGEST) == content[name][:LONGEST] for name in content)


def test_a_slot_is_not_taken_while_workers_of_a_killed_run_use_it(
    bucket, tmp_path, end, monkeypatch
):
    monkeypatch.setattr(holes, "_DELAY", 1e-3)
    first = Ranges(bucket, bucket.files(), str(tmp_path), BUDGET)
    pickle.loads(pickle.dumps(first))
    end("hold")
    assert Ranges(bucket, bucket.files(), str(tmp_path), BUDGET)._slot.path != first._slot.path
    end("join")
    end("hold")
    assert Ranges(bucket, bucket.files(), str(tmp_path), BUDGET)._slot.path == first._slot.path


def test_the_largest_budget_holds_if_the_disk_has_room(bucket, tmp_path):
    small = Ranges(bucket, bucket.files(), str(tmp_path), 1000)
    large = Ranges(bucket, bucket.files(), str(tmp_path), BUDGET)
    large.plan([("0.bin", 0, 10)])
    assert small._slot.budget == BUDGET
    with pytest.raises(UserError, match=r"has to hold 9,000,000.0 GB of blocks, but .* GB; name"):
        small._slot.check_room(9 * 10**15)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_planning_survives_errors_of_threads_and_locks(bucket, tmp_path, monkeypatch):
    ranges = Ranges(bucket, bucket.files(), str(tmp_path), BUDGET)

    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def wait(done):
        for _ in range(1000):
            if done():
                return
            time.sleep(1e-3)
        raise AssertionError

    plan = [("0.bin", start, start + 10) for start in range(0, 10_000 * THREADS, 10_000)]
    with monkeypatch.context() as patched:
        patched.setattr(ranges, "fetch_pages", fail)
        ranges.plan(plan)
        wait(lambda: not ranges._planner._running)
    with monkeypatch.context() as patched:
        patched.setattr(holes, "_locked", fail)
        with pytest.raises(UserError, match="data.cache: cannot write to .*Too many open files"):
            ranges.read("1.bin", 0, 10)
    ranges.plan(plan)
    wait(lambda: ranges.has("0.bin", [span[1:] for span in plan]))


def test_only_files_with_pages_to_remove_are_searched(bucket, content, tmp_path):
    ranges = Ranges(bucket, bucket.files(), str(tmp_path), BUDGET)
    slot, sparse = ranges._slot, ranges._sparse
    for name in content:
        ranges.fetch(name, [(0, 8192)])
    assert len(sparse.files(1)) == 4
    ranges.plan([(name, 0, 8192) for name in list(content)[1:]])
    slot._remove(8192 * len(content), 1)
    assert not sparse.files(1) and slot.used == 8192 * 3
    assert len(sparse.files(255)) == 2, "the first of the plan is the most urgent"
    ranges.fetch("0.bin", [(0, 4096)])
    assert [index for _, _, index in sparse.files(1)] == [0]
    ranges.plan([])
    assert len(sparse.files(1)) == 4
    slot._remove(slot.used, 1)
    assert slot.used == 0
    sparse.set_urgency([], [(*sparse.pages("0.bin", 0, 4096), 9)])
    ranges.fetch("0.bin", [(0, 4096)])
    assert not sparse.files(9) and sparse.files(10)


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
