"""Tars and Parquet files in a bucket: indexed by all hosts together, fetched in ranges."""

import contextlib
import pickle
import random
import threading
import time
import types

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from cap_pretrain import inputs
from cap_pretrain.data.sources import base, footer, forward, storage, tar_index
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.sources.ranges import Cache
from cap_pretrain.errors import UserError
from cap_pretrain.training import feed
from tests import toy
from tests.data.test_sources import write
from tests.data.test_storage import Faulty
from tests.data.test_webdataset import sample, tar
from tests.http_server import Answer, Connection, Threaded
from tests.tools.test_build_dataset import jpeg

URL = "faulty://bucket/set"


@pytest.fixture(params=["wds", "parquet"])
def here(request, tmp_path, monkeypatch):
    """The name of a local dataset whose files are in the bucket, too."""
    for name, value in {"rate": 0, "failed": [], "requested": [], "store": {}}.items():
        monkeypatch.setattr(Faulty, name, value)
    monkeypatch.setattr(Faulty, "random", random.Random(0))
    monkeypatch.setattr(storage, "FIRST_DELAY", 1e-4)
    images = [jpeg(k) + random.Random(k).randbytes(60_000) for k in range(18)]
    (tmp_path / "set").mkdir()
    for k in range(3):
        own = range(6 * k, 6 * k + 6)
        if request.param == "wds":
            members = [m for i in own for m in sample(f"{i:03}", images[i], f"caption {i}")]
            tar(tmp_path / "set" / f"{k:05}.tar", members)
        else:
            rows = {"image": [images[i] for i in own], "text": [f"caption {i}" for i in own]}
            path = tmp_path / "set" / f"train-{k}.parquet"
            parquet.write_table(pa.table(rows), path, row_group_size=3, use_dictionary=False)
    fs = fsspec.filesystem("faulty")
    for file in (tmp_path / "set").iterdir():
        fs.pipe_file(f"/bucket/set/{file.name}", file.read_bytes())
    return f"{request.param}:{tmp_path / 'set'}"


def opened(name, cache, split="train"):
    return open_source(name, split, image_size=8, cache=str(cache))


def there(name):
    return f"{name.partition(':')[0]}:{URL}"


def test_examples_are_those_of_local_files(here, tmp_path, monkeypatch):
    expected = list(opened(here, tmp_path / "none"))
    monkeypatch.setattr(Faulty, "rate", 0.3)
    source = opened(there(here), tmp_path / "cache")
    assert [source[k] for k in random.Random(0).sample(range(18), 18)] == [
        expected[k] for k in random.Random(0).sample(range(18), 18)
    ]
    again = pickle.loads(pickle.dumps(source))
    assert list(again) == expected and Faulty.failed
    assert base.block_bounds(again, 3).tolist() == [*range(0, 19, 3)]
    captions = [base.without_image(again, k)["captions"] for k in range(18)]
    assert captions == [e["captions"] for e in expected]


def test_what_is_announced_is_fetched_in_whole_blocks(here, tmp_path):
    source = opened(there(here), tmp_path / "cache")
    Faulty.requested.clear()
    source.read_ahead([(6, 9), (15, 18)])
    deadline = time.monotonic() + 30
    while source._contents._ranges._planner._running and time.monotonic() < deadline:
        time.sleep(0.01)
    fetched = [name for name in Faulty.requested if name.endswith((".tar", ".parquet"))]
    reads = len(fetched)
    assert [source[k]["captions"][0] for k in (6, 7, 8, 17, 16, 15)] == [
        f"caption {k}" for k in (6, 7, 8, 17, 16, 15)
    ]
    assert len(set(fetched)) == 2 and reads <= 4
    later = [name for name in Faulty.requested if name.endswith((".tar", ".parquet"))]
    assert len(later) == reads, "nothing is fetched twice"


class Pages:
    """A web server of files, whose listing has names only and whose ETags are weak."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def answer(self, method, target, headers, body):
        name = target.rpartition("/")[2]
        self.asked.append((method, name, headers.get("if-match")))
        if name == "set":
            links = "".join(f'<a href="{file.name}">x</a>' for file in self.folder.iterdir())
            links += '<a href="?C=N;O=D">Name</a>'
            return Answer(200, links.encode(), {"Content-Type": "text/html"})
        if method not in ("GET", "HEAD") or not (self.folder / name).is_file():
            return Answer(404, b"")
        data = (self.folder / name).read_bytes()
        about = {"ETag": f'W/"{len(data)}"', "Content-Type": "application/octet-stream"}
        if method == "HEAD":
            return Answer(200, b"", about | {"Content-Length": str(len(data))})
        if "if-match" in headers:
            return Answer(412, b"")  # as RFC 9110 has it for weak ETags
        start, _, last = headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(start) : int(last) + 1 if last else len(data)]
        return Answer(206 if "range" in headers else 200, part, about)


def test_files_of_a_web_server_are_read(here, tmp_path):
    pages = Pages(tmp_path / "set")
    with Threaded(("127.0.0.1", 0), Connection) as server:
        server.owner = pages
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/set"
        source = opened(f"{here.partition(':')[0]}:{url}", tmp_path / "cache")
        expected = list(opened(here, tmp_path / "none"))
        assert [source[k] for k in (17, 0, 8)] == [expected[k] for k in (17, 0, 8)]
        assert all(method != "PUT" for method, *_ in pages.asked)
        server.shutdown()


@pytest.mark.parametrize("cache", ["", Cache(budget=1e8)])
def test_a_dataset_on_a_web_server_is_read(cache, tmp_path, monkeypatch):
    from tensorflow_datasets import features as f

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    features = {"image": f.Image(), "captions": f.Text(), "id": f.Text()}
    texts = lambda i: {"captions": f"caption {i}", "id": f"{i}"}
    folder = write(tmp_path, "set", features, texts, {"train": 6}, 2)
    with Threaded(("127.0.0.1", 0), Connection) as server:
        server.owner = Pages(folder)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/set"
        source = open_source(url, "train", image_size=8, cache=cache)
        assert [source[k]["captions"] for k in range(6)] == [
            example["captions"] for example in open_source(str(folder), "train", image_size=8)
        ]
        server.shutdown()


@pytest.mark.parametrize("here", ["parquet"], indirect=True)
def test_a_footer_is_parsed_once(here, tmp_path, monkeypatch):
    parsed = []
    whole = footer.row_groups
    monkeypatch.setattr(footer, "row_groups", lambda data: parsed.append(1) or whole(data))
    source = opened(there(here), tmp_path / "cache")
    spans = [list(source._spans_of(file, group)()) for file in range(3) for group in (1, 0)]
    assert len(parsed) == 3
    assert all(start < stop for ((_, start, stop),) in spans)
    assert all(spans[k][0][1] == spans[k + 1][0][2] for k in (0, 2, 4)), "groups follow each other"


def test_a_file_that_changes_is_an_error(here, tmp_path):
    source = opened(there(here), tmp_path / "cache")
    name = source._listing.files[1].name
    fs = fsspec.filesystem("faulty")
    fs.pipe_file(f"/bucket/set/{name}", bytes(fs.info(f"/bucket/set/{name}")["size"]))
    with pytest.raises(UserError, match="changed while it was in use"):
        source[7]


@pytest.mark.parametrize("here", ["wds"], indirect=True)
def test_hosts_index_each_tar_once_if_the_bucket_can_be_written(here, tmp_path, monkeypatch):
    state = types.SimpleNamespace(process_id=2, num_processes=3)
    monkeypatch.setattr(tar_index.cluster, "state", lambda: state)
    monkeypatch.setattr(tar_index, "_THREADS", 1)
    source = opened(there(here), tmp_path / "one")
    assert [name[-9:] for name in Faulty.requested if name.endswith(".tar")] == [
        *("00002.tar", "00000.tar", "00001.tar"),  # host 2 of 3 begins with the last third
    ]
    assert isinstance(source._entries.base, np.memmap), "not in the memory of each process"
    assert len(pickle.dumps(tar_index.Indexes(source._listing.root, "", "x")._make)) < 500
    Faulty.requested.clear()
    opened(there(here), tmp_path / "two")
    assert not [name for name in Faulty.requested if name.endswith(".tar")]
    assert len([name for name in Faulty.requested if name.endswith(".tar.index")]) == 3

    def refuse(self, path, value, **kwargs):
        raise PermissionError(13, "Forbidden")

    monkeypatch.setattr(Faulty, "pipe_file", refuse)
    monkeypatch.setattr(tar_index, "FOLDER", ".none")
    opened(there(here), tmp_path / "three")
    assert len(list((tmp_path / "three").rglob("*.index"))) == 3
    Faulty.requested.clear()
    opened(there(here), tmp_path / "three")
    assert not [name for name in Faulty.requested if "tar" in name], "kept in the cache"


@pytest.mark.parametrize("here", ["wds"], indirect=True)
def test_tars_of_large_files_are_indexed_by_their_headers(here, tmp_path, monkeypatch):
    members = [(f"{k}.jpg", bytes(200_000)) for k in range(5)]
    tar(tmp_path / "large.tar", [m for k in range(5) for m in (members[k], (f"{k}.txt", b"x"))])
    fs = fsspec.filesystem("faulty")
    fs.pipe_file("/bucket/large/0.tar", (tmp_path / "large.tar").read_bytes())
    read = []
    whole = Faulty.cat_file

    def counting(self, path, start=None, end=None, **kwargs):
        read.append((end or 0) - (start or 0))
        return whole(self, path, start, end, **kwargs)

    monkeypatch.setattr(Faulty, "cat_file", counting)
    monkeypatch.setattr(storage, "CHUNK", 2**16)
    monkeypatch.setattr(forward, "_JUMP", 2**16)
    monkeypatch.setattr(forward, "_LITTLE", 2**12)
    assert len(opened("wds:faulty://bucket/large", tmp_path / "cache")) == 5
    assert sum(read) < 150_000


def test_batches_are_those_of_local_files_and_bytes_are_fetched_once(
    here, tmp_path, tokenizer, monkeypatch
):
    fetched = []
    whole = Faulty.cat_file

    def counting(self, path, start=None, end=None, **kwargs):
        data = whole(self, path, start, end, **kwargs)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(Faulty, "cat_file", counting)
    batches = []
    for name in (here, there(here)):
        config = toy.config(data__name=name, data__held_out=0, data__block=3, batch_size=6)
        config.data.cache = str(tmp_path / "cache")
        mixture = inputs.open_sources(config)
        config = inputs.completed(config, mixture)
        fetched.clear()  # what an index was made from
        steps = range(6)  # two epochs
        read = feed.prepared_batches(config, mixture, tokenizer, np.arange(6), steps)
        with contextlib.closing(read):
            batches.append(list(read))
    for mine, other in zip(*batches, strict=True):
        for key, value in mine.items():
            np.testing.assert_array_equal(value, other[key])
    size = sum(file.stat().st_size for file in (tmp_path / "set").iterdir() if file.is_file())
    assert sum(fetched) <= 1.1 * size
