"""Tests of tools/build_dataset.py."""

import fcntl
import gzip
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.core import shuffle

from cap_pretrain.commands import build_dataset
from cap_pretrain.data import images
from cap_pretrain.data.builders import base
from cap_pretrain.data.builders.formats.image_folder import class_names, classified
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.errors import UserError


def jpeg(seed: int, mode: str = "RGB", kind: str = "JPEG", size: int = 24) -> bytes:
    """Return a file of a small smooth image that differs by seed."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((size, size))
    file = io.BytesIO()
    image.convert(mode).save(file, kind)
    return file.getvalue()


def write_files(where: Path, files: dict[str, bytes]) -> Path:
    """Write a zip if `where` ends in .zip, otherwise a folder."""
    if where.suffix == ".zip":
        with zipfile.ZipFile(where, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(data)
    return where


def write_captions(path: Path, files: dict[int, str], captions: list[tuple[int, str]]) -> Path:
    content = {
        "images": [{"id": i, "file_name": name} for i, name in files.items()],
        "annotations": [{"image_id": i, "caption": caption} for i, caption in captions],
    }
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def run(*arguments) -> int:
    """Return the exit status of the program, also if argparse exits."""
    try:
        return build_dataset.main([str(a) for a in arguments])
    except SystemExit as error:
        return error.code


def read(path: Path, split: str) -> dict[str, dict]:
    return {e["id"]: e for e in open_source(str(path), split, image_size=8)}


def report(path: Path) -> dict:
    return json.loads((path / "1.0.0" / "report.json").read_text())["splits"]


@pytest.fixture
def captioned(tmp_path):
    """Return arguments that build a dataset of three captioned images."""
    photos = write_files(tmp_path / "photos", {f"{i}.jpg": jpeg(i) for i in range(3)})
    annotations = write_captions(
        tmp_path / "captions.json",
        {i: f"{i}.jpg" for i in range(3)},
        [(i, f" caption {i}{letter}\n") for i in range(3) for letter in "ab"],
    )
    arguments = ["--annotations", annotations, "--images", photos]
    return ["captions_json", "--name", "mine", "--out", tmp_path / "out", *arguments]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "mine"


def test_captions_json_keeps_bytes_captions_and_ids(captioned, out, capsys):
    assert run(*captioned) == 0
    assert "train: 3 of 3 kept\n" in capsys.readouterr().out
    examples = read(out, "train")
    assert set(examples) == {"0", "1", "2"}
    for i in range(3):
        assert examples[str(i)]["image"] == jpeg(i)
        assert examples[str(i)]["captions"] == [f"caption {i}a", f"caption {i}b"]
    assert list(out.parent.iterdir()) == [out], "the work folder is gone"
    assert "tensorflow" not in sys.modules


def test_captions_json_of_several_splits_from_zips_with_folders(tmp_path, out):
    arguments = []
    for split, ids in (("train", (1, 2)), ("val", (3,)), ("test", (1,))):
        names = {i: f"{i}.jpg" for i in ids}
        write_captions(tmp_path / f"{split}.json.gz", names, [(i, split) for i in ids])
        write_files(tmp_path / f"{split}.zip", {f"{split}2014/{i}.jpg": jpeg(i) for i in ids})
    for flag, suffix in (("--annotations", "json.gz"), ("--images", "zip")):
        arguments += [flag, *(f"{s}={tmp_path}/{s}.{suffix}" for s in ("train", "val", "test"))]
    assert run("captions_json", "--name", "mine", "--out", out.parent, *arguments) == 0
    for split, ids in (("train", "12"), ("val", "3"), ("test", "1")):
        examples = read(out, split)
        assert set(examples) == set(ids)
        assert all(examples[i]["captions"] == [split] for i in ids)
        assert all(examples[i]["image"] == jpeg(int(i)) for i in ids)


def test_drops_are_counted_by_reason_and_listed(tmp_path, out):
    files = {
        "good.jpg": jpeg(0),
        "cut.jpg": jpeg(1)[:-100],
        "text.jpg": b"not an image at all",
        "empty.jpg": b"",
        "silent.jpg": jpeg(2),
        "twice.jpg": jpeg(3),
    }
    names = dict(enumerate([*files, "absent.jpg"]))
    captions = [(i, "  " if name == "silent.jpg" else name) for i, name in names.items()]
    path = write_captions(tmp_path / "c.json", names, [*captions, (99, "of no image")])
    content = json.loads(path.read_text())
    content["images"].append({"id": 5, "file_name": "twice.jpg"})
    path.write_text(json.dumps(content))
    photos = write_files(tmp_path / "p.zip", files)
    arguments = ["--annotations", f"dev={path}", "--images", photos]
    assert run("captions_json", "--name", "mine", "--out", out.parent, *arguments) == 0

    result = report(out)["dev"]
    assert (result["candidates"], result["kept"]) == (9, 2)
    dropped = {
        reason: {example.get("file", example["id"]) for example in drop["examples"]}
        for reason, drop in result["dropped"].items()
    }
    assert dropped == {
        "broken": {"cut.jpg", "text.jpg", "empty.jpg"},
        "missing": {"absent.jpg"},
        "without captions": {"silent.jpg"},
        "duplicate id": {"twice.jpg"},
        "captioned but not listed": {"99"},
    }
    assert sum(drop["count"] for drop in result["dropped"].values()) == 7
    whys = {e["file"]: e["why"] for e in result["dropped"]["broken"]["examples"]}
    assert "truncated" in whys["cut.jpg"] and whys["empty.jpg"] == "empty file"
    assert set(read(out, "dev")) == {"0", "5"}


def test_images_that_tfds_cannot_read_are_reencoded(tmp_path, out):
    import tensorflow_datasets as tfds

    odd = {
        "a/cmyk.jpg": jpeg(1, "CMYK"),
        "a/photo.webp": jpeg(2, kind="WEBP"),
        "b/alpha.png": jpeg(3, "RGBA", "PNG"),
    }
    plain = {"b/grey.jpg": jpeg(4, "L"), "b/rgb.png": jpeg(5, kind="PNG")}
    photos = write_files(tmp_path / "photos", {**odd, **plain})
    assert run("image_folder", "--name", "mine", "--out", out.parent, "--images", photos) == 0
    result = report(out)["train"]
    assert result["kept"] == 5
    assert result["reencoded"] == {"count": 3, "files": sorted(odd)}
    stored = read(out, "train")
    assert all(stored[name]["image"] == data for name, data in plain.items())

    decoded = tfds.builder_from_directory(out / "1.0.0").as_data_source("train")
    for example in decoded:
        name = example["id"].decode()
        ours = images.decode({**odd, **plain}[name]).astype(int)
        assert example["image"].shape == ours.shape
        assert np.abs(example["image"] - ours).mean() < 5


@pytest.mark.parametrize("prefix", ["", "{split}/", "imagenette2/{split}/"])
@pytest.mark.parametrize("where", ["photos", "photos.zip"])
def test_image_folder_takes_the_class_from_the_folder(tmp_path, out, prefix, where):
    arguments = []
    for split in ("train", "val"):
        names = [f"{wnid}/{i}.JPEG" for wnid in ("n02", "n01") for i in range(2)]
        files = {prefix.format(split=split) + n: jpeg(i) for i, n in enumerate(names)}
        files["README.txt" if prefix == "" else f"{prefix}README.txt".format(split=split)] = b"x"
        files["__MACOSX/._0.JPEG"] = files[".hidden/0.jpg"] = b"x"
        arguments.append(f"{split}={write_files(tmp_path / (split + where), files)}")
    (tmp_path / "classes.json").write_text('{"n01": "tench", "n02": "dog", "n03": "unused"}')
    arguments += ["--classes", tmp_path / "classes.json"]
    name = ("--name", "mine", "--out", out.parent)
    assert run("image_folder", *name, "--images", *arguments) == 0
    for split in ("train", "val"):
        source = open_source(str(out), split, image_size=8)
        assert source.class_names == ["tench", "dog"]
        assert len(source) == 4
        for example in source:
            wnid = example["id"].split("/")[-2]
            assert source.class_names[example["label"]] == {"n01": "tench", "n02": "dog"}[wnid]
            assert example["captions"] == []


def test_one_archive_may_hold_all_splits(tmp_path, out):
    names = ["root/train/cat/1.jpg", "root/train/dog/2.jpg", "root/val/dog/3.jpg", "root/4.jpg"]
    photos = write_files(tmp_path / "all.zip", {n: jpeg(i) for i, n in enumerate(names)})
    splits = [f"train={photos}", f"val={photos}"]
    assert run("image_folder", "--name", "mine", "--out", out.parent, "--images", *splits) == 0
    assert set(read(out, "train")) == set(names[:2])
    assert set(read(out, "val")) == {names[2]}


def test_files_in_no_class_folder_are_counted():
    names = ["cat/1.jpg", "cat/more/2.jpg", "3.jpg"]
    assert classified(names, "train") == [(names[0], "cat"), (names[1], "cat"), (names[2], "")]


def test_equal_class_names_get_their_folder(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text('{"n1": "crane", "n2": "crane", "n3": "tench"}')
    names = class_names(["n1", "n2", "n3"], path)
    assert names == {"n1": "crane (n1)", "n2": "crane (n2)", "n3": "tench"}
    with pytest.raises(UserError, match="no name for the folder 'n4'"):
        class_names(["n4"], path)


def test_a_finished_dataset_is_replaced_only_with_overwrite(captioned, out, capsys):
    assert run(*captioned) == 0
    before = {p.name: p.read_bytes() for p in (out / "1.0.0").iterdir()}
    assert run(*captioned) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*captioned, "--overwrite") == 0
    after = {p.name: p.read_bytes() for p in (out / "1.0.0").iterdir()}
    assert before == after, "the same input gives the same bytes"
    assert list(out.parent.iterdir()) == [out]


KILLED = """
import os, signal, sys
from cap_pretrain.data import images
from cap_pretrain.commands import build_dataset
images.to_plain = lambda data: os.kill(os.getpid(), signal.SIGKILL)
build_dataset.main(sys.argv[1:])
"""


def test_a_killed_build_leaves_nothing_finished_and_the_next_cleans_up(captioned, out):
    command = [sys.executable, "-c", KILLED, *map(str, captioned)]
    root = Path(build_dataset.__file__).parents[2]
    assert subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}).returncode == -9
    left = list(out.parent.iterdir())
    assert [p.name for p in left] == [".mine.building"]
    with pytest.raises(UserError):
        read(out, "train")
    with pytest.raises(UserError, match="no dataset_info.json"):
        read(out.parent, "train")
    assert run(*captioned) == 0
    assert len(read(out, "train")) == 3
    assert list(out.parent.iterdir()) == [out]


def test_the_next_build_resumes_after_ctrl_c(captioned, out, monkeypatch, capsys):
    def interrupt(self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(base.ImageDataset, "write_report", interrupt)
        assert run(*captioned) == 130
    assert capsys.readouterr().err.strip() == "interrupted: run again to resume"
    assert [p.name for p in out.parent.iterdir()] == [".mine.building"]
    monkeypatch.setattr(images, "to_plain", None)  # no image is read again
    assert run(*captioned) == 0
    assert len(read(out, "train")) == 3
    assert list(out.parent.iterdir()) == [out]


def test_two_builds_of_one_dataset_do_not_mix(captioned, out, capsys):
    work = out.parent / ".mine.building"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(*captioned) == 2
    assert "another process" in capsys.readouterr().err


CAPTIONS = "captions_json --images photos --annotations "
MISTAKES = [
    (CAPTIONS + "none.json", "none.json: no such file"),
    (CAPTIONS + "text.json", "text.json: is not JSON"),
    (CAPTIONS + "list.json", "no list 'images' in it (found: list)"),
    (CAPTIONS + "no_annotations.json", "no list 'annotations' in it (found: images, info)"),
    (CAPTIONS + "boxes.json", "lacks image_id or caption (found: image_id, bbox)"),
    (CAPTIONS + "no_names.json", "lacks id or file_name"),
    (CAPTIONS + "cut.json.gz", "cut.json.gz: cannot be read"),
    (CAPTIONS + "all=good.json", "'all'"),
    (CAPTIONS + "good.json good.json", "given twice"),
    (CAPTIONS + "good.json --name My-Data", "--name 'My-Data'"),
    (CAPTIONS + "good.json --out good.json/x", "cannot be written"),
    (CAPTIONS + "good.json --images none", "none: no such folder or zip"),
    (CAPTIONS + "good.json --images a.tar", "neither a folder nor a zip"),
    (CAPTIONS + "good.json --images broken", "split 'train': no usable image (0 of 1 kept"),
    (CAPTIONS + "val=good.json --images train=photos", "--images: none for split 'val'"),
    (CAPTIONS + "good.json --images photos vla=photos", "--annotations: none for split 'vla'"),
    ("image_folder --images photos", "not in class folders"),
    ("image_folder --images empty", "no images in it"),
    ("image_folder --images broken", "1 broken"),
    ("image_folder --images broken --classes text.json", "text.json: is not JSON"),
    ("image_folder --images broken --classes list.json", "must be an object"),
    ("image_folder", "--images"),
    ("captoins_json", "captions_json"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_mistakes_exit_2_with_a_line_or_two(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    write_files(Path("photos"), {"1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    write_files(Path("broken"), {"1.jpg": b"x", "cat/2.jpg": b"x"})
    Path("empty").mkdir()
    good = write_captions(Path("good.json"), {1: "1.jpg"}, [(1, "one")])
    Path("cut.json.gz").write_bytes(gzip.compress(good.read_bytes())[:-20])
    Path("a.tar").write_bytes(bytes(2000))
    Path("text.json").write_text("no json")
    Path("list.json").write_text("[1]")
    Path("no_annotations.json").write_text('{"images": [], "info": {}}')
    boxes = {"images": [], "annotations": [{"image_id": 1, "bbox": []}]}
    Path("boxes.json").write_text(json.dumps(boxes))
    Path("no_names.json").write_text('{"images": [{"id": 1}], "annotations": []}')

    name, *arguments = command.split()
    assert run(name, "--name", "mine", "--out", "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()) <= 2
    assert not list(tmp_path.glob("out/*")), "nothing is left behind"


def test_without_a_format_the_formats_are_named(capsys):
    assert run() == 2
    assert "FORMAT" in capsys.readouterr().err


def test_candidates_are_checked_in_order_and_not_all_at_once(monkeypatch):
    monkeypatch.setattr(base, "_AHEAD", 5)
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    for done, (item, result) in enumerate(base._map_ahead(lambda i: i * i, items())):
        assert (item, result) == (done, done * done)
        assert len(taken) <= done + 5


def test_splits_larger_than_memory_are_shuffled_alike(captioned, tmp_path, monkeypatch):
    # Such as a split of more than a gigabyte; it works without TensorFlow.
    assert run(*captioned) == 0
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 0)
    assert run(*captioned, "--name", "large") == 0

    def records(name):
        source = open_source(str(tmp_path / "out" / name), "train", image_size=8)
        return [source[i] for i in range(len(source))]

    assert records("large") == records("mine")
    assert not list((tmp_path / "out" / "large").rglob("*.tmp"))
