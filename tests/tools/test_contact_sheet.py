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
    ((image, caption),) = contact_sheet.of_run(tmp_path, "samples")
    assert caption == "a red ring"
    options = c.data.scenes.to_dict()
    np.testing.assert_array_equal(image, Scenes("val", 16, **options)[3]["image"])


def test_a_run_without_samples_is_the_users_mistake(tmp_path, capsys):
    out = str(tmp_path / "sheet.png")
    assert contact_sheet.main(["--workdir", str(tmp_path), "--out", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1
