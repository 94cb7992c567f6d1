"""Remote ArrayRecord datasets read in blocks give the same examples, or one line that says why."""

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from cap_pretrain.commands import contact_sheet, held_out
from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.sources import array_record, base, holes, slots, sparse, storage
from cap_pretrain.data.sources.array_record import _Readers
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.sources.ranges import Cache
from cap_pretrain.data.sources.riegeli import chunks_of
from cap_pretrain.errors import UserError
from tests.data.test_sources import write
from tests.data.test_storage import Faulty

COUNT, SHARDS, BLOCK, BUDGET = 60, 4, 4, 200_000
URL = "faulty://bucket/ranged"
FILE = "ranged-train.array_record-00001-of-00004"


def write_dataset(data_dir):
    """Write a dataset of COUNT examples of some 6 KB in SHARDS files, and return its folder."""
    from tensorflow_datasets import features as f

    features = {"image": f.Image(), "captions": f.Sequence(f.Text()), "id": f.Text()}

    def example(i):
        return {"captions": [f"{i} {random.Random(i).randbytes(6000).hex()}"], "id": f"{i}"}

    return write(data_dir, "ranged", features, example, {"train": COUNT}, SHARDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def bucket(folder, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY", 1e-4)
    monkeypatch.setattr(storage, "CHUNK", 3 * sparse.PAGE)
    for name, value in {"rate": 0, "failed": [], "requested": [], "store": {}}.items():
        monkeypatch.setattr(Faulty, name, value)
    fs = fsspec.filesystem("faulty")
    for file in folder.iterdir():
        fs.pipe_file(f"/bucket/ranged/1.0.0/{file.name}", file.read_bytes())
    return fs


@pytest.fixture
def local(folder):
    return open_source(str(folder), "train", image_size=8)


def ranged(cache, split="train"):
    return open_source(URL, split, image_size=8, cache=Cache(str(cache), BLOCK, BUDGET))


def batches(source, tokenizer, threads=0):
    dataset = train_dataset([(source, 1.0)], tokenizer, ImageOptions(8), batch_size=4, seed=0)
    return list(iterate(dataset, 0, 30, threads=threads))


def test_commands_read_blocks_and_copy_no_whole_file(local, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    picture = next(contact_sheet.of_dataset(URL, "train", 16))
    assert picture.caption == local[0]["captions"][0]
    assert len(list(held_out._lines(URL, ["train"], ids=False))) == COUNT
    files = [path for path in tmp_path.rglob("*array_record*") if path.is_file()]
    assert files and all("ranges-0" in path.parts for path in files)


@pytest.mark.parametrize("options", ["group_size:1", "group_size:3", "group_size:2,uncompressed"])
@pytest.mark.parametrize("count", [1, 500])
def test_a_hole_raises_until_it_is_filled(options, count, tmp_path):
    """A file that holds its list of records and one chunk is read there, and only there."""
    rng = random.Random(count)
    records = [rng.randbytes(rng.randrange(1, 2000)) for _ in range(count)]
    writer = ArrayRecordWriter(str(tmp_path / "whole"), options)
    for record in records:
        writer.write(record)
    writer.close()
    whole = (tmp_path / "whole").read_bytes()
    chunks = chunks_of(lambda start, stop: whole[start:stop], len(whole), count)
    assert chunks.records == count

    def fill(start, stop):
        with (tmp_path / "part").open("r+b") as file:
            file.seek(start)
            file.write(whole[start:stop])

    (tmp_path / "part").touch()
    os.truncate(tmp_path / "part", len(whole))
    fill(*chunks.index)
    readers, path = _Readers(), str(tmp_path / "part")
    for number in rng.sample(range(len(chunks.offsets) - 1), min(4, len(chunks.offsets) - 1)):
        position = number * chunks.group
        with pytest.raises(RuntimeError, match="hash mismatch"):
            readers.read(path, position)
        fill(*(int(offset) for offset in chunks.offsets[number : number + 2]))
        assert readers.read(path, position) == records[position]


def test_damaged_lists_of_records_are_refused_or_bounded(folder):
    whole = (folder / FILE).read_bytes()
    count, rng = COUNT // SHARDS, random.Random(0)
    start, stop = chunks_of(lambda a, b: whole[a:b], len(whole), count).index
    places = [*range(start, start + 200), *range(stop - 4096, stop - 3900)]
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for place in rng.sample(places, rng.randrange(1, 4)):
            damaged[place] = rng.randrange(256)
        try:
            found = chunks_of(lambda a, b, d=damaged: bytes(d[a:b]), len(whole), count)
        except (ValueError, IndexError, OSError):
            refused += 1
        else:
            assert (np.diff(found.offsets) > 0).all() and found.offsets[-1] < len(whole)
    assert refused > 100


@pytest.mark.parametrize("split", ["train", "train[10%:90%]"])
def test_examples_are_those_of_the_local_dataset(split, folder, tmp_path):
    local, source = open_source(str(folder), split, image_size=8), ranged(tmp_path, split)
    np.testing.assert_array_equal(source.block_bounds(BLOCK), local.block_bounds(BLOCK))
    assert source.example_bytes == local.example_bytes
    worker, order = pickle.loads(pickle.dumps(source)), list(range(len(local)))
    random.Random(0).shuffle(order)
    base.read_ahead(source, [(3, 9), (20, 30), (0, len(local))])
    for index in order:
        assert source[index] == worker[index] == local[index]


def test_only_what_is_read_is_fetched(local, tmp_path):
    source = ranged(tmp_path)
    Faulty.requested.clear()
    assert [source[i] for i in (5, 6, 7)] == [local[i] for i in (5, 6, 7)]
    (file,) = tmp_path.glob("ranges-*/*/data/*array_record*")
    assert file.stat().st_blocks * 512 < file.stat().st_size / 2


@pytest.mark.slow
def test_one_read_of_twenty_fails_and_the_batches_are_the_same(
    local, tokenizer, tmp_path, monkeypatch
):
    expected = batches(local, tokenizer)
    monkeypatch.setattr(Faulty, "random", random.Random(0))
    monkeypatch.setattr(Faulty, "rate", 0.05)
    for batch, other in zip(batches(ranged(tmp_path), tokenizer, threads=3), expected, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
    assert len(Faulty.failed) >= 3


def test_truncated_ranges_are_read_again_and_then_an_error(local, bucket, tmp_path, monkeypatch):
    whole, cut = Faulty.cat_file, [3]

    def short(fs, path, start=None, end=None, **kwargs):
        data = whole(fs, path, start, end, **kwargs)
        cut[0] -= 1
        return data[:-1] if cut[0] >= 0 else data

    source = ranged(tmp_path)
    monkeypatch.setattr(Faulty, "cat_file", short)
    assert source[20] == local[20]
    cut[0] = 1000
    with pytest.raises(UserError, match=r"bytes came instead of \d+, tried 8 times.*again\.$"):
        source[40]


def test_a_full_disk_is_an_error_and_then_right_bytes(local, tmp_path, monkeypatch):
    source, write_at = ranged(tmp_path), os.pwrite

    def full(file, data, offset):
        write_at(file, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="data.cache: cannot write to .*No space left"):
            source[20]
    assert list(source) == list(local)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"data.cache: .* has to hold 0.2 MB .* 0.0 MB; .*data.cache_gb"
    ):
        base.read_ahead(ranged(tmp_path / "other"), [(0, 1)])


def test_a_file_system_without_holes_is_refused(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(holes, "punch", unsupported)
    with pytest.raises(UserError, match="data.cache: the file system of .* data.order=global"):
        ranged(tmp_path)


def test_files_that_are_damaged_or_replaced_are_errors(bucket, tmp_path):
    path = f"/bucket/ranged/1.0.0/{FILE}"
    whole, source = bucket.cat_file(path), ranged(tmp_path / "replaced")
    source[20]
    bucket.pipe_file(path, whole[::-1])
    with pytest.raises(UserError, match=f"{FILE}: changed while it was in use"):
        source[29]
    damaged = {
        "last": whole[:-65536] + bytes(65536),
        "empty": b"",
        "list": bytes(len(whole) - 65536) + whole[-65536:],
    }
    for name, content in damaged.items():
        bucket.pipe_file(path, content)
        with pytest.raises(UserError, match=f"{FILE} cannot be read .*; copy or build it again"):
            ranged(tmp_path / name)[20]
    writer = ArrayRecordWriter(str(tmp_path / "short"), "group_size:1")
    writer.write(b"record")
    writer.close()
    bucket.pipe_file(path, (tmp_path / "short").read_bytes())
    with pytest.raises(UserError, match=f"{FILE} holds 1 examples, but dataset_info.json says"):
        ranged(tmp_path / "few")[20]


def test_what_a_run_fetched_is_there_for_the_next_unless_the_machine_was_started_again(
    local, tmp_path, monkeypatch
):
    def start():
        slots.Slot._held.clear()  # as if the process ended, whose lock the tests still hold
        monkeypatch.setattr(holes, "hold", lambda slot: os.open(slot / "lock", os.O_CREAT))
        source = ranged(tmp_path)
        Faulty.requested.clear()
        assert source[30] == local[30]
        return len([name for name in Faulty.requested if "array_record" in name])

    assert start() and not start()
    monkeypatch.setattr(slots, "_BOOT", tmp_path / "another")
    assert start()


def test_all_sources_share_the_limit_of_open_readers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(array_record, "_most_readers", lambda: 5)
    for i in range(4):
        os.link(folder / FILE, tmp_path / f"{i}")
    sources = [_Readers() for _ in range(3)]
    for turn in range(2):
        for source in sources:
            for i in range(4):
                assert source.read(str(tmp_path / f"{i}"), turn)
    assert 0 < sum(len(source._open) for source in sources) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "ranged"])
def test_two_thousand_files_are_read_under_a_small_limit_of_open_files(kind, folder, tmp_path):
    many = tmp_path / "ranged" / "1.0.0"
    many.mkdir(parents=True)
    info = json.loads((folder / "dataset_info.json").read_text())
    (split,) = info["splits"]
    lengths = [split["shardLengths"][i % SHARDS] for i in range(2000)]
    split["shardLengths"] = lengths
    (many / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(folder / "features.json", many)
    for i in range(2000):
        os.link(
            folder / f"ranged-train.array_record-{i % SHARDS:05d}-of-{SHARDS:05d}",
            many / f"ranged-train.array_record-{i:05d}-of-02000",
        )
    code = f"""
import random, resource, time
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.sources.ranges import Cache
start = time.perf_counter()
if {kind!r} == "local":
    source = open_source({str(many)!r}, "train", image_size=8)
else:
    cache = Cache({str(tmp_path / "cache")!r}, {BLOCK}, 4e6)
    source = open_source({"local://" + str(many)!r}, "train", image_size=8, cache=cache)
assert time.perf_counter() - start < 10
for i in random.Random(0).sample(range(len(source)), 1500):
    assert source[i]["captions"][0].split()[0] == source[i]["id"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
