"""Tests of tools/contact_sheet.py: the requested images above their captions."""

import json

import numpy as np
from PIL import Image

from cap_pretrain import config as configs
from cap_pretrain.commands import contact_sheet
from cap_pretrain.data.scenes.source import Scenes
from tests import toy


def test_a_sheet_of_a_dataset_shows_its_images(tmp_path):
    out = tmp_path / "sheet.png"
    arguments = ["--data", "scenes", "--split", "novel", "--image_size", "32", "--side", "32"]
    assert (
        contact_sheet.main([*arguments, "--count", "3", "--columns", "2", "--out", str(out)]) == 0
    )
    sheet = np.asarray(Image.open(out))
    assert sheet.shape[1] == 2 * (32 + 8) + 8
    source = Scenes("novel", 32)
    np.testing.assert_array_equal(sheet[8:40, 8:40], source[0]["image"])
    np.testing.assert_array_equal(sheet[8:40, 48:80], source[1]["image"])


def test_a_sheet_of_a_run_shows_its_latest_captions(tmp_path):
    c = toy.config()
    (tmp_path / "config.json").write_text(configs.to_json(c))
    folder = tmp_path / "evals" / "samples"
    folder.mkdir(parents=True)
    for step, caption in ((5, "before"), (10, "a red ring")):
        samples = [{"index": 3, "caption": caption}]
        content = {"options": {"data": "", "split": ""}, "samples": samples}
        (folder / f"{step}.json").write_text(json.dumps(content))
    ((image, caption, references, right, wrong),) = contact_sheet.of_run(tmp_path, "samples")
    assert caption == "a red ring" and references == () and right is False
    assert wrong == {2, 6}  # where "red" and "ring" begin
    options = c.data.scenes.to_dict()
    np.testing.assert_array_equal(image, Scenes("val", 16, **options)[3]["image"])


def test_a_run_without_samples_is_the_users_mistake(tmp_path, capsys):
    out = str(tmp_path / "sheet.png")
    assert contact_sheet.main(["--workdir", str(tmp_path), "--out", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def colors_of(sheet):
    return {color for _, color in sheet.getcolors(1 << 20)}


def test_references_and_what_is_wrong():
    image, side = np.full((20, 40, 3), 99, np.uint8), 40
    picture = contact_sheet.Picture(image, "A red ring, and a dog.", ("a blue ring and a dog",))
    assert contact_sheet.unfounded(picture.caption, picture.references) == {2}
    assert not contact_sheet.unfounded(picture.caption, ())
    scene = Scenes("val", 16, max_objects=2, shapes=4).scene(3)
    (color, shape), *_ = scene.pairs
    other = "star" if shape != "star" else "circle"
    caption = f"a {color} {shape} and a {color} {other}"
    wrong = contact_sheet.misnamed(scene, caption)
    if (color, other) not in scene.pairs:
        assert wrong == {caption.rindex(color), caption.rindex(other)}

    red, green = (198, 40, 40), (46, 125, 50)
    fine = picture._replace(caption="a blue ring")
    plain = contact_sheet.draw([fine], 1, side)
    pixels = np.asarray(plain)[8:48, 8:48]  # the aspect stays, and the image stands on its caption
    assert (pixels[20:] == 99).all() and (pixels[:20] == 255).all()
    assert not colors_of(plain) & {red, green}
    with_reference = contact_sheet.draw([fine], 1, side, references=1)
    assert with_reference.height > plain.height
    judged = [fine._replace(right=True), picture._replace(right=False)]
    assert colors_of(contact_sheet.draw(judged, 2, side)) >= {red, green}
    assert red in colors_of(contact_sheet.draw([picture._replace(wrong=frozenset({2}))], 1, side))
