"""Tars of img2dataset, intact and damaged; Conceptual Captions from tars and from lists."""

import gzip
import io
import json
import tarfile
import zlib

import pytest

from cap_pretrain.data.examples import pair_id
from cap_pretrain.data.tars import CutOffError, read_members
from tests.data.test_question_formats import build, lost
from tests.tools.test_build_dataset import jpeg, read, report, run, write_files


def tar(path, members, tar_format=tarfile.GNU_FORMAT):
    """Write (name, content) of files to a tar; return the offset of each header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = {}
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            starts[name] = archive.offset
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return starts


def sample(key, image, caption, url="", **more):
    """Return the files that img2dataset writes for a download, in its order."""
    about = {"url": url, "caption": caption, "key": key, "status": "success"} | more
    return [
        (f"{key}.jpg", image),
        (f"{key}.json", json.dumps(about, indent=4).encode()),
        (f"{key}.txt", caption.encode()),
    ]


def samples(count, start=0):
    keys = [f"{k:09}" for k in range(start, start + count)]
    return [m for k in keys for m in sample(k, jpeg(int(k)), f"caption {int(k)}")]


def captions(folder, split="train"):
    return sorted(example["captions"][0] for example in read(folder, split).values())


@pytest.mark.parametrize(
    "tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]
)
def test_members_are_grouped_by_key(tmp_path, tar_format):
    members = samples(2)
    members += [
        ("more/a.b.jpg", jpeg(5)),  # the key ends at the first dot
        ("more/a.txt", b"not an image of that suffix"),
        ("more/b.png", jpeg(6, kind="PNG")),
        ("more/b.json", b'{"caption": " by json "}'),
        ("._hidden.jpg", b"x"),
    ]
    tar(tmp_path / "shards" / "00000.tar", members, tar_format)
    (tmp_path / "shards" / "00000_stats.json").write_text("{}")
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "shards")
    examples = read(folder, "train")
    assert {key: e["captions"] for key, e in examples.items()} == {
        "00000/000000000": ["caption 0"],
        "00000/000000001": ["caption 1"],
        "00000/more/b": ["by json"],
    }
    assert examples["00000/000000001"]["image"] == jpeg(1)
    assert lost(folder, "train") == {"without image": ["00000/more/a"]}


def test_a_broken_member_costs_one_example(tmp_path):
    members = samples(6)
    members[0] = ("000000000.jpg", b"no image")
    members[3 + 1] = ("000000001.json", b"{")
    members[6 + 1] = ("000000002.json", b"{}")
    members[6 + 2] = ("000000002.txt", b" ")
    path = tmp_path / "s.tar"
    starts = tar(path, members)
    data = bytearray(path.read_bytes())
    header = starts["000000003.jpg"]
    data[header : header + 512] = bytes(range(256)) * 2  # the size of its file is lost
    path.write_bytes(data)
    folder = build(tmp_path, "webdataset", "--shards", path)
    assert captions(folder) == ["caption 4", "caption 5"]
    assert lost(folder, "train") == {
        "broken": ["s/000000000"],
        "broken json": ["s/000000001"],
        "without captions": ["s/000000002"],
        "without image": ["s/000000003"],
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["in the data", "in a header", "between", "at the end"])
def test_a_tar_that_is_cut_off_costs_what_follows(tmp_path, where, packed):
    first, second = tmp_path / "tars" / "00000.tar", tmp_path / "tars" / "00001.tar"
    starts = tar(first, samples(4))
    tar(second, samples(1, start=9))
    header = starts["000000002.jpg"]
    cut = {"in the data": header + 600, "in a header": header + 100, "between": header}
    cut["at the end"] = starts["000000003.txt"] + 1024
    data = first.read_bytes()[: cut[where]]
    first.write_bytes(data)
    if packed:
        first.unlink()
        first.with_suffix(".tar.gz").write_bytes(gzip.compress(data))
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "tars")
    count = 4 if where == "at the end" else 2
    assert captions(folder) == [f"caption {k}" for k in [*range(count), 9]]
    (example,) = report(folder)["train"]["dropped"]["rest of a tar that is cut off"]["examples"]
    assert example["id"] == "00000"
    assert f"after 00000000{count - 1}" in example["file"]


def test_a_truncated_gzip_is_reported(tmp_path):
    tar(tmp_path / "s.tar", samples(8))
    data = gzip.compress((tmp_path / "s.tar").read_bytes())
    (tmp_path / "s.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(CutOffError):
        list(read_members(tmp_path / "s.tar.gz"))
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "s.tar.gz")
    assert 0 < len(captions(folder)) < 8 and "rest of a tar that is cut off" in lost(
        folder, "train"
    )


def test_tars_are_read_without_seeking(tmp_path, monkeypatch):
    tar(tmp_path / "s.tar", samples(3))
    reading = io.BytesIO((tmp_path / "s.tar").read_bytes())

    class Pipe:
        """A file that can do no more than a pipe."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        read, read1 = reading.read, reading.read1

    monkeypatch.setattr("cap_pretrain.data.tars.open_bounded", lambda path: Pipe())
    members = list(read_members(tmp_path / "s.tar"))
    assert members == samples(3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "no such file or folder"),
        ("empty", "no tar in it"),
        ("no.tar", "no usable image (0 of 1 kept; dropped: 1 rest of a tar that is cut off)"),
    ],
)
def test_mistakes_are_reported(tmp_path, capsys, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.tar").write_bytes(b"no tar" * 1000)
    arguments = ("--name", "mine", "--out", tmp_path / "out", "--shards", tmp_path / path)
    assert run("webdataset", *arguments) == 2
    assert message in capsys.readouterr().err


# Conceptual Captions

URLS = [f"http://example.org/{k}.jpg?size=large" for k in range(6)]
CAPTIONS = [f'{k} dogs play with " in the park' for k in range(6)]
KEPT = (0, 1, 2, 4)  # the others could not be downloaded
NAMES = {
    "row": lambda k: f"00000/{k:09}.jpg",
    "crc32": lambda k: f"training/{zlib.crc32(URLS[k].encode())}",
    "row_crc32": lambda k: f"training/{k}_{zlib.crc32(URLS[k].encode())}",
}


def by_img2dataset(tmp_path):
    """Write three images per shard, the later shard first."""
    for shard in (0, 1):
        members = [
            member
            for k in reversed(KEPT)
            if k // 3 == shard
            for member in sample(f"{shard:05}{k % 3:04}", jpeg(k), CAPTIONS[k], URLS[k])
        ]
        tar(tmp_path / "shards" / f"{1 - shard:05}.tar", members)
    return ["--shards", tmp_path / "shards"]


def by_list(tmp_path, columns, named_by, header=False):
    rows = [{"caption": c, "url": u} for c, u in zip(CAPTIONS, URLS, strict=True)]
    lines = ["\t".join(row[column] for column in columns) for row in rows]
    lines = ["\t".join(columns)] * header + lines
    (tmp_path / "list.tsv").write_text("\n".join(lines) + "\n")
    images = {NAMES[named_by](k): jpeg(k) for k in KEPT}
    images |= {"00000/000000000.json": b"{}", "00000/000000000.txt": b"x"}
    where = write_files(tmp_path / f"images_{named_by}", images)
    return ["--lists", tmp_path / "list.tsv", "--images", where, "--named_by", named_by]


def by_files(tmp_path):
    """Write what img2dataset does with --output_format files: a Parquet file beside each folder."""
    import pyarrow as pa
    from pyarrow import parquet

    where = tmp_path / "files"
    kept = {f"{k:09}": k for k in range(6)}
    for key, k in kept.items():
        if k in KEPT:
            write_files(where / "00000", dict(sample(key, jpeg(k), CAPTIONS[k], URLS[k])))
    columns = {"url": URLS, "caption": CAPTIONS, "key": list(kept)}
    parquet.write_table(pa.table(columns), where / "00000.parquet")
    return ["--tables", where, "--images", where, "--image", "key", "--named_by", "stem"]


def files(folder):
    """Return the dataset's files without its report and the metadata that names its origin."""
    return {p.name: p.read_bytes() for p in folder.glob("1.0.0/*array_record*")}


@pytest.mark.parametrize("named_by", NAMES)
@pytest.mark.parametrize("name", ["cc3m", "cc12m"])
def test_both_routes_give_the_same_dataset(tmp_path, name, named_by):
    columns = ("caption", "url") if name == "cc3m" else ("url", "caption")
    folder = build(tmp_path, name, *by_img2dataset(tmp_path))
    examples = read(folder, "train")
    assert set(examples) == {pair_id(URLS[k], [CAPTIONS[k]]) for k in KEPT}
    assert examples[pair_id(URLS[4], [CAPTIONS[4]])]["image"] == jpeg(4)
    expected = files(folder)
    listed = by_list(tmp_path, columns, named_by, header=named_by == "row")
    assert files(build(tmp_path, name, *listed, "--overwrite")) == expected != {}
    assert len(lost(folder, "train")["missing"]) == 2


def test_so_does_a_third(tmp_path):
    expected = files(build(tmp_path, "cc3m", *by_img2dataset(tmp_path)))
    folder = build(tmp_path, "parquet", *by_files(tmp_path), "--overwrite")
    assert files(folder) == expected != {}
    assert len(lost(folder, "train")["missing"]) == 2


def test_splits_may_come_by_different_routes(tmp_path, capsys):
    listed = by_list(tmp_path, ("caption", "url"), "row")
    listed[1] = f"val={listed[1]}"
    shards = by_img2dataset(tmp_path)
    folder = build(tmp_path, "cc3m", *listed, *shards)
    assert set(read(folder, "train")) == set(read(folder, "val"))
    for arguments in ([], listed[:2], listed[2:] + shards, [*by_list(tmp_path, ("url",), "row")]):
        if arguments[:1] == ["--lists"] and len(arguments) > 2:
            arguments += shards  # train twice
        assert run("cc3m", "--name", "other", "--out", tmp_path / "out", *arguments) == 2
        assert "error: --" in capsys.readouterr().err
