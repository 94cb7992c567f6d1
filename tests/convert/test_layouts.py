"""OpenCLIP and timm load what we export for them and compute the same, in the extra `layouts`."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from cap_pretrain import rules
from cap_pretrain.commands import export_encoder
from cap_pretrain.convert import open_encoder
from cap_pretrain.convert.layouts.base import mlp_ratio
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer
from cap_pretrain.errors import UserError
from tests import tiny
from tests.parity import require
from tests.tools.test_export_encoder import make_run

torch = require("torch")

pytestmark = [pytest.mark.parity, pytest.mark.slow]

CLIP = {  # every option that the default ViT lacks
    "pool": "class",
    "class_token": True,
    "pre_norm": True,
    "final_norm": "pooled",
    "norm_eps": 1e-5,
    "activation": "quick_gelu",
}


def library(name):
    """Import a package that needs torchvision, also where torchvision's own operators are missing.

    Its build for GPUs has them, but cannot load them beside a PyTorch for CPUs; the packages do
    not use them.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[parity,layouts]'")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        for operator in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", signature)
    return importlib.import_module(name)


def export(workdir, out, *arguments):
    return export_encoder.main(["--checkpoint", str(workdir), "--out", str(out), *arguments])


def normalized(images):
    """Return uint8 images as the input of a torch model."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2) / np.float32(127.5) - 1)


@pytest.mark.parametrize(
    ("contrast", "fields"), [("sigmoid", {}), ("softmax", {"pool": "map"}), ("softmax", CLIP)]
)
def test_open_clip_computes_the_same_logits(contrast, fields, tokenizer_path, tmp_path):
    open_clip = library("open_clip")
    options = {"contrast": contrast}
    c, split = make_run(tmp_path / "run", tokenizer_path, "dual_encoder", options, **fields)
    assert export(tmp_path / "run", tmp_path / "out", "--layout=open_clip") == 0
    place = f"local-dir:{tmp_path / 'out'}"
    model, preprocess = open_clip.create_model_from_pretrained(place)
    model.eval()
    texts = ["A red star.", "two circles; one blue", "a green ring " * 5]
    ids = np.stack([SentencePieceTokenizer(tokenizer_path, c.text.length).encode(t) for t in texts])
    np.testing.assert_array_equal(open_clip.get_tokenizer(place)(texts), ids)

    def logits(learner, images, ids):
        return learner.logits(learner.embed_images(images), learner.embed_text(ids))

    images = tiny.images(3)
    with torch.no_grad():
        theirs, _ = model.get_logits(normalized(images), torch.from_numpy(ids))
    ours = tiny.jitted(split, logits)(images, ids)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert (model.logit_bias is None) == (contrast == "softmax")
    from PIL import Image

    pixels = preprocess(Image.fromarray(images[0]))
    np.testing.assert_allclose(pixels, normalized(images)[0], atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"pool": "map"}, CLIP])
def test_timm_computes_the_same(fields, tokenizer_path, tmp_path):
    timm = library("timm")
    _, split = make_run(tmp_path / "run", tokenizer_path, **fields)
    assert export(tmp_path / "run", tmp_path / "out", "--layout=timm") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = tiny.images(3)
    ours = tiny.jitted(split, lambda learner, images: learner.encode(images))(images)
    with torch.no_grad():
        np.testing.assert_allclose(model(normalized(images)), ours.pooled, atol=1e-4)
        tokens = model.forward_features(normalized(images))
    np.testing.assert_allclose(tokens, ours.tokens, atol=1e-4)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    from PIL import Image

    pixels = transform(Image.fromarray(images[0]))
    np.testing.assert_allclose(pixels, normalized(images)[0], atol=1e-6)


@pytest.mark.parametrize(("layout", "fields"), [("timm", {"pool": "map"}), ("open_clip", CLIP)])
def test_an_export_is_read_back(layout, fields, tokenizer_path, tmp_path):
    options = {"contrast": "sigmoid"}
    _, split = make_run(tmp_path / "run", tokenizer_path, "dual_encoder", options, **fields)
    assert export(tmp_path / "run", tmp_path / "out", f"--layout={layout}") == 0
    back = open_encoder(tmp_path / "out")
    assert back.image_size == tiny.SIDE
    assert {k: v for k, v in back.model.items() if k in fields} == fields
    found, expected = rules.flatten(back.params), rules.flatten(split[1]["encoder"])
    if fields is CLIP:  # the bias has moved into the positions
        expected["positions"] = expected["positions"] + expected["patch_embedding/bias"]
        expected["patch_embedding/bias"] = np.zeros_like(expected["patch_embedding/bias"])
    assert found.keys() == expected.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for damage in ({"depth": 0}, {"global_pool": "prr"}, {"embed_dim": 2**40}, {"mlp_ratio": "x"}):
        damaged = config | {"model_args": config["model_args"] | damage}
        (tmp_path / "out" / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"config\.json"):
            open_encoder(tmp_path / "out")


def test_what_a_layout_cannot_hold_is_refused(tokenizer_path, tmp_path, capsys):
    make_run(tmp_path / "captioner", tokenizer_path)
    make_run(tmp_path / "eps", tokenizer_path, norm_eps=1e-4)
    for run, layout, message in (
        ("captioner", "open_clip", "--layout=open_clip: the learner is captioner, and OpenCLIP"),
        ("eps", "timm", "model.norm_eps: is 0.0001, and ViTs of timm have 1e-06 or 1e-05"),
    ):
        assert export(tmp_path / run, tmp_path / "out", f"--layout={layout}") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ratios_give_the_width_of_the_mlp():
    for width in (192, 768, 1152):
        for mlp in range(1, 5 * width, 7):
            assert int(width * mlp_ratio(width, mlp)) == mlp
