"""Tests of tools/bench_data.py: all candidates do the same work, and results are printed."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import toy
from tools import bench_data_rivals as rivals
from tools.bench_decode import generated

ARGUMENTS = ["--config=configs/pretrain.py:model=mu/8", "--generated=24", "--config.batch_size=4"]
ARGUMENTS += ["--config.data.image_size=32", "--config.text.vocab_size=40", "--rounds=1"]


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.bench_data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=toy.CONFIGS.parent)


@pytest.mark.slow
def test_measures_the_pipeline_of_a_config_beside_a_dataloader():
    options = ("--config.data.crop=random", "--compare=torch", "--batches=2", "--layouts")
    done = bench(*ARGUMENTS, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["crop"] == "random" and found["size"] == 32
    assert 30_000 < found["bytes_per_image"] < 80_000  # 500 x 375 at quality 90
    assert list(found["stages_ms"]) == ["read", "decode", "augment", "tokenize", "batch"]
    assert found["stages_ms"]["decode"] > found["stages_ms"]["tokenize"] > 0
    assert list(found["pipelines"]) == ["cap_pretrain", "wds", "parquet", "torch"]
    ours, other = (found["pipelines"][name] for name in ("cap_pretrain", "torch"))
    assert ours["ratio"] == {"wall": 1, "cpu": 1}
    assert other["ratio"]["wall"] == pytest.approx(ours["rate"] / other["rate"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare=tensorflow"], "--compare: there is no 'tensorflow'."),
        (["--compare=torch", "--config.data.crop=window"], "use none or random"),
        (["--compare=torch", "--generated=0"], "has other images; add --generated=2000"),
    ],
)
def test_error_messages(arguments, message):
    done = bench(*ARGUMENTS, *arguments)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_broken_images_are_left_out():
    code = """
from cap_pretrain.data import images
from tests.data.numbers import Numbers
from tools import bench_data
source = Numbers(4, files=True, broken=(1,))
print(len(bench_data._timed(lambda i: images.decode(source[i]["image"]), range(4))[0]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=toy.CONFIGS.parent)
    assert done.stdout == "3\n", done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpegs")
    for number, data in enumerate(generated(3, 100, 80, 90)):
        (folder / f"{number}.jpg").write_bytes(data)
    return folder


@pytest.mark.parametrize("crop", ["none", "random"])
def test_photographs_of_the_dataloader_are_drawn_by_index(folder, crop):
    paths = sorted(map(str, folder.iterdir()))
    squares = rivals.Photographs(paths, 16, crop, flip=False)
    drawn = [squares[index] for index in range(8)]
    assert {(s.shape, s.dtype) for s in drawn} == {((16, 16, 3), np.dtype(np.uint8))}
    assert all((squares[index] == s).all() for index, s in enumerate(drawn))
    different = sum((a != b).any() for a, b in itertools.pairwise(drawn))
    assert different == 7 if crop == "random" else different > 0
    if crop == "none":
        whole = [np.array(Image.open(p).resize((16, 16), Image.Resampling.BILINEAR)) for p in paths]
        assert all(any((s == w).all() for w in whole) for s in drawn)


def test_a_round_counts_images_after_the_prefetched_ones():
    taken = []
    batches = (taken.append(step) or np.zeros((3, 2, 2, 3)) for step in itertools.count())
    found = rivals.measure(batches, count=5, ready=4)
    assert found["images"] == 15 and len(taken) == 9
    assert found["wall"] >= 0 and found["cpu"] >= 0


def test_a_missing_library_gives_exit_status_3(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    options = {"kind": "tf.data", "folder": str(folder), "size": 16, "crop": "none"}
    monkeypatch.setattr(sys, "argv", ["rivals", json.dumps(options)])
    assert rivals.main() == 3
