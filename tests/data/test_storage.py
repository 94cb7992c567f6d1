"""Remote datasets read like local ones, even if 5% of all reads fail."""

import contextlib
import os
import pickle
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cap_pretrain import train
from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.sources import storage
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.sources.tfds import TfdsSource
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer, train_sentencepiece
from cap_pretrain.errors import UserError
from cap_pretrain.files import places
from tests import toy
from tests.data.test_sources import write

COUNT, SHARDS = 24, 3
URL = "faulty://bucket/captioned"
FILE = "captioned-train.array_record-00001-of-00003"


class Faulty(MemoryFileSystem):
    """An in-memory file system in which a fraction of the reads fails."""

    protocol = "faulty"
    store: dict = {}
    pseudo_dirs = [""]
    rate, error, random = 0.0, OSError("the line is noisy"), random.Random(0)
    requested: list[str] = []
    failed: list[int] = []  # the thread of each read that failed

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("faulty://"))

    def _may_fail(self, path):
        Faulty.requested.append(path.rpartition("/")[2])
        if self.random.random() < self.rate:
            Faulty.failed.append(threading.get_ident())
            raise self.error

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._may_fail(path)
        return super().cat_file(path, start, end, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self._may_fail(path)
        return super().ls(path, detail, **kwargs)


fsspec.register_implementation("faulty", Faulty)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tensorflow_datasets import features as f

    features = {"image": f.Image(), "captions": f.Sequence(f.Text()), "id": f.Text()}
    return write(
        tmp_path_factory.mktemp("data"),
        "captioned",
        features,
        lambda i: {"captions": [f"{i} a", "b"], "id": f"{i}"},
        {"train": COUNT, "val": SHARDS},
        SHARDS,
    )


@pytest.fixture(autouse=True)
def bucket(folder, monkeypatch):
    """The dataset in a bucket whose failure rate is 0 at first."""
    monkeypatch.setattr(storage, "FIRST_DELAY", 1e-4)
    monkeypatch.setattr(storage, "CHUNK", 1 << 12)  # 32 reads a file
    monkeypatch.setattr(Faulty, "rate", 0)  # restored after the test
    monkeypatch.setattr(Faulty, "failed", [])
    monkeypatch.setattr(Faulty, "random", random.Random(0))
    monkeypatch.setattr(Faulty, "requested", [])
    monkeypatch.setattr(Faulty, "store", {})
    fs = fsspec.filesystem("faulty")
    for file in folder.iterdir():
        fs.pipe_file(f"/bucket/captioned/1.0.0/{file.name}", file.read_bytes())
    return fs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{i} a b" for i in range(COUNT)]
    model = train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=30)
    return SentencePieceTokenizer(model, max_len=8)


def read(name, cache, split="train"):
    return open_source(str(name), split, image_size=8, cache=str(cache))


def batches(sources, tokenizer, count=12, **options):
    dataset = train_dataset(sources, tokenizer, ImageOptions(8), batch_size=4, seed=0)
    with contextlib.closing(iterate(dataset, 0, count, **options)) as got:
        return list(got)


def assert_same(some, others):
    for batch, other in zip(some, others, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize(
    ("name", "data_dir"),
    [(URL, ""), (f"{URL}/1.0.0/", ""), ("captioned", "faulty://bucket"), ("local://{}", "")],
)
def test_a_location_is_read_as_a_folder_is(name, data_dir, folder, tmp_path):
    here = open_source(str(folder), "train", image_size=8)
    name = name.format(folder)
    there = open_source(name, "train", image_size=8, cache=str(tmp_path), data_dir=data_dir)
    assert list(there) == list(here) and str(there).startswith("dataset ")
    assert len(read(f"file://{folder}", tmp_path / "none")) == COUNT
    assert not (tmp_path / "none").exists(), "local datasets are not copied"


def test_files_are_copied_when_they_are_needed_and_once(tmp_path):
    source = read(URL, tmp_path)
    assert not any("array_record" in name for name in Faulty.requested)
    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(source.__getitem__, [9, 10, 11] * 8))) == 24
    copied = [name for name in Faulty.requested if "array_record" in name]
    size = Faulty.store[f"/bucket/captioned/1.0.0/{FILE}"].size
    assert copied == [FILE] * (size // storage.CHUNK)
    again = pickle.loads(pickle.dumps(source))
    assert [again[8], read(URL, tmp_path)[9]] == [source[8], source[9]]
    assert len(copied) == sum("array_record" in name for name in Faulty.requested)
    assert not list(tmp_path.rglob("*.part"))


def test_an_incomplete_copy_is_replaced(tmp_path):
    expected = [read(URL, tmp_path / "whole")[i] for i in range(COUNT)]
    source = read(URL, tmp_path / "half")
    (copies,) = (tmp_path / "half").iterdir()
    (copies / f"{FILE}.part").write_bytes(b"\xff" * 300_000)  # left by a process that was killed
    (copies / FILE).write_bytes(b"\xff" * 300)
    assert list(source) == expected and not list(copies.glob("*.part"))


def test_a_dataset_that_changes_is_copied_again(bucket, tmp_path):
    assert len(read(URL, tmp_path)) == COUNT
    bucket.pipe_file(f"/bucket/captioned/1.0.0/{FILE}", b"")
    with pytest.raises(UserError, match=f"{URL}/1.0.0: {FILE} cannot be read"):
        read(URL, tmp_path)[9]
    assert len(list(tmp_path.iterdir())) == 2
    bucket.rm(f"/bucket/captioned/1.0.0/{FILE}")
    with pytest.raises(UserError, match=f"{FILE} is missing"):
        read(URL, tmp_path)


@pytest.mark.parametrize("threads", [0, 3])
def test_one_read_of_twenty_fails_and_the_batches_are_the_same(
    threads, folder, tokenizer, tmp_path
):
    local = open_source(str(folder), "train", image_size=8)
    val = open_source(str(folder), "val", image_size=8)
    expected = batches([(local, 1.0), (val, 2.0)], tokenizer)
    Faulty.rate, Faulty.random = 0.05, random.Random(threads)
    mixture = [(read(URL, tmp_path), 1.0), (read(URL, tmp_path, "val"), 2.0)]
    assert_same(batches(mixture, tokenizer, threads=threads), expected)
    assert len(Faulty.failed) >= 3


@pytest.mark.parametrize("at", ["the beginning", "a batch"])
def test_permanent_failure_raises_with_path_and_reason(at, tokenizer, tmp_path):
    source = read(URL, tmp_path) if at == "a batch" else None
    Faulty.rate = 1.0
    with pytest.raises(UserError) as raised:
        batches([(source or read(URL, tmp_path), 1.0)], tokenizer)
    message = str(raised.value)
    assert message.startswith(URL) and "(the line is noisy, tried 8 times)" in message
    assert len(Faulty.failed) >= storage.TRIES and "\n" not in message


@pytest.mark.parametrize(
    ("error", "expected_message"),
    [
        (FileNotFoundError("x"), "no such file"),
        (PermissionError(13, "Forbidden"), "Forbidden"),
        (OSError(28, "No space left on device"), "No space left"),
        (ValueError("no such region"), "no such region"),
    ],
)
def test_permanent_errors_are_not_retried(error, expected_message, tmp_path, monkeypatch):
    source = read(URL, tmp_path)
    monkeypatch.setattr(Faulty, "error", error)
    Faulty.rate = 1.0
    with pytest.raises(UserError, match=f"{FILE}: cannot be read \\({expected_message}[^,]*\\)"):
        source[9]
    # A prefetching thread of an earlier test may still be in its retries.
    assert Faulty.failed.count(threading.get_ident()) == 1


def test_a_file_that_ends_too_early_is_never_read(bucket, tmp_path):
    source = read(URL, tmp_path)
    path = f"/bucket/captioned/1.0.0/{FILE}"
    bucket.pipe_file(path, bucket.cat_file(path)[:70_000])
    with pytest.raises(UserError, match="bytes came instead of 4096, tried 8 times"):
        source[9]


def test_invalid_locations_raise(tmp_path):
    for name, expected_message in {
        "faulty://bucket/captoined": "no such folder. Did you mean 'captioned'",
        "nowhere://bucket/x": "nowhere://bucket/x: cannot be read .Protocol not known: nowhere",
    }.items():
        with pytest.raises(UserError, match=expected_message):
            read(name, tmp_path)


def test_a_full_cache_raises_before_anything_is_copied(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="data.cache: .* needs 0.0 GB more in .*larger disk"):
        read(URL, tmp_path)
    assert len(read(URL, tmp_path, "train[:50%]")) == COUNT // 2, "two files of three"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="data.cache: cannot write to .*file.*Not a directory"):
        read(URL, tmp_path / "file")


def test_transient_errors_of_a_local_disk_are_retried(folder, monkeypatch):
    source = TfdsSource(folder, "train")
    expected = source[3]

    class Bad:
        def __len__(self):
            return COUNT

        def __getitem__(self, index):
            raise RuntimeError(f"pread() failed: {os.strerror(5)}; reading {folder}")

    opened, whole = [Bad(), Bad(), source._records], source._records
    monkeypatch.setattr(source, "_records", Bad())
    monkeypatch.setattr(source, "_open_records", lambda: opened.pop(0))
    assert source[3] == expected and source._records is whole
    monkeypatch.setattr(source, "_open_records", Bad)
    source._records = Bad()
    with pytest.raises(UserError, match="example 3 in .* cannot be read .pread.* failed: Input"):
        source[3]


@pytest.mark.slow
def test_worker_processes_share_the_copies(folder, tokenizer, tmp_path):
    expected = batches([(open_source(str(folder), "train", image_size=8), 1.0)], tokenizer)
    source = read(f"local://{folder}", tmp_path)
    assert_same(batches([(source, 1.0)], tokenizer, workers=2), expected)
    (copies,) = tmp_path.iterdir()
    assert {f.name for f in copies.iterdir()} == {
        f.name for f in folder.iterdir() if "-val." not in f.name
    }


@pytest.mark.slow
def test_a_run_trains_on_through_faults(folder, tmp_path):
    def losses(name, workdir):
        c = toy.config(total_steps=6, data__cache=str(tmp_path / "cache"))
        c.data.name, c.text.vocab_size = str(name), 30
        c.data.order, c.data.block = "blocks", 4  # the default for URLs
        train.run(c, tmp_path / workdir)
        return toy.losses(tmp_path / workdir)

    expected = losses(folder, "local")
    Faulty.rate = 0.05
    assert losses(URL, "remote") == expected and Faulty.failed
    shutil.rmtree(tmp_path / "cache")
    Faulty.rate = 1.0
    with pytest.raises(UserError, match=URL):
        losses(URL, "never")


@pytest.mark.parametrize("name", ["reference://::faulty://bucket/a.json", "zip::http://host/a.zip"])
def test_chains_of_file_systems_are_not_opened(name):
    with pytest.raises(UserError, match="chains of file systems"):
        open_source(name, "train", image_size=8)
    assert not Faulty.requested


def test_gcsfs_is_set_up_before_a_file_system_is_opened(tmp_path, monkeypatch):
    name = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"
    monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.delenv(name)
    places.prepare_gcsfs.cache_clear()
    storage.Remote(f"local://{tmp_path}").is_dir()
    assert os.environ[name] == "false"
