"""Pictures with damage that costs no pixel are read; those that would exhaust memory are not."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cap_pretrain.cli.captioning import read_image
from cap_pretrain.commands import held_out
from cap_pretrain.data import image_files, images
from cap_pretrain.data.builders.formats import nlvr2
from cap_pretrain.data.builders.formats.nlvr2 import side_by_side
from tests.data.numbers import Numbers
from tests.data.test_images import FILES, encode, photograph, picture, rotated_jpeg
from tests.data.test_question_formats import build, lost
from tests.data.test_webdataset import tar
from tests.tools.test_build_dataset import jpeg, read, report, write_captions, write_files

ROOT = Path(__file__).parents[2]
JPEG = encode(photograph(48, 64), "JPEG", quality=95)
PROGRESSIVE = encode(photograph(48, 64), "JPEG", quality=95, progressive=True)
PNG = encode(picture(), "PNG")


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def with_chunk(png: bytes, fresh: bytes) -> bytes:
    return png[:33] + fresh + png[33:]  # after IHDR


def before(data: bytes, marker: bytes, junk: bytes) -> bytes:
    start = data.index(marker)
    return data[:start] + junk + data[start:]


def scan_parameters(data: bytes, values: bytes) -> bytes:
    """Replace Ss, Se, Ah and Al of a JPEG with three components."""
    start = data.index(b"\xff\xda") + 11
    return data[:start] + values + data[start + 3 :]


TEXT = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))
MENDED = {
    "scan parameters": (scan_parameters(JPEG, b"\0\0\0"), JPEG),
    "junk in the header": (before(JPEG, b"\xff\xc0", b"\xff\0"), JPEG),
    "more junk": (before(JPEG, b"\xff\xdb", b"\0\1\2"), JPEG),
    "junk, progressive": (before(PROGRESSIVE, b"\xff\xc4", b"\xff\0\xff\0"), PROGRESSIVE),
    "zeros at the end": (JPEG[:-2] + bytes(100) + JPEG[-2:], JPEG),
    "unknown version": (JPEG[:11] + b"\7\7" + JPEG[13:], JPEG),
    "all at once": (
        scan_parameters(
            before(JPEG[:-2] + bytes(9) + JPEG[-2:], b"\xff\xc4", b"\xff\0"), b"\7\0\7"
        ),
        JPEG,
    ),
    "long text": (with_chunk(PNG, TEXT), PNG),
    "many texts": (with_chunk(PNG, TEXT * 40), PNG),
    "checksum of a text": (with_chunk(PNG, chunk(b"tEXt", b"a\0b", crc=7)), PNG),
    "checksum of exif": (with_chunk(PNG, chunk(b"eXIf", b"II*\0", crc=7)), PNG),
}
GARBAGE = b"garbage! no TIFF header"
READ = {
    "profile": (with_chunk(PNG, chunk(b"iCCP", b"x\0\0" + b"no zlib")), PNG),
    "fill bytes": (before(JPEG, b"\xff\xc0", b"\xff" * 5), JPEG),
    "exif of a png": (with_chunk(PNG, chunk(b"eXIf", GARBAGE)), PNG),
    "exif of a webp": (encode(picture(), "WEBP", lossless=True, exif=GARBAGE), PNG),
    "exif of a jpeg": (encode(photograph(48, 64), "JPEG", quality=95, exif=GARBAGE), JPEG),
}


@pytest.mark.parametrize(("damaged", "whole"), (MENDED | READ).values(), ids=MENDED | READ)
def test_damage_beside_the_pixels_costs_no_pixel(damaged, whole):
    expected = images.decode(whole)
    np.testing.assert_array_equal(images.decode(damaged), expected)
    np.testing.assert_array_equal(images.resize(damaged, 30), images.resize(whole, 30))
    assert images.size(damaged) == (64, 48)
    if not damaged.startswith(b"RIFF"):  # a WebP is stored as JPEG
        np.testing.assert_array_equal(images.decode(images.to_plain(damaged)), expected)


@pytest.mark.parametrize(("damaged", "whole"), MENDED.values(), ids=MENDED)
def test_what_is_stored_is_mended(damaged, whole):
    """So every decoder can read it, among them strict ones."""
    plain = images.to_plain(damaged)
    assert plain == whole if whole is PNG or whole is PROGRESSIVE else len(plain) == len(whole)
    with Image.open(io.BytesIO(plain)) as image:
        image.load()


@pytest.mark.parametrize("mend", MENDED)
def test_a_mended_picture_is_never_half_a_picture(mend):
    damaged, whole = MENDED[mend]
    expected = images.decode(whole)
    for length in np.linspace(len(damaged) // 3, len(damaged) - 1, 40).astype(int):
        with contextlib.suppress(images.ImageError):
            assert (images.decode(damaged[:length]) == expected).all()


@pytest.mark.parametrize("name", FILES)
def test_strips_give_the_same_pixels(name, monkeypatch):
    data = FILES[name][0]
    expected = images.decode(data)
    monkeypatch.setattr(images, "_STRIP", 64 * 5)
    np.testing.assert_array_equal(images.decode(data), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_strips_are_turned_as_pillow_does(orientation, mode, monkeypatch):
    from PIL import ImageOps

    monkeypatch.setattr(images, "_STRIP", 64 * 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture())
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    data = encode(image, "PNG", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    turned = turned.convert("RGB") if mode != "I;16" else turned
    expected = images.decode(encode(turned, "PNG"))
    np.testing.assert_array_equal(images.decode(data), expected)


BOMBS = """
import io, resource, sys, threading, time, zlib, struct
import numpy as np
from PIL import Image
from cap_pretrain.data import images
Image.MAX_IMAGE_PIXELS = None

def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum

def png(width, height, color, bytes_per_pixel):
    row = bytes(1 + width * bytes_per_pixel)
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", packed), chunk(b"IEND", b"")
    return b"".join([b"\\x89PNG\\r\\n\\x1a\\n", *chunks])

transparent, narrow = png(4000, 4000, 6, 4), png(20, 1_000_000, 2, 3)
start, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
threads = [threading.Thread(target=images.decode, args=(transparent,)) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert images.resize(narrow, 224).shape == (224, 224, 3)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
print(peak // 1024, time.monotonic() - begun)
"""


def test_the_largest_pictures_take_bounded_memory_even_in_threads():
    done = subprocess.run(
        [sys.executable, "-c", BOMBS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not done.stderr, done.stderr
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes < 600 and seconds < 60


def test_large_pictures_wait_for_memory():
    memory = image_files._Memory(10)
    running, most = [], []

    def work(amount):
        for _ in range(50):
            with memory.share(amount):
                running.append(amount)
                most.append(sum(running))
                running.remove(amount)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in (10, 4, 3, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 10 and len(most) == 200


def test_a_progressive_jpeg_of_many_scans_is_refused():
    start = PROGRESSIVE.rindex(b"\xff\xda")
    last = PROGRESSIVE[start:-2]
    many = PROGRESSIVE[:-2] + last * image_files.MAX_SCANS + b"\xff\xd9"
    for function in (images.decode, images.to_plain, lambda data: images.resize(data, 8)):
        with pytest.raises(images.ImageError, match="more than 100 scans"):
            function(many)
    thumbnails = b"\xff\xe2" + struct.pack(">H", 602) + b"\xff\xda" * 300
    embedded = PROGRESSIVE[:2] + thumbnails + PROGRESSIVE[2:]  # in a segment, these are no scans
    assert (images.decode(embedded) == images.decode(PROGRESSIVE)).all()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)


def test_pictures_that_cannot_be_decoded_are_counted(tmp_path):
    files = {
        "c/1.avif": encode(photograph(48, 64), "AVIF"),
        "c/2.HEIC": HEIC,
        "c/3.jpg": HEIC,  # as some phones name it
        "d/4.heif": HEIC,
        "d/5.jxl": b"\xff\x0a" + bytes(40),
        "d/6.jp2": b"\0\0\0\x0cjP  " + bytes(40),
        "d/7.jpg": jpeg(7),
    }
    folder = build(tmp_path, "image_folder", "--images", write_files(tmp_path / "photos", files))
    assert set(read(folder, "train")) == {"c/1.avif", "d/7.jpg"}
    lines = ["c/2.HEIC", "c/3.jpg", "d/4.heif", "d/5.jxl", "d/6.jp2"]
    assert lost(folder, "train") == {"format not supported": lines}
    members = [("a.avif", files["c/1.avif"]), ("a.txt", b"a"), ("b.heic", HEIC), ("b.txt", b"b")]
    tar(tmp_path / "s.tar", members)
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "s.tar", "--overwrite")
    assert set(read(folder, "train")) == {"s/a"}
    assert lost(folder, "train") == {"format not supported": ["s/b"]}


def test_long_captions_ids_and_names_are_counted_and_not_written(tmp_path):
    files = {1: "1.jpg", 2: "2.jpg", 3: "x" * 2**20, "y" * 2**20: "4.jpg"}
    photos = write_files(tmp_path / "photos", {f"{k}.jpg": jpeg(k) for k in (1, 2, 4)})
    pairs = [(1, "short"), (1, "a " * 2**21), (2, "b" * 2**22), (3, "c"), ("y" * 2**20, "d")]
    pairs += [(1, f"number {k} " + "z" * 5000) for k in range(300)]
    annotations = write_captions(tmp_path / "captions.json", files, pairs)
    folder = build(tmp_path, "captions_json", "--annotations", annotations, "--images", photos)
    assert {key: len(e["captions"]) for key, e in read(folder, "train").items()} == {"1": 301}
    found = report(folder)["train"]
    assert found["captions"]["dropped"] == {"caption too long": 1}
    reasons = {reason: entry["count"] for reason, entry in found["dropped"].items()}
    assert reasons == {"caption too long": 1, "missing": 1, "id too long": 1}
    for name in ("report.html", "report.json", "dropped.jsonl"):
        assert (folder / "1.0.0" / name).stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("mend", ["header", "anywhere"])
def test_mutated_pictures_are_read_or_refused(mend):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {name: data for name, (data, _) in FILES.items()}
    kinds |= {
        "avif": encode(picture(), "AVIF"),
        "rotated": rotated_jpeg(5),
        "tiff": encode(picture(), "TIFF"),
    }
    kinds["webp with exif"] = encode(picture(), "WEBP", exif=exif)
    kinds |= {name: damaged for name, (damaged, _) in MENDED.items() if len(damaged) < 20_000}
    outcomes = {"read": 0, "refused": 0}
    for number in range(3000):
        found = bytearray(list(kinds.values())[number % len(kinds)])
        for _ in range(int(rng.integers(1, 6))):
            start = int(rng.integers(len(found) if mend == "anywhere" else min(len(found), 200)))
            length = int(min(rng.choice([1, 2, 4, 64]), len(found) - start))
            part = found[start : start + length]
            fresh = [rng.bytes(length), b"\xff" * length, bytes(length), part * 2, b""]
            found[start : start + length] = fresh[rng.integers(len(fresh))]
            found = found or bytearray(1)
        data = bytes(found)
        for function in (images.to_plain, lambda data: images.resize(data, 16)):
            try:
                function(data)
                outcomes["read"] += 1
            except images.ImageError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 500


def test_broken_images_are_listed_by_their_files(tmp_path, monkeypatch, capsys):
    source = Numbers(4, files=True, broken=(1,))
    monkeypatch.setattr("cap_pretrain.data.sources.open.open_source", lambda *_, **__: source)
    made = tmp_path / "list"
    assert held_out.main(["numbers", "--splits", "val", "--to", str(made)]) == 0
    assert "4 images listed" in (out := capsys.readouterr().out) and "1 of them broken" in out
    kinds = [line.split()[0] for line in made.read_text().splitlines()]
    assert kinds.count("exact") == 4 and kinds.count("perceptual") == 3


def test_generated_images_cannot_be_listed(tmp_path, capsys):
    assert held_out.main(["scenes", "--splits", "val", "--to", str(tmp_path / "list")]) == 2
    error = capsys.readouterr().err
    assert "draws its images" in error and len(error.splitlines()) == 1


def test_an_image_to_caption_must_be_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    data = ConfigDict({"image_size": 16, "crop": "none"})
    for name in ("fifo.jpg", "device.jpg"):
        assert "not a regular file" in read_image(str(tmp_path / name), data)


def test_two_images_are_joined_up_to_a_size(monkeypatch):
    left, right = JPEG, PNG
    assert images.size(side_by_side(left, right)) == (128, 48)
    monkeypatch.setattr(nlvr2, "MAX_JOINED", 2 * 64 * 48 - 1)
    with pytest.raises(images.ImageError, match="together"):
        side_by_side(left, right)


@pytest.mark.parametrize("data", [JPEG[:-80], PROGRESSIVE[:-200]])
def test_a_broken_picture_is_tried_once_so_that_random_crops_stay(data):
    """Without anything to mend, it draws from the generator as often as an intact one."""
    rng, other = np.random.default_rng(0), np.random.default_rng(0)
    with pytest.raises(images.ImageError):
        images.random_resized_crop(data, 16, rng)
    images.random_resized_crop(JPEG, 16, other)
    assert rng.random() == other.random()
