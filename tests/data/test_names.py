"""Names and ids from data: which are refused, which match, and which never collapse into one."""

import contextlib
import json
import random
import string
import time

import pytest

from cap_pretrain.data.builders.arguments import check_splits
from cap_pretrain.data.builders.files import AmbiguousNameError, Finder, open_files
from cap_pretrain.data.builders.formats.image_folder import classified
from cap_pretrain.errors import UserError
from tests.data.test_question_formats import build, lost
from tests.data.test_webdataset import sample, tar
from tests.tools.test_build_dataset import jpeg, read, report, run, write_files


def karpathy(path, images):
    """Write images, given as (split, file name, id), in the form of Karpathy's splits."""
    listed = [
        {"split": split, "filename": name, "imgid": number, "sentences": [{"raw": f"c {number}"}]}
        for split, name, number in images
    ]
    path.write_text(json.dumps({"images": listed}))
    return path


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "split",
    ["../../pwned", "/tmp/x", "", ".", "..", "a/b", "a\\b", 3, None, ["train"], {"a": 1}, 1e400]
    + ["x" * 300, "all", "-v", "~", "*", "a b", "a\nb", "a\0b", "\ud800", "tr[0]", "{split}"],
)
def test_a_split_that_is_no_file_name_is_refused_and_writes_nothing(tmp_path, capsys, split):
    write_files(tmp_path / "images", {"a.jpg": jpeg(0)})
    file = karpathy(tmp_path / "k.json", [("train", "a.jpg", 0), (split, "a.jpg", 1)])
    before = tree(tmp_path)
    out = tmp_path / "deep" / "down" / "out"
    options = ["--annotations", file, "--images", tmp_path / "images"]
    assert run("karpathy", "--name", "mine", "--out", out, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "split" in error and len(error.splitlines()) <= 2
    assert [path for path in tree(tmp_path) if not path.startswith("deep")] == before
    assert not out.exists() or tree(out) == []


def test_any_split_name_is_refused_or_stays_in_its_folder(tmp_path):
    """2,000 random names: those that pass are one part of a path and differ without case."""
    rng, passed = random.Random(0), 0
    alphabet = string.printable + "äé/\\.\0\ud800\u2028"
    for _ in range(2000):
        name = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
        with contextlib.suppress(UserError):
            check_splits([name], "file")
            path = tmp_path / f"{name}-000000.unit"
            assert path.resolve().parent == tmp_path.resolve() and path.name.startswith(name)
            passed += 1
    assert passed > 20
    with pytest.raises(UserError, match="differ only in case"):
        check_splits(["Val", "val"], "file")


def test_a_split_does_not_read_the_units_of_one_whose_name_begins_alike(tmp_path):
    write_files(tmp_path / "images", {f"{n}.jpg": jpeg(n) for n in range(4)})
    splits = ["train", "val", "val-unseen", "val-000001"]
    images = [(split, f"{n}.jpg", n) for n, split in enumerate(splits)]
    file = karpathy(tmp_path / "k.json", images)
    folder = build(tmp_path, "karpathy", "--annotations", file, "--images", tmp_path / "images")
    assert {split: set(read(folder, split)) for split in splits} == {
        split: {str(n)} for n, split in enumerate(splits)
    }


@pytest.mark.parametrize("name", ["", "units", "lock", "mine"])
def test_a_symbolic_link_in_place_of_the_work_folder_removes_nothing(tmp_path, capsys, name):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "train-000000.unit").write_text("data")
    work = tmp_path / "out" / ".mine.building"
    (work / name).parent.mkdir(parents=True)
    (work / name).symlink_to(precious)
    images = write_files(tmp_path / "images", {"a/1.jpg": jpeg(0), "b/1.jpg": jpeg(1)})
    code = run("image_folder", "--name", "mine", "--out", tmp_path / "out", "--images", images)
    assert (precious / "train-000000.unit").read_text() == "data" and len(tree(precious)) == 1
    assert code == (0 if name == "mine" else 2)  # a link in the folder is removed, not followed
    if code:
        assert "is a symbolic link" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names",
    [
        [f"cc12m.{n:05}.tar" for n in range(4)],
        ["00000.tar", "00000.tar.gz", "00000.tgz"],
        ["a.tar", "x/a.tar", "a.b.tar", "a.b.tar.gz"],
        ["a.tar", "a.tar.tar", "b.tar"],
    ],
)
def test_every_shard_is_read(tmp_path, names):
    for n, name in enumerate(names):
        # The reader recognizes gzip by content, so a plain tar with this name is fine.
        tar(tmp_path / "tars" / name, sample("0", jpeg(n), f"caption {n}"))
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "tars")
    captions = [e["captions"][0] for e in read(folder, "train").values()]
    assert sorted(captions) == [f"caption {n}" for n in range(len(names))]


def test_shards_behind_symbolic_links_are_read_once(tmp_path):
    tar(tmp_path / "elsewhere" / "a.tar", sample("0", jpeg(0), "caption 0"))
    tar(tmp_path / "tars" / "B.TAR", sample("0", jpeg(1), "caption 1"))
    (tmp_path / "tars" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tars" / "loop").symlink_to(tmp_path / "tars")
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "tars")
    assert set(read(folder, "train")) == {"B/0", "linked/a/0"}


def test_names_of_shards_that_were_distinct_before_stay(tmp_path):
    for n, name in enumerate(["00000.tar", "00001.tar", "00001.x.tar"]):
        tar(tmp_path / "tars" / name, sample("0", jpeg(n), f"caption {n}"))
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "tars")
    assert set(read(folder, "train")) == {"00000/0", "00001.x/0", "00001/0"}


def test_keys_with_dots_are_examples_of_their_own(tmp_path):
    members = [m for v in (1, 2) for m in sample(f"a.v{v}", jpeg(v), f"caption {v}")]
    members += sample("b", jpeg(3), "caption 3") + [("b.seg.png", jpeg(4, kind="PNG"))]
    members += sample("c", jpeg(5), "caption 5") + sample("c", jpeg(6), "the same key again")
    tar(tmp_path / "0.tar", members)
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "0.tar")
    assert {k: e["captions"][0] for k, e in read(folder, "train").items()} == {
        **{"0/a.v1": "caption 1", "0/a.v2": "caption 2"},
        **{"0/b": "caption 3", "0/c": "caption 5"},
    }
    assert lost(folder, "train") == {"duplicate id": ["0/c"]}


def test_ids_are_equal_as_integers_and_floats_and_in_all_unicode_forms(tmp_path):
    write_files(tmp_path / "images", {"cafe\u0301.jpg": jpeg(0), "b.jpg": jpeg(1)})
    listed = [(1, "caf\u00e9.jpg"), (2.0, "b.jpg")]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in listed],
        "annotations": [{"image_id": i, "caption": f"of {i}"} for i in (1.0, 2)],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    options = ["--annotations", tmp_path / "c.json", "--images", tmp_path / "images"]
    folder = build(tmp_path, "captions_json", *options)
    assert {k: e["captions"] for k, e in read(folder, "train").items()} == {
        "1": ["of 1.0"],
        "2": ["of 2"],
    }


@pytest.mark.parametrize("bad", [None, [1], {"a": 1}, True])
def test_ids_of_other_types_are_refused(tmp_path, capsys, bad):
    write_files(tmp_path / "images", {"a.jpg": jpeg(0)})
    content = {"images": [{"id": bad, "file_name": "a.jpg"}], "annotations": []}
    (tmp_path / "c.json").write_text(json.dumps(content))
    options = ["--annotations", tmp_path / "c.json", "--images", tmp_path / "images"]
    assert run("captions_json", "--name", "mine", "--out", tmp_path / "out", *options) == 2
    assert "'id' must be str or int or float" in capsys.readouterr().err


FILES = {"top/x/a.jpg": b"x", "top/y/a.jpg": b"y", "cafe\u0301.jpg": b"nfd", "z/b.jpg": b"b"}
FILES["win\\d.jpg"] = b"d"  # as in zips made on Windows


@pytest.mark.parametrize("kind", ["folder", "images.zip"])
def test_files_are_found_by_the_end_of_their_path(tmp_path, kind):
    finder = Finder([open_files(write_files(tmp_path / kind, FILES))])
    for name, content in {
        **{"top/x/a.jpg": b"x", "x/a.jpg": b"x", "data/top/y/a.jpg": b"y", "data/y/a.jpg": b"y"},
        **{"y\\a.jpg": b"y", "C:\\photos\\top\\x\\a.jpg": b"x", "./x/a.jpg": b"x"},
        **{"caf\u00e9.jpg": b"nfd", "b.jpg": b"b", "other/b.jpg": b"b"},
        **{"d.jpg": b"d", "win/d.jpg": b"d"},
    }.items():
        assert finder.read(name) == content, name
    for name in ("a.jpg", "w/a.jpg"):
        with pytest.raises(AmbiguousNameError):
            finder.read(name)
    for name in ("c.jpg", "", "../a", "a.jpg/", "/etc/passwd"):
        with pytest.raises(FileNotFoundError):
            finder.read(name)


def test_lookups_among_many_files_of_one_name_are_fast(tmp_path):
    class Many:
        path = tmp_path

        def names(self):
            return [f"top/{n}/image.jpg" for n in range(20_000)]

        def read(self, name):
            return name.encode()

    finder = Finder([Many()])
    start = time.monotonic()
    for n in range(20_000):
        assert finder.read(f"{n}/image.jpg") == b"top/%d/image.jpg" % n
    assert time.monotonic() - start < 10  # 0.2 s; comparing all with all takes minutes


def test_an_ambiguous_name_is_counted_as_such(tmp_path):
    write_files(tmp_path / "images", {"x/a.jpg": jpeg(0), "y/a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    file = karpathy(tmp_path / "k.json", [("train", "a.jpg", 0), ("train", "b.jpg", 1)])
    folder = build(tmp_path, "karpathy", "--annotations", file, "--images", tmp_path / "images")
    assert lost(folder, "train") == {"ambiguous name": ["0"]}
    assert report(folder)["train"]["kept"] == 1


def test_a_class_may_be_called_like_a_split():
    beside = ["car/1/a.jpg", "train/1/b.jpg", "bus/c.jpg"]
    assert classified(beside, "train") == list(zip(beside, ["car", "train", "bus"], strict=True))
    splits = ["train/car/a.jpg", "train/bus/b.jpg", "val/car/c.jpg", "README/x/d.jpg"]
    assert classified(splits, "train") == list(zip(splits[:2], ["car", "bus"], strict=True))
    own = ["train_small/car/a.jpg", "val_small/car/b.jpg"]
    assert classified(own, "train_small", ["train_small", "val_small"]) == [(own[0], "car")]
    alone = ["top/train/car/a.jpg", "top/train/train/b.jpg"]
    assert classified(alone, "train") == list(zip(alone, ["car", "train"], strict=True))
