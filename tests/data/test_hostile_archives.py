"""Tars, zips and folders made to exhaust memory or time: read under limits, losses counted."""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cap_pretrain import files
from cap_pretrain.data import tar_examples
from cap_pretrain.data.builders import rows
from cap_pretrain.data.builders.files import MAX_BYTES, READ_ERRORS, open_files
from cap_pretrain.data.builders.formats import webdataset
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.tars import CutOffError, read_members
from cap_pretrain.errors import UserError
from tests.data.test_question_formats import build, lost
from tests.data.test_webdataset import captions, sample, samples, tar
from tests.tools.test_build_dataset import jpeg, read, report, write_files

ROOT = Path(__file__).parents[2]
BOUNDED = """
import resource, sys, time
from pathlib import Path
from cap_pretrain.commands import build_dataset
import tensorflow_datasets, cap_pretrain.data.builders.build

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

start, begun = peak(), time.monotonic()
for arguments in Path(sys.argv[1]).read_text().splitlines():
    print("exit", build_dataset.main(arguments.split("\\t")))
print("MB", peak() - start)
print("seconds", time.monotonic() - begun)
"""


def build_bounded(tmp_path, *commands) -> tuple[list[int], float, float]:
    """Build datasets in another process; return exit statuses, MB above the start, and seconds."""
    lines = [
        "\t".join([str(a) for a in (*command, "--name", f"d{k}", "--out", tmp_path / "out")])
        for k, command in enumerate(commands)
    ]
    (tmp_path / "commands").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, tmp_path / "commands"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    words = done.stdout.split()
    exits = [int(words[k + 1]) for k, word in enumerate(words) if word == "exit"]
    return exits, float(words[words.index("MB") + 1]), float(words[words.index("seconds") + 1])


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def zeros_gz(path: Path, start: bytes, count: int) -> Path:
    """Write a gzip of `start` and `count` zeros, quickly."""
    part = gzip.compress(bytes(2**24))
    with path.open("wb") as file:
        file.write(gzip.compress(start))
        for _ in range(-(-count // 2**24)):
            file.write(part)
    return path


@pytest.mark.slow
def test_archives_of_any_claims_are_read_within_half_a_gigabyte_and_a_minute(tmp_path):
    starts = tar(tmp_path / "good.tar", samples(2))
    whole = (tmp_path / "good.tar").read_bytes()
    second, end = starts["000000001.jpg"], starts["000000001.txt"] + 1024
    named, paxed = tmp_path / "name.tar.gz", tmp_path / "pax.tar.gz"
    zeros_gz(named, header("x", 2**30, tarfile.GNUTYPE_LONGNAME), 2**30)
    zeros_gz(paxed, whole[:end] + header("x", 2**30, tarfile.XHDTYPE), 2**30)
    claims = tmp_path / "claims.tar"
    claims.write_bytes(whole[:second] + header("y.jpg", 2**40) + whole[second:])
    large = tmp_path / "large.tar"
    with large.open("wb") as file:  # with holes: it takes no space
        for name in ("a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "b.jpg", "c.jpg", "d.jpg"):
            file.write(header(name, 2**26))
            file.seek(2**26, os.SEEK_CUR)
        file.write(whole)
    photos = tmp_path / "photos.zip"
    with zipfile.ZipFile(photos, "w") as archive:
        sizes = {zipfile.ZIP_DEFLATED: 28, zipfile.ZIP_BZIP2: 22, zipfile.ZIP_LZMA: 22}
        for method, size in sizes.items():
            archive.writestr(f"c/{method}.jpg", bytes(2**size), method, 1)
        archive.writestr("c/good.jpg", jpeg(1))
    lists, line, rows = tmp_path / "lists.json.gz", tmp_path / "line.tsv.gz", tmp_path / "rows.tsv"
    with gzip.open(lists, "wb", 1) as file:
        file.write(b'{"images": [' + b"[]," * 2**25 + b"[]]}")
    with gzip.open(line, "wb", 1) as file:
        file.write(b"image\tcaption\n0.jpg\ta dog\n1.jpg\t")
        for _ in range(20):
            file.write(b"word " * 2**20)
        file.write(b"\n2.jpg\ta cat\n")
    rows.write_bytes(b"image\tcaption\n1.jpg\ta dog\n" + b"0.jpg\ta cat\n" * 10_050)
    named_in = write_files(tmp_path / "photos", {f"{k}.jpg": jpeg(k) for k in range(3)})
    tables = [["table", "--tables", path, "--images", named_in] for path in (line, rows)]
    annotations = ["captions_json", "--annotations", lists, "--images", named_in]
    shards = [["webdataset", "--shards", path] for path in (named, paxed, claims, large)]
    exits, megabytes, seconds = build_bounded(
        tmp_path, *shards, ["image_folder", "--images", photos], annotations, *tables
    )
    assert exits == [2, 0, 0, 0, 0, 2, 0, 0]
    assert megabytes < 500 and seconds < 60
    folders = [tmp_path / "out" / f"d{k}" for k in (1, 2, 3, 4, 6, 7)]
    cut = ["rest of a tar that is cut off"]
    found = [list(report(folder)["train"]["dropped"]) for folder in folders]
    assert found[:4] == [cut, cut, ["without captions"], ["broken"]]
    assert found[4:] == [["not a row"], ["too many rows of an image"]]
    kept = [report(folder)["train"]["kept"] for folder in folders]
    assert kept == [2, 1, 2, 1, 2, 2]
    assert report(folders[3])["train"]["dropped"]["broken"]["count"] == 3
    assert report(folders[5])["train"]["dropped"]["too many rows of an image"]["count"] == 50


def test_members_beyond_their_limit_are_counted(tmp_path):
    members = [
        *sample("a", jpeg(1), "a" * 2**22 + "b"),
        *sample("b", jpeg(2), "caption b"),
        ("c.jpg", jpeg(3)),
        ("c.mp4", bytes(2**23)),  # not needed
        ("c.txt", b"caption c"),
    ]
    tar(tmp_path / "s.tar", members)
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "s.tar")
    assert captions(folder) == ["caption b", "caption c"]
    assert lost(folder, "train") == {"member too large": ["s/a"]}


def test_the_limit_of_a_member_holds_before_it_is_read(tmp_path):
    start = header("a.jpg", MAX_BYTES + 1)
    (tmp_path / "s.tar").write_bytes(start + header("b", 3) + b"abc".ljust(512, b"\0"))
    with pytest.raises(CutOffError, match="unexpected end"):
        list(read_members(tmp_path / "s.tar"))
    tar(tmp_path / "t.tar", [("a", b"abcd"), ("b", b"abc"), ("c", b"")])
    assert list(read_members(tmp_path / "t.tar", lambda _: 3)) == [
        ("a", None),
        ("b", b"abc"),
        ("c", b""),
    ]


@pytest.mark.parametrize(
    "tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]
)
def test_intact_tars_are_read_as_by_tarfile(tmp_path, tar_format):
    rng = np.random.default_rng(0)
    members = []
    for k in range(60):
        depth = int(rng.integers(1, 4 if tar_format == tarfile.USTAR_FORMAT else 9))
        name = "/".join("é"[k % 2 :] + "d" * int(rng.integers(1, 60)) for _ in range(depth))
        members.append((f"{name[:200]}{k}.jpg", rng.bytes(int(rng.integers(0, 3000)))))
    tar(tmp_path / "s.tar", members, tar_format)
    with tarfile.open(tmp_path / "s.tar", "a") as archive:  # kinds without content
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"kind{kind}")
            info.type, info.linkname = kind, "a" * 150
            archive.addfile(info)
        info = tarfile.TarInfo("last")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"last"))
    assert list(read_members(tmp_path / "s.tar")) == [*members, ("last", b"last")]


def test_files_that_are_no_files_are_counted(tmp_path):
    photos = write_files(tmp_path / "photos", {"c/1.jpg": jpeg(1)})
    os.mkfifo(photos / "c" / "2.jpg")
    (photos / "c" / "3.jpg").symlink_to("/dev/zero")
    (photos / "c" / "4.jpg").symlink_to("nowhere")
    (photos / "c" / "5.jpg").symlink_to("5.jpg")
    folder = build(tmp_path, "image_folder", "--images", photos)
    assert set(read(folder, "train")) == {"c/1.jpg"}
    assert lost(folder, "train") == {
        "broken": ["c/2.jpg", "c/3.jpg", "c/5.jpg"],
        "missing": ["c/4.jpg"],
    }


def test_a_folder_is_read_once_whatever_links_to_it(tmp_path):
    photos = write_files(tmp_path / "photos", {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})
    outside = write_files(tmp_path / "outside", {"3.jpg": jpeg(3), "deep/4.jpg": jpeg(4)})
    (photos / "a" / "loop").symlink_to("..")
    (photos / "b" / "other").symlink_to("../a")
    (photos / "b" / "self").symlink_to(".")
    (photos / "c").symlink_to(outside)  # read, since only this link leads there
    (outside / "back").symlink_to(photos)
    folder = build(tmp_path, "image_folder", "--images", photos)
    expected = {"a/1.jpg", "b/2.jpg", "c/3.jpg", "c/deep/4.jpg"}
    assert set(read(folder, "train")) == expected
    links = {"a/loop", "b/other", "b/self", "c/back"}
    (why,) = lost(folder, "train")
    assert set(lost(folder, "train")[why]) == links and "link" in why


def test_a_fifo_in_place_of_an_archive_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(CutOffError, match="regular"):
        list(read_members(tmp_path / "s.tar"))


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Return the data with bytes changed, cut, doubled or replaced by extreme ones."""
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        start = int(rng.integers(len(found)))
        length = int(min(rng.choice([1, 4, 12, 512, 2048]), len(found) - start))
        part = found[start : start + length]
        fresh = [rng.bytes(length), bytes(length), b"\xff" * length, b"7" * length, part * 2, b""]
        found[start : start + length] = fresh[rng.integers(len(fresh))]
        found = found or bytearray(b"\0")
    return bytes(found)


def with_checksums(data: bytes) -> bytes:
    """Return a tar whose headers have correct checksums again."""
    found = bytearray(data)
    for start in range(0, len(found) - 511, 512):
        if found[start + 257 : start + 262] == b"ustar":
            found[start + 148 : start + 156] = b" " * 8
            total = sum(found[start : start + 512])
            found[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(found)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_mutated_tars_give_their_members_or_one_error(tmp_path, packed):
    rng = np.random.default_rng(0)
    wholes = []
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar(tmp_path / "s.tar", [*samples(2), ("d" * 150 + ".jpg", b"x" * 700)], tar_format)
        wholes.append((tmp_path / "s.tar").read_bytes())
    for number in range(2000):
        data = mutated(rng, wholes[number % 2])
        data = with_checksums(data) if number % 3 else data
        if packed:
            data = gzip.compress(data, 1)
            data = mutated(rng, data) if number % 2 else data
        (tmp_path / "s.tar").write_bytes(data)
        with contextlib.suppress(CutOffError):
            for name, content in read_members(tmp_path / "s.tar"):
                assert isinstance(name, str) and (content is None or len(content) < 2**20)


@pytest.mark.slow
def test_mutated_zips_give_files_or_read_errors(tmp_path):
    rng = np.random.default_rng(0)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for method in (0, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            archive.writestr(f"c/{method}.jpg", jpeg(method), method)
    outcomes = set()
    for number in range(2500):
        path = tmp_path / f"{number % 2}.zip"
        path.write_bytes(mutated(rng, packed.getvalue()))
        try:
            archive = open_files(path)
        except UserError:
            outcomes.add("refused")
            continue
        for name in archive.names():
            try:
                assert len(archive.read(name)) < 2**24
                outcomes.add("read")
            except READ_ERRORS:
                outcomes.add("broken")
    assert outcomes == {"refused", "read", "broken"}


@pytest.mark.slow
def test_mutated_tars_and_indexes_are_trained_on_or_refused(tmp_path):
    """Of each tar, and of each index of an intact one, every example is read, or is an error."""
    rng = np.random.default_rng(0)
    tar(tmp_path / "t" / "s.tar", samples(3))
    whole = (tmp_path / "t" / "s.tar").read_bytes()
    name, options = f"wds:{tmp_path / 't'}", {"image_size": 8, "cache": str(tmp_path / "cache")}
    list(open_source(name, "train", **options))
    kept = tmp_path / "t" / ".cap_index" / "s.tar.index"
    index = kept.read_bytes()
    read, errors = 0, []
    for number in range(600):
        if number % 2:
            data = mutated(rng, whole)
            (tmp_path / "t" / "s.tar").write_bytes(with_checksums(data) if number % 3 else data)
        else:
            (tmp_path / "t" / "s.tar").write_bytes(whole)
            stamps = json.dumps([str((tmp_path / "t" / "s.tar").stat().st_mtime_ns)]).encode()
            line, entries = index.split(b"\n", 1)
            about = json.loads(line) | {"stamps": json.loads(stamps)}
            kept.write_bytes(json.dumps(about).encode() + b"\n" + mutated(rng, entries))
        try:
            for example in open_source(name, "train", **options):
                assert len(example["image"]) < 2**20
                read += 1
        except UserError as error:
            errors.append(str(error))
    assert read > 300 and len(errors) > 50
    assert not any("\n" in error for error in errors)


def test_json_is_refused_by_the_memory_that_it_would_take(tmp_path):
    captions = [{"image_id": k, "id": k, "caption": f"a dog in park {k}"} for k in range(50_000)]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(captions).encode()))
    assert files.read_json(path) == captions
    for text in (b"[" + b"[]," * 2**23 + b"1]", b"[" + b"{}," * 2**22 + b"1]"):
        path.write_bytes(gzip.compress(text))
        with pytest.raises(UserError, match="would take over"):
            files.read_json(path)
        path.write_bytes(gzip.compress(text[: 2**18] + b"1]"))
        assert len(files.read_json(path)) > 2**15


@pytest.mark.slow
def test_every_key_of_a_tar_is_a_candidate(tmp_path, monkeypatch):
    """Whatever its files are: kept or dropped, it is counted once."""
    monkeypatch.setattr(tar_examples, "MAX_TEXT", 5000)
    monkeypatch.setattr(tar_examples, "MAX_BYTES", 20_000)
    rng = np.random.default_rng(0)
    texts = [b"a dog", b"", b"\xff\xfe", b"x" * 6000, b"{", b'{"caption": "b"}', b"[" * 5000]
    pictures = [jpeg(1), b"", b"no picture", bytes(30_000), jpeg(2)[:-60]]
    contents = {".jpg": pictures, ".PNG": pictures, ".txt": texts, ".json": texts, ".cls": texts}
    reasons = set()
    for number in range(2000):
        members, keys = [], [f"{number}-{k}" for k in range(int(rng.integers(1, 6)))]
        for key in keys:
            suffixes = rng.permutation(list(contents))[: int(rng.integers(1, 6))]
            for suffix in map(str, suffixes):
                content = contents[suffix]
                members.append((key + suffix, content[rng.integers(len(content))]))
        tar(tmp_path / "s.tar", members, int(rng.integers(3)))
        found = list(webdataset.candidates("s", tmp_path / "s.tar"))
        assert [one.id for one in found] == [f"s/{key}" for key in keys]
        reasons |= {one.problem for one in found}
    expected = {"", "broken json", "member too large", "without captions", "without image"}
    assert expected <= reasons


def test_parquet_is_read_in_batches_of_bounded_size(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    pictures = [np.random.default_rng(k).bytes(2**16) for k in range(40)]
    table = pa.table({"image": pictures, "caption": [f"number {k}" for k in range(40)]})
    parquet.write_table(table, path)
    monkeypatch.setattr(rows, "_BATCH_BYTES", 2**18)
    sizes = []
    whole = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda *args, **options: sizes.append(options["batch_size"]) or whole(*args, **options),
    )
    read = [row["image"] for row in rows.read_rows(path, rows.Form(), ["image"])]
    assert read == pictures and 1 <= sizes[0] <= 4
    large = pa.table({"image": [bytes(70_000_000)]})
    parquet.write_table(large, path, use_dictionary=False, compression="zstd")
    with pytest.raises(UserError, match="over 200 times its size"):
        rows.count_rows(path)
