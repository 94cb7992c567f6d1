"""Commands on a run whose images keep their aspect ratio."""

import numpy as np
import pytest
from PIL import Image

from cap_pretrain import naflex, train
from cap_pretrain.commands import caption, plot_embeddings, show_attention
from tests import toy

SHAPES = {"wide": (9, 40), "high": (50, 13), "square": (16, 16)}


@pytest.fixture(scope="module")
def run(tokenizer_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("naflex")
    c = toy.config(data__layout=naflex.NAFLEX, model__name="mu/4", model__depth=1)
    toy.saved_run(c, workdir, tokenizer_path, 3)
    return workdir


@pytest.fixture
def photos(tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for name, shape in SHAPES.items():
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def test_photos_of_all_shapes_are_captioned(run, photos, capsys):
    arguments = ["--checkpoint", str(run), "--batch_size", "2", str(photos)]
    assert caption.main([*arguments, "--json"]) in (0, 1)  # random weights may write nothing
    printed = capsys.readouterr().out
    assert all(f"{name}.png" in printed for name in SHAPES)


@pytest.mark.slow
def test_figures_show_the_whole_images(run, photos, tmp_path):
    out = tmp_path / "attention.png"
    arguments = ["--checkpoint", str(run), "--caption", "a star", "--out", str(out)]
    assert show_attention.main([str(photos), *arguments]) == 0
    assert Image.open(out).size[1] > Image.open(out).size[0] / 4
    arguments = ["--checkpoint", str(run), "--data", "scenes", "--thumbnails", "--count", "9"]
    assert plot_embeddings.main([*arguments, "--out", str(tmp_path / "points.png")]) == 0


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(tokenizer_path, tmp_path):
    fields = {"text__tokenizer": str(tokenizer_path), "model__depth": 1, "data__first_sizes": ""}
    c = toy.config("captioner", {}, **fields)
    train.run(c, tmp_path)
    c = toy.config("captioner", {}, **fields, total_steps=4, data__layout=naflex.NAFLEX)
    train.run(c, tmp_path, ["data.layout", "total_steps"])
    assert toy.losses(tmp_path)[-1]["step"] == 4
