"""Training on tars in their original layout: indexed once, then read in any order."""

import gzip
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cap_pretrain import inputs
from cap_pretrain.data.sources import contents, tar_index
from cap_pretrain.data.sources.base import NoSplitError, block_bounds, parse_mixture
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.errors import UserError
from cap_pretrain.evals import members
from tests import toy
from tests.data.test_question_formats import build
from tests.data.test_webdataset import sample, samples, tar
from tests.tools.test_build_dataset import jpeg, read


@pytest.fixture
def tars(tmp_path):
    """Three tars of 4, 3 and 4 examples, as img2dataset writes them."""
    folder = tmp_path / "tars"
    for number, (start, count) in enumerate([(0, 4), (4, 3), (7, 4)]):
        tar(folder / f"{number:05}.tar", samples(count, start))
        (folder / f"{number:05}_stats.json").write_text("{}")
    return folder


def opened(pattern, split="train", cache="", **fields):
    return open_source(f"wds:{pattern}", split, image_size=8, cache=str(cache), fields=fields)


def captions(source):
    return [example["captions"] for example in source]


def test_examples_are_those_of_a_build(tars, tmp_path):
    source = opened(tars)
    built = read(build(tmp_path, "webdataset", "--shards", tars), "train")
    assert {example["id"]: example["captions"] for example in source} == {
        key: example["captions"] for key, example in built.items()
    }
    assert all(built[e["id"]]["image"] == e["image"] for e in source)
    assert [source.without_image(k)["captions"] for k in range(11)] == captions(source)
    assert block_bounds(source, 2).tolist() == [0, 2, 4, 6, 7, 9, 11]
    assert len(pickle.dumps(source)) < 2000
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(again.__getitem__, [*range(11)] * 9)) == list(source) * 9


def test_patterns_folders_and_splits(tars, tmp_path):
    whole = captions(opened(tars))
    assert whole == [[f"caption {k}"] for k in range(11)]
    assert captions(opened(f"{tars}/{{00000..00002}}.tar")) == whole
    assert captions(opened(f"file://{tars}/0000[12].tar")) == whole[4:]
    assert captions(opened(f"{tars}/{{00002,00000}}.tar")) == whole[7:] + whole[:4]
    assert captions(opened(tars / "00001.tar", "train[1:]")) == whole[5:7]
    assert block_bounds(opened(tars, "train[50%:]"), 2).tolist() == [0, 1, 3, 5]
    (tars / "00002.tar").rename(tars / "cc-val-00002.tar")
    assert captions(opened(tars, "validation")) == captions(opened(tars, "val")) == whole[7:]
    assert captions(opened(tars)) == whole[:7]
    with pytest.raises(NoSplitError, match="no split 'test'; it has train, validation"):
        opened(tars, "test")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("tars/{00000..00003}.tar", "1 of 4 names match no file, the first is 00003.tar"),
        ("tars/{00000}.tar", "'00000' in braces; write {00000..00041} or {a,b}"),
        ("tars/{0..99999999}.tar", "names over"),
        ("*/00000.tar", "use braces there"),
        ("trs", "no such file or folder. Did you mean 'tars'?"),
        ("", "names no files"),
        ("empty", "no file *.tar in it"),
        ("none.tar", "has no usable example"),
        ("packed.tar", "is compressed"),
    ],
)
def test_mistakes_are_explained(tars, tmp_path, monkeypatch, pattern, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "packed.tar").write_bytes(gzip.compress((tars / "00000.tar").read_bytes()))
    with pytest.raises(UserError) as raised:
        opened(pattern)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_index_is_kept_and_a_changed_tar_is_indexed_again(tars, monkeypatch):
    indexed = []
    whole = tar_index.Indexes._index

    def index(self, tar):
        indexed.append(tar.name)
        return whole(self, tar)

    monkeypatch.setattr(tar_index.Indexes, "_index", index)
    source = opened(tars)
    assert sorted(indexed) == ["00000.tar", "00001.tar", "00002.tar"]
    (tars / ".cap_index" / "00000.tar.index").unlink()  # a pass that was stopped goes on
    damaged = tars / ".cap_index" / "00001.tar.index"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    tar(tars / "00002.tar", samples(2, 20))
    indexed.clear()
    with pytest.raises(UserError, match="00002.tar: was changed while it was in use"):
        source[9]
    assert captions(opened(tars))[7:] == [["caption 20"], ["caption 21"]]
    assert sorted(indexed) == ["00000.tar", "00001.tar", "00002.tar"]
    opened(tars)
    assert len(indexed) == 3


def test_an_index_that_cannot_lie_beside_the_tars_is_kept_in_the_cache(tars, tmp_path):
    (tars / ".cap_index").write_bytes(b"in the way")
    assert captions(opened(tars, cache=tmp_path / "cache")) == captions(opened(tars))
    assert len(list((tmp_path / "cache").rglob("*.tar.index"))) == 3
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="data.cache: cannot write to"):
        opened(tars, cache=tmp_path / "file" / "x")


def test_fields_come_from_the_text_and_the_json(tmp_path):
    members = [
        *sample("a", jpeg(1), "by text", alt=["x", " "], name="k"),
        ("b.png", jpeg(2, kind="PNG")),
        ("b.json", json.dumps({"caption": "by json", "class": 7}).encode()),
        ("b.cls", b"5\n"),
        ("c.jpg", jpeg(3)),
        ("c.json", b"{"),
        ("no_image.txt", b"text"),
    ]
    tar(tmp_path / "t.tar", members)
    source = opened(tmp_path / "t.tar")
    assert captions(source) == [["by text"], ["by json"], []]
    assert [e["label"] for e in source] == [-1, 5, -1]
    assert [e["id"] for e in source] == ["t/a", "t/b", "t/c"]
    chosen = opened(tmp_path / "t.tar", captions="alt+txt:3", label="class", id="name")
    assert chosen[0]["captions"] == ["x", "by text"] and chosen[0]["weights"] == [1, 3]
    assert chosen[0]["origins"] == [0, 1]
    assert (chosen[0]["id"], chosen[1]["label"], chosen[2]["id"]) == ("k", 7, "t/c")
    with pytest.raises(UserError, match="data.fields.image"):
        opened(tmp_path / "t.tar", image="png")


def test_files_open_at_a_time_are_bounded(tars, monkeypatch):
    monkeypatch.setattr(contents, "OPEN_FILES", 2)
    source = opened(tars)
    for index in np.random.default_rng(0).permutation(11):
        assert source[int(index)]["captions"] == [f"caption {index}"]
    assert len(source._contents._open._values) == 2


def test_blocks_are_held_out_of_the_only_split(tmp_path):
    for number in range(4):
        tar(tmp_path / f"{number}.tar", [(f"{k}.jpg", b"x") for k in range(400)])
    config = toy.config(data__name=f"wds:{tmp_path}", data__held_out=128)
    train, val = (inputs.open_data(config, split) for split in ("train", "val"))
    assert len(train) == 1600 - 128 and len(val) == 128
    ids = [[source.without_image(k)["id"] for k in range(len(source))] for source in (train, val)]
    assert len({*ids[0], *ids[1]}) == 1600
    runs = np.split(val._indices, np.flatnonzero(np.diff(val._indices) != 1) + 1)
    assert len(runs) <= 32 and all(len(run) % 4 == 0 for run in runs)
    assert inputs.held_out(config, [(train, 1.0)])[0].endswith("to choose others.")


def test_evaluators_of_a_mixture_are_named_after_the_files():
    names = ["wds:/data/cc12m", "wds:gs://bucket/cc12m", "parquet:data/coco/{0..3}.parquet"]
    assert [members.label(name) for name in names] == ["cc12m", "cc12m", "0_3_parquet"]
    assert parse_mixture("wds:gs://b/{0..9}.tar:0.2+parquet:a") == [
        ("wds:gs://b/{0..9}.tar", 0.2),
        ("parquet:a", 1.0),
    ]


@pytest.mark.slow
def test_processes_index_many_tars(tars, tmp_path, monkeypatch):
    expected = captions(opened(tars))
    for file in (tars / ".cap_index").iterdir():
        file.unlink()
    monkeypatch.setattr(tar_index, "_MANY", 0)
    assert captions(opened(tars, cache=tmp_path / "other")) == expected
    assert len(list((tars / ".cap_index").iterdir())) == 3
