"""`cap embed` and `cap search`: files of vectors, what is left out, and whom one finds."""

import json

import numpy as np
import pytest
from PIL import Image

import cap_pretrain
from cap_pretrain.cli import vectors
from cap_pretrain.commands import embed, search
from cap_pretrain.errors import UserError
from tests import toy

STORED = vectors.Embedded(
    ["a.jpg", "inner/ß.png", "c.jpg"],
    np.array([[3, 0], [0.5, 0.5], [0, -1]], np.float16),
    *("runs/siglip", "0123", "projected"),
)


@pytest.mark.parametrize("suffix", vectors.SUFFIXES)
def test_vectors_come_back(suffix, tmp_path):
    path = tmp_path / "new" / f"v{suffix}"
    vectors.write(path, STORED)
    found = vectors.read(path)
    assert (found.names, found.about) == (STORED.names, STORED.about)
    assert found.vectors.dtype == np.float16
    np.testing.assert_array_equal(found.vectors, STORED.vectors)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"v\.[a-z]+: cannot be read"):
        vectors.read(path)
    with pytest.raises(UserError, match="no such file; write it with `cap embed`"):
        vectors.read(tmp_path / f"other{suffix}")


def test_the_nearest_have_the_largest_cosines():
    found = vectors.nearest(STORED.vectors, np.array([2.0, 1.0]), 2)
    assert [index for index, _ in found] == [1, 0]
    np.testing.assert_allclose([score for _, score in found], [3 / 10**0.5, 2 / 5**0.5], rtol=1e-6)
    assert len(vectors.nearest(STORED.vectors, np.array([0.0, 0.0]), 9)) == 3


@pytest.mark.parametrize("main", [embed.main, search.main])
def test_mistakes_on_the_command_line(main, tmp_path, capsys):
    (tmp_path / "v.npz").write_bytes(b"no zip")
    calls = {
        embed.main: (
            (["none", str(tmp_path), "--out", "v.csv"], "v.csv: must end in .npz or .parquet"),
            (["none", str(tmp_path), "--out", "v.npz"], "no images in it"),
        ),
        search.main: (
            ([str(tmp_path / "v.npz"), "--text", "a"], "v.npz: cannot be read"),
            (["v.txt", "--text", "a"], "must end in"),
        ),
    }
    for arguments, message in calls[main]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_is_embedded_and_searched(tokenizer_path, tmp_path, capsys):
    for learner in ("dual_encoder", "captioner"):
        c = toy.config(learner, model__depth=1, data__image_size=16, text__length=8)
        toy.saved_run(c, tmp_path / learner, tokenizer_path, 3)
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), np.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(photos / f"{k}.png")
    (photos / "broken.jpg").write_text("To whom it may concern")
    clip, cap = str(tmp_path / "dual_encoder"), str(tmp_path / "captioner")

    out = tmp_path / "v.parquet"
    assert embed.main([clip, str(photos), "--out", str(out), "--batch_size", "2"]) == 1
    printed = capsys.readouterr()
    assert "5 images, 64 float32 each (projected); 1 files could not be read" in printed.out
    assert printed.err == f"{photos / 'broken.jpg'}: left out: not an image\n"
    model, stored = cap_pretrain.load(clip), vectors.read(out)
    np.testing.assert_allclose(stored.vectors, model.embed(list(pixels)), atol=1e-5)

    assert search.main([str(out), "--image", str(photos / "3.png"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == f" 1.0000  {photos / '3.png'}"
    assert search.main([str(out), "--text", "a red circle", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = model.score(list(pixels), "a red circle")[:, 0]
    assert [line["image"] for line in found] == [
        str(photos / f"{k}.png") for k in np.argsort(-scores)
    ]
    np.testing.assert_allclose([line["score"] for line in found], -np.sort(-scores), atol=1e-5)

    assert search.main([str(out), "--text", "a", "--model", cap]) == 2
    assert "is not the model that computed" in capsys.readouterr().err
    other = str(tmp_path / "v.npz")
    assert embed.main([cap, str(photos), "--out", other, "--dtype", "float16"]) == 1
    assert "64 float16 each (pooled)" in capsys.readouterr().out
    assert search.main([other, "--text", "a"]) == 2
    assert "is a captioner, which has no vectors of texts" in capsys.readouterr().err
    assert embed.main([clip, str(photos / "broken.jpg"), "--out", other]) == 2
    assert "none of 1 images can be read" in capsys.readouterr().err
