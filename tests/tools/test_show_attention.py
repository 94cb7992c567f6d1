"""Tests of tools/show_attention.py: its figures, and the messages when it cannot draw one."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cap_pretrain import inputs
from cap_pretrain.checkpoints.open import open_learner
from cap_pretrain.cli import captioning, figures
from cap_pretrain.commands import show_attention
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.errors import UserError
from tests import toy
from tests.tools.drawing import words_in


@pytest.fixture(scope="module")
def run(tokenizer_path, tmp_path_factory):
    """Return the workdir of a captioner with 4 patches and a class token."""
    workdir = tmp_path_factory.mktemp("run")
    c = toy.config(model__depth=1, text__length=24, model__class_token=True, model__decoder_depth=2)
    toy.saved_run(c, workdir, tokenizer_path, 3)
    return workdir


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Load each run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioning, "open_learner", functools.cache(open_learner))
        yield


@pytest.mark.slow
def test_words_over_images(run, photo, tmp_path, capsys):
    out = tmp_path / "out.svg"
    arguments = [
        "--checkpoint",
        str(run),
        "--caption",
        "Two shapes: a big crimson disc, and a star",
    ]
    assert show_attention.main([*arguments, photo, photo, "--out", str(out), "--columns", "4"]) == 0
    words = ["two", "shapes", "a", "big", "crimson", "disc", "and", "a", "star"]
    assert words_in(out) == ["ith_a_long_name.png"[-18:], *words] * 2
    assert f"wrote {out}" in capsys.readouterr().out
    first = out.read_bytes()
    assert show_attention.main([*arguments, photo, photo, "--out", str(out), "--columns", "4"]) == 0
    assert out.read_bytes() == first

    narrow, wide = tmp_path / "narrow.png", tmp_path / "wide.png"
    for file, columns in ((narrow, "4"), (wide, "10")):
        show_attention.main([*arguments, photo, "--out", str(file), "--columns", columns])
    narrow, wide = Image.open(narrow).size, Image.open(wide).size
    assert narrow[0] * 10 == wide[0] * 4 and narrow[1] == wide[1] * 3


@pytest.mark.slow
def test_files_that_are_not_images_are_skipped(run, photo, tmp_path, capsys):
    text = tmp_path / "text.jpg"
    text.write_text("To whom it may concern")
    arguments = ["--checkpoint", str(run), "--out", str(tmp_path / "out.svg")]
    assert show_attention.main([*arguments, str(text), photo]) == 1
    assert capsys.readouterr().err == f"{text}: not drawn: not an image\n"
    assert "ith_a_long_name.png"[-18:] in words_in(tmp_path / "out.svg")
    assert show_attention.main([*arguments, str(text), str(tmp_path / "gone.png")]) == 2


def test_the_runs_own_data_and_captions(run, tmp_path):
    out = tmp_path / "out.svg"
    assert show_attention.main(["--checkpoint", str(run), "--count", "2", "--out", str(out)]) == 0
    words = words_in(out)
    assert words[0] == "val/0" and "val/1" in words and "val/2" not in words


def test_maps_are_the_learners_attention(run):
    learner = captioning.open_learner(run)
    config, tokenizer, graphdef, variables = learner
    source = inputs.open_data(config, "val")
    assert isinstance(source, Scenes)
    named = captioning.dataset_images(learner, "", "novel", 3)
    assert [one.name for one in named] == ["novel/0", "novel/1", "novel/2"]
    caption = "a red ring"
    for layer in ({}, {"layer": None}):
        attended = show_attention.attend_words(learner, named, caption, layer)
        images = np.stack([one.image for one in named])
        text = np.tile(tokenizer.encode(caption), (3, 1))
        attend = jax.jit(lambda v, *a, layer=layer: nnx.merge(graphdef, *v).attend(*a, **layer))
        attention = np.asarray(attend(variables, images, text))[:, :, 1:]  # without the class token
        for found, row, (name, image, _) in zip(attended, attention, named, strict=True):
            assert (found.name, found.words) == (name, caption.split())
            np.testing.assert_array_equal(found.image, image)
            assert found.maps.shape == (3, 2, 2)
            np.testing.assert_allclose(found.maps[0].ravel(), row[0] / row[0].sum(), rtol=1e-5)


def test_bright_is_where_attention_is():
    image = np.full((32, 32, 3), 90, np.uint8)
    maps = np.array([[[0.7, 0.1], [0.1, 0.1]], [[0.25, 0.25], [0.25, 0.25]]], np.float32)
    hot, even = show_attention.overlays(image, maps)
    quarters = hot.reshape(2, 128, 2, 128, 3).mean((1, 3, 4))
    assert quarters[0, 0] > 1.5 * quarters[1, 1] and np.argmax(quarters) == 0
    assert hot.min() >= 0 and hot.max() <= 1 and np.ptp(even[..., 0]) < 1e-6
    assert even.max() < hot.max()  # one color scale
    assert not show_attention.overlays(image, maps[:0])


def test_maps_cover_the_part_of_the_photo_that_is_read():
    wide = np.full((256, 512, 3), 200, np.uint8)
    (whole,) = show_attention.overlays(wide, np.full((1, 2, 2), 0.25, np.float32))
    assert whole.shape == wide.shape and np.ptp(whole[..., 0]) < 1e-6
    (middle,) = show_attention.overlays(wide, np.full((1, 2, 2), 0.25, np.float32), "center")
    assert np.ptp(middle[:, 128:384, 0]) < 1e-6
    assert middle[:, :128].max() == middle[:, 384:].max() < middle[:, 128:384, 0].min()


@pytest.mark.slow
def test_long_captions_and_many_images_go_to_further_pages(tmp_path):
    maps = np.full((40, 2, 2), 0.25, np.float32)
    photo = np.zeros((300, 400, 3), np.uint8)
    one = show_attention.Attended("a.jpg", photo, ["word"] * 40, maps, photo)
    pages = show_attention.draw([one, one], None, "none")  # 41 panels each, at most 5 per row
    sizes = [[round(side * 128) for side in page.get_size_inches()] for page in pages]
    assert [width for width, _ in sizes] == [5 * (400 + 8)] * 2
    assert [height for _, height in sizes] == [9 * (300 + 22 + 8)] * 2
    panels = [image.get_array() for image in pages[0].images]
    assert len(panels) == 41 and {panel.shape for panel in panels} == {(300, 400, 3)}
    paths = figures.save_pages([figures.new_page(9, 9)] * 3, tmp_path / "a.png")
    assert [path.name for path in paths] == ["a.png", "a-2.png", "a-3.png"]
    assert all(Image.open(path).size == (9, 9) for path in paths)


def test_error_messages(run, photo, tokenizer_path, tmp_path, capsys):
    def error(*arguments, checkpoint=run, out="out.png"):
        arguments = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / out), *arguments]
        assert show_attention.main(arguments) == 2
        captured = capsys.readouterr()
        assert not captured.out and len(captured.err.splitlines()) <= 2
        return captured.err

    assert "must end in .png or .svg" in error(photo, out="out.jpg")
    assert "is not the folder of a run" in error(photo, checkpoint=tmp_path / "none")
    assert "no checkpoint of step 4" in error(photo, "--step", "4")
    assert "no layer 2; the decoder has layers 0 to 1" in error(photo, "--layer", "2")
    assert "cannot be combined with IMAGE files" in error(photo, "--data", "scenes")
    assert "no split 'nowel'" in error("--split", "nowel")
    toy.saved_run(toy.config("dual_encoder", model__depth=1), tmp_path / "clip", tokenizer_path, 1)
    assert "a DualEncoder has no attention from words" in error(photo, checkpoint=tmp_path / "clip")


def test_stored_features_are_not_images(run, monkeypatch):
    class Stored(list):
        def __str__(self):
            return "stored"

    source = Stored([{"image": np.zeros(512, np.float32), "id": "0"}])
    monkeypatch.setattr(inputs, "open_data", lambda *_: source)
    with pytest.raises(
        UserError, match="--data: stored holds stored features; choose one with images"
    ):
        captioning.dataset_images(captioning.open_learner(run), "", "", 1)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="matplotlib is not installed.*cap_pretrain.plots"):
        figures.new_figure(1, 1)
