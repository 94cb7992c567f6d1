"""Filters of builds: what is dropped, resized and reported."""

import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image

from cap_pretrain.commands import held_out
from cap_pretrain.data import images
from cap_pretrain.data.builders import hashes
from cap_pretrain.data.builders.filters import Filters, condition
from tests.data.test_question_formats import build, lost, write_json
from tests.data.test_webdataset import captions, sample, tar
from tests.tools.test_build_dataset import jpeg, read, report, run, write_files


def picture(seed, width, height, quality=90):
    """Return a JPEG that is smooth like a photograph, and different for each seed."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def shards(tmp_path, examples):
    """Write a tar of (image, caption, JSON fields); return the options that name it."""
    members = []
    for number, (data, caption, more) in enumerate(examples):
        members += sample(f"{number:04}", data, caption, **more)
    tar(tmp_path / "s.tar", members)
    return "--shards", tmp_path / "s.tar"


def test_every_filter_is_counted_by_its_reason(tmp_path, capsys):
    fine = {"similarity": 0.4, "NSFW": "UNLIKELY"}
    examples = [
        (picture(0, 90, 60), "a dog in a park", fine),
        (picture(1, 90, 59), "a dog in a park", fine),  # too small
        (picture(2, 200, 60), "a dog in a park", fine),  # too elongated
        (picture(3, 90, 60), "dog", fine),
        (picture(4, 90, 60), "a dog " * 5, fine),
        (picture(5, 90, 60), "собака и кот в парке", fine),
        (picture(6, 90, 60), "a dog in a park", fine | {"similarity": 0.2}),
        (picture(7, 90, 60), "a dog in a park", fine | {"similarity": None}),
        (picture(8, 90, 60), "a dog in a park", fine | {"NSFW": "NSFW"}),
        (picture(0, 90, 60), "another one", fine),  # the same bytes
        (picture(0, 180, 120, 70), "a third one", fine),  # the same picture
        (picture(9, 90, 60)[:-50], "a dog in a park", fine),
        (picture(10, 60, 90), "a cat in a park", fine),
    ]
    options = "--min_size 60 --max_aspect 3 --min_words 2 --max_words 8 --min_ascii 0.5 --dedup"
    options = [*options.split(), "perceptual", "--where", "similarity>0.3", "--where", "NSFW!=NSFW"]
    folder = build(tmp_path, "webdataset", *shards(tmp_path, examples), *options)
    assert captions(folder) == ["a cat in a park", "a dog in a park"]
    expected = {
        "too small": [1],
        "too elongated": [2],
        "caption too short": [3],
        "caption too long": [4],
        "caption not in ASCII": [5],
        "not similarity>0.3": [6],
        "without similarity": [7],
        "not NSFW!=NSFW": [8],
        "duplicate image": [9],
        "near-duplicate image": [10],
        "broken": [11],
    }
    named = {reason: [f"s/{n:04}" for n in numbers] for reason, numbers in expected.items()}
    assert lost(folder, "train") == named
    found = report(folder)["train"]
    stored = len(examples[0][0]) + len(examples[12][0])
    assert found["bytes"] == {"read": stored, "stored": stored}
    assert found["caption_words"] == {"5": 2}
    assert sorted(one["id"] for one in found["samples"]) == ["s/0000", "s/0012"]
    assert "2 of 13 kept; dropped: 1 too small, " in capsys.readouterr().out
    lines = (folder / "1.0.0" / "dropped.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [one["id"] for one in listed] == [f"s/{n:04}" for n in range(1, 12)]
    assert listed[0] == {
        "split": "train",
        "reason": "too small",
        "id": "s/0001",
        "file": "s/0001.jpg",
    }


def test_columns_of_tables_are_conditions_too(tmp_path):
    scores = ["0.9", "0.1", ""]
    lines = [f"{k}.jpg,caption {k},{score}" for k, score in enumerate(scores)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption,clip score", *lines]))
    photos = write_files(tmp_path / "photos", {f"{k}.jpg": jpeg(k) for k in range(3)})
    paths = ("--tables", tmp_path / "t.csv", "--images", photos)
    folder = build(tmp_path, "csv", *paths, "--where", "clip score >= 0.5")
    assert captions(folder) == ["caption 0"]
    assert lost(folder, "train") == {
        "not clip score>=0.5": ["1.jpg"],
        "without clip score": ["2.jpg"],
    }


def test_a_caption_that_is_dropped_does_not_cost_the_others(tmp_path):
    rows = [
        {"file": "1.jpg", "text": ["a dog", "dog", "the dog"]},
        {"file": "2.jpg", "text": ["x"]},
    ]
    listed = [
        {"filename": row["file"], "split": "train", "sentences": [{"raw": t} for t in row["text"]]}
        for row in rows
    ]
    photos = write_files(tmp_path / "p", {"1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    paths = ("--annotations", write_json(tmp_path / "k.json", {"images": listed}))
    folder = build(tmp_path, "karpathy", *paths, "--images", photos, "--min_words", "2")
    (example,) = read(folder, "train").values()
    assert example["captions"] == ["a dog", "the dog"]
    found = report(folder)["train"]
    assert found["captions"] == {"kept": 2, "dropped": {"caption too short": 1}}


def test_larger_images_are_resized(tmp_path):
    sizes = {"wide": (301, 150), "high": (100, 321), "small": (90, 64), "turned": (200, 100)}
    files = {f"c/{name}.jpg": picture(k, *size) for k, (name, size) in enumerate(sizes.items())}
    turned = Image.open(io.BytesIO(files["c/turned.jpg"]))
    exif, file = turned.getexif(), io.BytesIO()
    exif[0x0112] = 6  # rotated by 90 degrees
    turned.save(file, "JPEG", exif=exif)
    files["c/turned.jpg"] = file.getvalue()
    photos = write_files(
        tmp_path / "photos.zip", files | {"c/broken.jpg": picture(9, 300, 300)[:-99]}
    )
    options = ("--resize", "64", "--quality", "80")
    folder = build(tmp_path, "image_folder", "--images", photos, *options)
    stored = {key: e["image"] for key, e in read(folder, "train").items()}
    assert {key: images.decode(data).shape for key, data in stored.items()} == {
        "c/wide.jpg": (64, 128, 3),
        "c/high.jpg": (205, 64, 3),
        "c/small.jpg": (64, 90, 3),
        "c/turned.jpg": (128, 64, 3),
    }
    assert stored["c/small.jpg"] == files["c/small.jpg"]
    found = report(folder)["train"]
    assert found["resized"] == 3 and found["reencoded"]["count"] == 0
    assert found["bytes"]["stored"] == sum(map(len, stored.values())) < found["bytes"]["read"]
    assert lost(folder, "train") == {"broken": ["c/broken.jpg"]}
    for key, data in stored.items():
        small = Image.fromarray(images.decode(files[key])).resize(images.decode(data).shape[1::-1])
        assert np.abs(np.asarray(small).astype(int) - images.decode(data)).mean() < 4


def test_images_that_are_held_out(tmp_path, capsys):
    """Held out are the images of another dataset, and ids from a handwritten list."""
    test = {f"c/{k}.jpg": picture(k, 160, 120) for k in range(2)}
    where = write_files(tmp_path / "test", test)
    arguments = ("--name", "coco", "--out", tmp_path / "out", "--images", f"test={where}")
    assert run("image_folder", *arguments) == 0
    made = tmp_path / "coco.held_out"
    dataset = str(tmp_path / "out" / "coco")
    assert held_out.main([dataset, "--splits", "test", "--to", str(made)]) == 0
    assert "2 images listed" in capsys.readouterr().out
    own = tmp_path / "own.txt"
    own.write_text("# mine\n\nid s/0003\n")
    examples = [
        (test["c/0.jpg"], "the same bytes", {}),
        (picture(1, 80, 60, 60), "the same picture", {}),
        (picture(2, 80, 60), "another", {}),
        (picture(3, 80, 60), "by its id", {}),
    ]
    options = ("--held_out", made, own)
    folder = build(tmp_path, "webdataset", *shards(tmp_path, examples), *options)
    assert captions(folder) == ["another"]
    assert lost(folder, "train") == {"held out": ["s/0000", "s/0001", "s/0003"]}


@pytest.mark.parametrize(("scale", "quality"), [(0.5, 75), (0.7, 40), (1.5, 90)])
def test_a_copy_has_nearly_the_same_perceptual_hash_and_others_have_not(scale, quality):
    originals = [images.decode(picture(seed, 200, 150)) for seed in range(30)]
    own = np.array([hashes.perceptual(pixels) for pixels in originals], np.uint64)
    for pixels, expected in zip(originals, own, strict=True):
        size = round(200 * scale), round(150 * scale)
        file = io.BytesIO()
        Image.fromarray(pixels).resize(size).save(file, "JPEG", quality=quality)
        copy = hashes.perceptual(images.decode(file.getvalue()))
        assert np.bitwise_count(expected ^ np.uint64(copy)) <= hashes.NEAR
    apart = np.bitwise_count(own[:, None] ^ own[None])[~np.eye(30, dtype=bool)]
    assert apart.min() > 2 * hashes.NEAR


def test_nearly_repeated_hashes_are_those_of_a_search_through_all():
    rng = np.random.default_rng(0)
    some = rng.integers(0, 2**64, 40, dtype=np.uint64)
    flips = [
        sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 9), False)) for _ in range(400)
    ]
    many = rng.choice(some, 400) ^ np.array(flips, np.uint64)
    apart = np.bitwise_count(many[:, None] ^ many[None])
    expected = [bool((apart[i, :i] <= hashes.NEAR).any()) for i in range(400)]
    found = hashes.nearly_repeated(many)
    assert found.tolist() == expected and 100 < sum(expected) < 390
    assert hashes.repeated(np.array([5, 3, 5, 5, 1], np.uint64)).tolist() == [0, 0, 1, 1, 0]
    assert hashes.nearly_repeated(many[:1]).tolist() == [False]
    assert hashes.nearly_repeated(many[:0]).tolist() == []


@pytest.mark.parametrize(
    ("text", "fields", "problem"),
    [
        ("a >= 0.5", {"a": "0.5"}, ""),
        ("a<1e3", {"a": 1000}, "not a<1e3"),
        ("a==yes", {"a": "yes"}, ""),
        ("a==1", {"a": 1.0}, ""),
        ("a!=yes", {"a": "no"}, ""),
        ("a>1", {"a": "much"}, "without a"),
        ("a>1", {}, "without a"),
        ("a==", {"a": ""}, ""),
    ],
)
def test_conditions(text, fields, problem):
    assert Filters(where=(condition(text),)).known_problem("x", fields) == problem


class _Balance(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.images, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_ten_of_what_is_kept(tmp_path):
    examples = [(picture(k, 300, 200), f"<b>{k}</b> & more", {}) for k in range(14)]
    folder = build(tmp_path, "webdataset", *shards(tmp_path, examples))
    text = (folder / "1.0.0" / "report.html").read_text()
    page = _Balance()
    page.feed(text)
    assert not page.open and len(page.images) == 10
    assert all(image.startswith("data:image/jpeg;base64,") for image in page.images)
    assert page.text.count("</b> & more") == 10, "escaped"
    assert len(report(folder)["train"]["samples"]) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--where similarity", "--where 'similarity': write FIELD, one of >= <= == != > <"),
        ("--min_size 0", "--min_size: 0 must be at least 1"),
        ("--quality 101", "--quality: 101 must be 1 to 100"),
        ("--max_aspect wide", "'wide' is not a number"),
        ("--dedup all", "--dedup: invalid choice"),
        ("--held_out none.txt", "--held_out none.txt: cannot be read"),
        ("--held_out bad.txt", "line 2 begins with 'exat'; write 'id ID', 'exact HASH' or"),
        ("--held_out worse.txt", "line 1 has 'xyz', which is not a hexadecimal hash"),
        (
            "--min_words 2",
            "--min_words and similar options filter captions, which this format lacks",
        ),
        ("--workers 0", "--workers 0: must be at least 1"),
        ("--where x>1", "no usable image (0 of 1 kept; dropped: 1 without x)"),
    ],
)
def test_mistakes_are_reported(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    photos = write_files(tmp_path / "photos", {"c/1.jpg": jpeg(1)})
    (tmp_path / "bad.txt").write_text("id 5\nexat 00ff\n")
    (tmp_path / "worse.txt").write_text("exact xyz\n")
    arguments = ("--name", "mine", "--out", "out", "--images", photos, *options.split())
    assert run("image_folder", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) <= 2
    assert not list(tmp_path.glob("out/*"))
