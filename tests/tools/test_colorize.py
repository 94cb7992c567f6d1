"""tools/colorize.py: pictures of colours that are told, and what cannot be drawn."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cap_pretrain import learners
from cap_pretrain.checkpoints.load import load_learner
from cap_pretrain.checkpoints.warm_start import resolve
from cap_pretrain.models import lab
from tests import toy
from tools import colorize


@pytest.fixture(scope="module")
def run(tokenizer_path, tmp_path_factory):
    """The workdir of a colorization with 4 patches and an encoder that sees lightness alone."""
    workdir = tmp_path_factory.mktemp("run")
    c = toy.config("colorization", {"upsample": 1}, model__depth=1, model__colours="lightness")
    toy.saved_run(c, workdir, tokenizer_path, 3)
    return workdir


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    path = tmp_path / "a_photo_with_a_long_name.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def words_in(svg):
    return re.findall(r">([^<>\s][^<>]*)</text>", svg.read_text(encoding="utf-8"))


def test_rows_of_three(run, photo, tmp_path, capsys):
    out = tmp_path / "out.svg"
    arguments = ["--checkpoint", str(run), "--out", str(out)]
    text = tmp_path / "text.jpg"
    text.write_text("To whom it may concern")
    assert colorize.main([*arguments, photo, str(text), photo]) == 1
    row = ["ith_a_long_name.png"[-18:], "lightness", "coloured"]
    assert words_in(out) == row * 2
    told = capsys.readouterr()
    assert told.out == f"wrote {out}\n" and told.err == f"{text}: not drawn: not an image\n"
    assert colorize.main([*arguments, str(text)]) == 2
    assert colorize.main([*arguments, "--count", "2"]) == 0
    assert words_in(out)[::3] == ["val/0", "val/1"]


def test_the_lightness_stays_and_the_colours_are_the_learners(run):
    learner = load_learner(run)
    pixels = np.random.default_rng(0).integers(90, 160, (2, 16, 16, 3), np.uint8)
    found = colorize.colourized(learner, pixels)
    assert found.shape == pixels.shape and found.dtype == np.uint8
    logits = nnx.merge(learner.graphdef, *learner.variables).predict(pixels)
    ab = jax.image.resize(lab.annealed_mean(logits), (2, 16, 16, 2), "bilinear")
    seen = lab.lab(found / 255)
    whole = np.all((found > 0) & (found < 255), axis=-1)  # others had to be cut to sRGB
    assert whole.mean() > 0.3
    expected = np.concatenate([lab.lab(pixels / 255)[..., :1], ab], axis=-1)
    np.testing.assert_allclose(seen[whole], expected[whole], atol=1.5)


def test_whoever_takes_the_encoder_sees_what_it_saw(run):
    c = toy.config("classifier", {"classes": 3}, model__depth=1)
    c.encoder = str(run)
    resolved, initial = resolve(c)
    assert resolved.model.colours == "lightness" and initial.params
    learner = nnx.eval_shape(lambda: learners.build(resolved, 0, jax.random.key(0)))
    assert learner.encoder.colours == "lightness"


def test_what_cannot_be_drawn_is_told(run, photo, monkeypatch, tmp_path, capsys):
    def told(*arguments, out="out.png"):
        assert (
            colorize.main(["--checkpoint", str(run), "--out", str(tmp_path / out), *arguments]) == 2
        )
        captured = capsys.readouterr()
        assert not captured.out and len(captured.err.splitlines()) <= 2
        return captured.err

    assert "ends in neither .png nor .svg" in told(photo, out="out.jpg")
    assert "no checkpoint of step 4" in told(photo, "--step", "4")
    assert "not for IMAGE files" in told(photo, "--data", "scenes")
    c = toy.config("rotation", model__depth=1)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: learners.build(c, 0, jax.random.key(0))))
    another = load_learner(run)._replace(config=c, graphdef=graphdef)
    monkeypatch.setattr(colorize, "load_learner", lambda *_, **__: another)
    assert "is one of a rotation, which tells no colours" in told(photo)
