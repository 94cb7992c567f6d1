"""Datasets in Google Cloud Storage and S3, read in ranges from servers on 127.0.0.1."""

import contextlib

import fsspec
import numpy as np
import pytest

from cap_pretrain.data import blocks
from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.sources import storage
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.sources.ranges import Cache
from cap_pretrain.errors import UserError
from tests.data.test_ranged_records import COUNT, FILE, SHARDS, write_dataset

LAYOUT = blocks.Layout(block=4, lanes=2, cache_gb=300_000 / 1e9)


@contextlib.contextmanager
def s3(monkeypatch):
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3"
    finally:
        server.stop()


@pytest.fixture(params=["gs", "s3"])
def store(request, monkeypatch):
    """Yield the protocol of a running store with an empty bucket."""
    if request.param == "gs":
        request.getfixturevalue("bucket")
        yield "gs"
        return
    with s3(monkeypatch) as protocol:
        yield protocol


@pytest.mark.slow
def test_batches_are_those_of_the_local_dataset(store, tokenizer, tmp_path, monkeypatch, request):
    folder = write_dataset(tmp_path)
    monkeypatch.setattr(storage, "FIRST_DELAY", 1e-3)
    url, fs = f"{store}://bucket/ranged", fsspec.filesystem(store)
    for file in folder.iterdir():
        fs.pipe_file(f"bucket/ranged/1.0.0/{file.name}", file.read_bytes())
    local = open_source(str(folder), "train", image_size=8)
    cache = Cache(str(tmp_path / "cache"), LAYOUT.block, LAYOUT.cache_gb * 1e9)
    source = open_source(url, "train", image_size=8, cache=cache)

    def batches(source, **options):
        order = blocks.BlockOrder([(source, 1.0)], LAYOUT, batch_size=4, seed=0)
        plan = blocks.ReadAhead(order, [source], range(4))
        dataset = train_dataset(
            [(source, 1.0)], tokenizer, ImageOptions(8), batch_size=4, seed=0, order=order
        )
        with contextlib.closing(iterate(dataset, 0, 30, plan=plan, **options)) as found:
            return list(found)

    expected = batches(local)
    options = {"workers": 1}
    if store == "gs":
        request.getfixturevalue("bucket").fail("read", "*array_record*", times=3)
        options = {"threads": 3}
    for batch, other in zip(batches(source, **options), expected, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
    assert len(expected) * 4 > COUNT
    content = fs.cat_file(f"bucket/ranged/1.0.0/{FILE}")
    fresh = Cache(str(tmp_path / "fresh"), LAYOUT.block, 1e6)
    source = open_source(url, "train", image_size=8, cache=fresh)
    first = COUNT // SHARDS
    assert source[first] == local[first]
    fs.pipe_file(f"bucket/ranged/1.0.0/{FILE}", content[::-1])
    with pytest.raises(UserError, match=f"{FILE}: (changed|was removed or replaced) while it was"):
        source[2 * first - 1]
