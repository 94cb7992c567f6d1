"""The walk of the README, from a folder of photos to an exported encoder, as its commands stand."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cap_pretrain.data.scenes.source import Scenes

ROOT = Path(__file__).parents[2]
IMAGES = 300
PHOTOS = "## Your own photos"
EXPORT = "cap export"


def blocks(section, language=""):
    """Return the code blocks of a section of the README."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index(section) :].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `my_photos`, `captions.csv`, another photo, and `cap` as it is installed."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "my_photos").mkdir()
    scenes = Scenes("train", 96, length_train=IMAGES + 1)
    rows = []
    for i in range(IMAGES):
        example = scenes[i]
        Image.fromarray(example["image"]).save(folder / f"my_photos/{i:03}.jpg")
        rows.append((f"{i:03}.jpg", example["captions"][0]))
    Image.fromarray(scenes[IMAGES]["image"]).save(folder / "new_photo.jpg")
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    (folder / "bin").mkdir()
    program = folder / "bin/cap"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cap_pretrain.commands "$@"\n')
    program.chmod(0o755)
    return folder


def run(command, folder):
    """Run a command as a user would, in `folder`, with the compiler's usual settings."""
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert not done.returncode, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_the_readme_lead_from_photos_to_an_export(folder):
    begin = os.times()
    train, caption, embed, search = blocks(PHOTOS)[0].strip().splitlines()
    assert "runs/mine" in run(train, folder)
    assert (folder / "runs/mine/report.html").stat().st_size > 10_000
    assert run(caption, folder).split("new_photo.jpg", 1)[1].strip(" :\n\t")
    run(embed, folder)
    with np.load(folder / "vectors.npz") as stored:
        assert any(len(stored[name]) == IMAGES for name in stored)
    assert ".jpg" in run(search, folder)
    run(f"{sys.executable} - <<'END'\n{blocks(PHOTOS, 'python')[0]}END", folder)
    lines = blocks("## Judge")[0].splitlines()
    export = next(line for line in lines if line.startswith(EXPORT))
    run(export.replace("runs/cappa", "runs/mine"), folder)
    end = os.times()  # computing time, which other programs on the machine do not lengthen
    used = end.children_user + end.children_system - begin.children_user - begin.children_system
    assert used < 600

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder / "cappa")
    assert sum(p.numel() for p in model.parameters()) > 100_000
