"""Commands on a run whose images keep their aspect ratio."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cap_pretrain
from cap_pretrain import naflex, train
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.commands import caption, extract_features, plot_embeddings, show_attention
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.sources import open as sources
from cap_pretrain.validation import validate
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
    caption.main([*arguments, "--json"])  # random weights may write nothing, which is an error
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(result["image"]).stem for result in results] == sorted(SHAPES)
    assert {result.get("error", caption.BLANK) for result in results} == {caption.BLANK}


def test_a_config_that_crops_takes_whole_images(run, capsys):
    c = toy.load("finetune")
    with c.unlocked():
        c.encoder, c.learner.classes = str(run), 4
    found, _ = warm_start.resolve(c)
    assert (found.data.layout, found.data.crop) == (naflex.NAFLEX, "none")
    validate(found)
    assert "data.crop='random' (now 'none')" in capsys.readouterr().out
    options = ["--encoder", str(run), "--data", "scenes", "--out", str(run), "--name", "f"]
    cases = {
        "different numbers": ["--what", "tokens"],
        "use none": ["--what", "pooled", "--crop", "center"],
    }
    for message, more in cases.items():
        assert extract_features.main([*options, "--splits", "val", *more]) == 2
        assert message in capsys.readouterr().err


def test_attention_maps_have_the_shape_of_the_image(run):
    model = cap_pretrain.load(run)
    maps = model.attention(np.zeros((*SHAPES["wide"], 3), np.uint8), "a star").maps
    assert maps.shape[1:] == naflex.grid(*SHAPES["wide"], 16) == (2, 8)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)


@pytest.mark.slow
def test_figures_show_the_whole_images(run, photos, tmp_path):
    out = tmp_path / "attention.png"
    arguments = ["--checkpoint", str(run), "--caption", "a star", "--out", str(out)]
    assert show_attention.main([str(photos), *arguments]) == 0
    assert Image.open(out).size[1] > Image.open(out).size[0] / 4
    arguments = ["--checkpoint", str(run), "--data", "scenes", "--thumbnails", "--count", "9"]
    assert plot_embeddings.main([*arguments, "--out", str(tmp_path / "points.png")]) == 0


class Oblong(Scenes):
    """Scenes that are twice as wide as high."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return example | {"image": np.repeat(example["image"], 2, axis=1)}


@pytest.mark.slow
def test_a_run_resumes_exactly_and_continues_in_another_layout(
    tokenizer_path, tmp_path, monkeypatch
):
    monkeypatch.setitem(sources.GENERATED, "scenes", f"{__name__}:Oblong")

    def config(steps, layout=naflex.NAFLEX):
        fields = {"text__tokenizer": str(tokenizer_path), "model__name": "mu/4"}
        fields |= {"model__depth": 1, "data__flip": True, "accumulate": 2}
        fields |= {"optim__decay": "constant", "optim__warmup_share": 0.0}
        return toy.config("captioner", {}, **fields, total_steps=steps, data__layout=layout)

    train.run(config(4), tmp_path / "whole")
    train.run(config(2), tmp_path / "parts")
    train.run(config(4), tmp_path / "parts", ["total_steps"])
    assert toy.losses(tmp_path / "parts") == toy.losses(tmp_path / "whole")
    train.run(config(2, naflex.SQUARE), tmp_path / "other")
    train.run(config(4), tmp_path / "other", ["data.layout", "total_steps"])
    losses = [line["train/loss"] for line in toy.losses(tmp_path / "other")]
    whole = [line["train/loss"] for line in toy.losses(tmp_path / "whole")]
    # The logits of the first step are 0.
    assert losses[1] != whole[1] and np.isfinite(losses).all() and len(losses) == 4
