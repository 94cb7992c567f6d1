"""Tests of training on a folder of photos and a table of captions at one go."""

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cap_pretrain import inputs
from cap_pretrain.cli import own_data
from cap_pretrain.commands import train
from cap_pretrain.errors import UserError
from cap_pretrain.small import config as small
from cap_pretrain.telemetry import console
from tests import toy
from tests.tools.test_build_dataset import jpeg, write_files

PHOTOS = {f"{n}.jpg": jpeg(n) for n in range(20)} | {"copy_of_3.jpg": jpeg(3)}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Return the folder of photos beside captions.csv, in the present folder."""
    monkeypatch.chdir(tmp_path)
    write_table("captions.csv", [(f"img/{name}", f"photo {name}") for name in PHOTOS])
    with Path("captions.csv").open(
        "a"
    ) as file:  # further captions, far from the first of their image
        file.write("".join(f"img/{n}.jpg,again {n}\n" for n in range(20)))
    return write_files(tmp_path / "My Photos", PHOTOS)


def write_table(path, rows, names=("File_Name", "caption", "url")):
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows] if len(rows[0]) > 2 else [names[:2], *rows])


def config_of(argv):
    """Return the config that the arguments of a run name."""
    path, _, arg = argv[0].removeprefix("--config=").partition(":")
    assert path == small.__file__
    return small.get_config(arg)


def prepared(*command):
    """Return the arguments of the run that `cap train` would start, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), console.used():
        return own_data.prepare(["My Photos", "captions.csv", *command]), said.getvalue()


def test_it_builds_and_a_second_start_is_the_same(photos, tmp_path):
    command = ["--objective", "clip", "--config.total_steps=3"]
    first, said = prepared(*command)
    assert "Building a dataset" in said and "20 of 21 kept; dropped: 1 duplicate image" in said
    assert prepared(*command) == (first, "")
    assert first[1:] == [f"--workdir={tmp_path / 'runs' / 'my_photos'}", command[-1]]
    c = config_of(first)
    assert c.learner.name == "dual_encoder"
    assert c.data.name == str(tmp_path / "runs" / "my_photos" / "dataset" / "my_photos")


def test_no_image_is_in_both_parts(photos):
    rows = [(f"{n}.jpg", f"caption {k}", f"http://{n}") for k in range(3) for n in range(20)]
    write_table("captions.csv", rows)
    c = config_of(prepared()[0])
    parts = [inputs.open_data(c, split) for split in ("train", "val")]
    found = [[part[i] for i in range(len(part))] for part in parts]
    assert [len(part) for part in found] == [18, 2]
    assert all(len(example["captions"]) == 3 for part in found for example in part)
    names = [{example["id"] for example in part} for part in found]
    assert not names[0] & names[1]


def test_settings_are_those_of_the_first_start_on_any_machine(photos, monkeypatch):
    first, _ = prepared()
    monkeypatch.setattr(os, "cpu_count", lambda: 99)
    assert prepared() == (first, "")


def test_changed_captions_are_built_again_but_not_within_a_run(photos):
    first, _ = prepared()
    write_table("captions.csv", [(f"{n}.jpg", "new") for n in range(20)])
    again, said = prepared()
    assert first == again and "Building" in said
    (photos.parent / "runs" / "my_photos" / "checkpoints" / "3").mkdir(parents=True)
    assert prepared() == (first, "")  # nothing has changed
    write_table("captions.csv", [(f"{n}.jpg", "newer") for n in range(20)])
    with pytest.raises(UserError, match="captions.csv has changed since this run began"):
        prepared()
    Path("captions.csv").unlink()
    assert prepared()[0] == first  # the dataset is all that it needs


def test_only_images_and_the_table_count_as_changes(photos, monkeypatch):
    monkeypatch.chdir(photos)
    command = [".", "../captions.csv", "--workdir"]
    first = own_data.prepare([*command, "runs/a"])
    other = own_data.prepare([*command, "runs/b"])
    for run in "ab":
        Path(f"runs/{run}/checkpoints/3").mkdir(parents=True)
    write_files(photos, {".DS_Store": b"1", "Thumbs.db": b"2", "runs/a/attention.png": b"3"})
    assert own_data.prepare([*command, "runs/a"]) == first
    assert own_data.prepare([*command, "runs/b"]) == other
    write_files(photos, {"0.jpg": jpeg(77)})
    with pytest.raises(UserError, match="has changed since this run began"):
        own_data.prepare([*command, "runs/a"])


def test_different_folders_have_different_names():
    name = own_data._name
    assert [name(Path(n)) for n in ("2024.05", "My Photos", "a.b.zip")] == [
        *("photos_2024_05", "my_photos", "a_b")
    ]
    assert name(Path("Zürich")) == "zurich"
    assert name(Path("写真")) != name(Path("фото"))
    assert all(re.fullmatch("photos_[0-9a-f]{6}", name(Path(n))) for n in ("写真", "фото"))


def test_mistakes_name_the_file(photos, tmp_path):
    def refused(match, *command):
        with pytest.raises(UserError, match=match):
            own_data.prepare(list(command))

    refused("no.csv", "My Photos", "no.csv")
    write_table("odd.csv", [("1.jpg", "a")], names=("photo", "what is seen"))
    refused("no column is called 'caption' .found: 'photo', 'what is s", "My Photos", "odd.csv")
    assert own_data.prepare(["My Photos", "odd.csv", "--caption", "what is seen"])
    refused("no such folder or zip", "no_photos", "captions.csv")
    refused("separates datasets", "My Photos", "captions.csv", "--workdir", "a,b")
    assert not (tmp_path / "a,b").exists()
    refused("gs://b/x is a URL", "My Photos", "captions.csv", "--workdir=gs://b/x")
    assert not (tmp_path / "gs:").exists()


def test_cap_train_takes_photos_and_a_table(photos, monkeypatch, capsys):
    monkeypatch.setattr(train.program, "leave", lambda: print(*sys.argv))
    monkeypatch.setattr(sys, "argv", ["cap train"])
    train.main(["My Photos", "captions.csv"])
    assert f"cap train --config={small.__file__}:data=" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        train.main(["My Photos", "no.csv"])
    assert left.value.code == 2 and "no.csv" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_photos_to_captions(photos, tmp_path):
    command = [sys.executable, "-m", "cap_pretrain.commands", "train", "My Photos", "captions.csv"]
    command += ["--config.total_steps=4", "--config.data.image_size=16", "--config.model.width=32"]
    command += ["--config.model.mlp=64", "--config.model.heads=2", "--config.log.every_steps=2"]
    done = [subprocess.run(command, capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in done] == [0, 0], done[0].stderr
    assert "cap caption --checkpoint " in done[0].stdout
    assert "batch: 8 images" in done[0].stdout
    assert "Already at step 4 of 4" in done[1].stdout + done[1].stderr
    workdir = tmp_path / "runs" / "my_photos"
    assert [line["step"] for line in toy.losses(workdir)] == [2, 4]
    assert json.loads((workdir / "evals" / "val" / "4.json").read_text())["examples"] == 2
    assert np.isfinite(toy.losses(workdir)[-1]["train/loss"])
