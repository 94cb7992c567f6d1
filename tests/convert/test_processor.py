"""The image processor in an export gives the pixels of our own evaluations."""

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from cap_pretrain.convert import export
from cap_pretrain.convert.layouts import processor
from cap_pretrain.data import images
from tests import tiny
from tests.parity import require

transformers = require("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.fixture(scope="module")
def photo():
    """A photograph of 451 x 300 pixels."""
    return Image.fromarray(require("skimage").data.chelsea())


def file_of(photo, kind, **options):
    data = io.BytesIO()
    photo.save(data, kind, **options)
    return data.getvalue()


def loaded(folder, monkeypatch, side, crop):
    """Write the preprocessing of a config and load it as a user does."""
    c = tiny.config(colours="rgb")
    c.data.image_size, c.data.crop = side, crop
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "code"))
    folder = folder / "export"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(export.preprocessor_config(c)))
    processor.write(folder)
    return transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("crop", ["none", "random"])
def test_pixels_are_those_of_evaluations(crop, photo, monkeypatch, tmp_path):
    side = 64
    theirs = loaded(tmp_path, monkeypatch, side, crop)
    ours = images.resize if crop == "none" else images.center_crop
    turned = Image.Exif()
    turned[0x0112] = 6
    gray = photo.convert("L")
    clear = photo.copy()
    clear.putalpha(gray)
    for data in (
        file_of(photo, "JPEG", quality=90),  # decoded at a quarter of its size
        file_of(photo.resize((90, 80)), "JPEG", progressive=True),
        file_of(photo, "JPEG", exif=turned),
        file_of(gray, "JPEG"),
        file_of(photo, "PNG"),
        file_of(clear, "PNG"),
        file_of(photo.resize((40, 30)), "PNG"),  # enlarged
    ):
        found = theirs(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"]
        expected = ours(data, side).transpose(2, 0, 1) / np.float32(127.5) - 1
        np.testing.assert_allclose(found, expected[None], atol=1e-3)


def test_loading_warns_of_nothing_that_transformers_does_not_warn_of_itself(
    tokenizer_path, tmp_path, caplog, recwarn
):
    from cap_pretrain.commands import export_encoder
    from tests.tools.test_export_encoder import make_run

    make_run(tmp_path / "run", tokenizer_path, "dual_encoder", {"contrast": "sigmoid"})
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(out)]
    assert export_encoder.main(arguments) == 0
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        # It describes every SigLIP by its difference from its own default, which it finds wrong.
        repr(transformers.SiglipConfig())
        own = {record.getMessage() for record in caplog.records}
        caplog.clear()
        transformers.AutoImageProcessor.from_pretrained(out)
        transformers.SiglipVisionModel.from_pretrained(out)
        assert not caplog.records
        transformers.AutoProcessor.from_pretrained(out / "siglip")
        transformers.SiglipModel.from_pretrained(out / "siglip")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} <= own
    assert not [w for w in recwarn if "transformers" in str(w.filename)]
