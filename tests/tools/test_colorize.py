"""Tests of tools/colorize.py: its figures, and the messages when it cannot draw one."""

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain import learners
from cap_pretrain.checkpoints.open import open_learner
from cap_pretrain.checkpoints.warm_start import resolve
from cap_pretrain.cli import captioning
from cap_pretrain.commands import colorize
from cap_pretrain.models import lab
from tests import toy
from tests.tools.drawing import words_in


@pytest.fixture(scope="module")
def run(tokenizer_path, tmp_path_factory):
    """Return the workdir of a colorization run with 4 patches and a lightness-only encoder."""
    workdir = tmp_path_factory.mktemp("run")
    c = toy.config("colorization", {"upsample": 1}, model__depth=1, model__colours="lightness")
    toy.saved_run(c, workdir, tokenizer_path, 3)
    return workdir


def test_rows_of_three(run, photo, tmp_path, capsys):
    out = tmp_path / "out.svg"
    arguments = ["--checkpoint", str(run), "--out", str(out)]
    text = tmp_path / "text.jpg"
    text.write_text("To whom it may concern")
    assert colorize.main([*arguments, photo, str(text), photo]) == 1
    row = ["ith_a_long_name.png"[-18:], "lightness", "colorized"]
    assert words_in(out) == row * 2
    captured = capsys.readouterr()
    assert captured.out == f"wrote {out}\n"
    assert captured.err == f"{text}: not drawn: not an image\n"
    assert colorize.main([*arguments, str(text)]) == 2
    assert colorize.main([*arguments, "--count", "2"]) == 0
    assert words_in(out)[::3] == ["val/0", "val/1"]


def test_lightness_is_kept_and_colors_are_predicted(run):
    learner = open_learner(run)
    pixels = np.random.default_rng(0).integers(90, 160, (2, 16, 16, 3), np.uint8)
    found = colorize.colorized(learner, pixels)
    assert found.shape == pixels.shape and found.dtype == np.uint8
    logits = nnx.merge(learner.graphdef, *learner.variables).predict(pixels)
    ab = jax.image.resize(lab.annealed_mean(logits), (2, 16, 16, 2), "bilinear")
    seen = lab.lab(found / 255)
    whole = np.all((found > 0) & (found < 255), axis=-1)  # not clipped to sRGB
    assert whole.mean() > 0.3
    expected = np.concatenate([lab.lab(pixels / 255)[..., :1], ab], axis=-1)
    np.testing.assert_allclose(seen[whole], expected[whole], atol=1.5)


def test_a_run_initialized_from_the_encoder_also_sees_lightness_only(run):
    c = toy.config("classifier", {"classes": 3}, model__depth=1)
    c.encoder = str(run)
    resolved, initial = resolve(c)
    assert resolved.model.colours == "lightness" and initial.params
    learner = nnx.eval_shape(lambda: learners.build(resolved, 0, jax.random.key(0)))
    assert learner.encoder.colours == "lightness"


def test_error_messages(run, photo, monkeypatch, tmp_path, capsys):
    def error(*arguments, out="out.png"):
        assert (
            colorize.main(["--checkpoint", str(run), "--out", str(tmp_path / out), *arguments]) == 2
        )
        captured = capsys.readouterr()
        assert not captured.out and len(captured.err.splitlines()) <= 2
        return captured.err

    assert "must end in .png or .svg" in error(photo, out="out.jpg")
    assert "no checkpoint of step 4" in error(photo, "--step", "4")
    assert "cannot be combined with IMAGE files" in error(photo, "--data", "scenes")
    c = toy.config("rotation", model__depth=1)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: learners.build(c, 0, jax.random.key(0))))
    another = open_learner(run)._replace(config=c, graphdef=graphdef)
    monkeypatch.setattr(captioning, "open_learner", lambda *_, **__: another)
    assert "a rotation does not predict colors" in error(photo)
