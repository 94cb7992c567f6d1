"""SigLIP 2 in native aspect ratios: transformers computes the same, of exports and of imports."""

import json

import numpy as np
import pytest

import cap_pretrain
from cap_pretrain import naflex, rules
from cap_pretrain.commands import export_encoder
from cap_pretrain.convert import open_encoder
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer
from cap_pretrain.data.views import View
from cap_pretrain.errors import UserError
from tests import tiny
from tests.parity import require
from tests.tools.test_export_encoder import loaded, make_run

torch, transformers = require("torch"), require("transformers")

pytestmark = pytest.mark.parity

SHAPES = [(16, 16), (9, 40), (50, 13), (7, 30)]
TEXTS = ["A red star.", "two circles; one blue", ""]


def photographs():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in SHAPES]


def inputs_of(packed):
    """What transformers reads, of packed images."""
    grids = np.array([naflex.grid_of(image) for image in packed])
    mask = np.arange(packed.shape[1]) < grids.prod(1, keepdims=True)
    pixels = packed[..., :-2].astype(np.float32) / 127.5 - 1
    return {
        "pixel_values": torch.tensor(pixels),
        "pixel_attention_mask": torch.tensor(mask.astype(np.int32)),
        "spatial_shapes": torch.tensor(grids),
    }


@pytest.mark.parametrize(("head", "pool"), [("linear", "gap"), ("none", "map")])
def test_an_export_computes_the_same_and_can_be_read(head, pool, tokenizer_path, tmp_path):
    options = {"contrast": "sigmoid", "head": head}
    fields = {"pool": pool, "data__layout": naflex.NAFLEX}
    c, split = make_run(tmp_path / "run", tokenizer_path, "dual_encoder", options, **fields)
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert export_encoder.main(arguments) == 0
    packed = np.stack([View(tiny.SIDE, patch=tiny.PATCH)(image) for image in photographs()])
    given = inputs_of(packed)
    real = given["pixel_attention_mask"].numpy() > 0

    ours = tiny.jitted(split, lambda learner, images: learner.encode(images))(packed)
    out = loaded(transformers.Siglip2VisionModel, tmp_path / "out")(**given)
    tokens = np.asarray(ours.tokens[..., :-1])
    np.testing.assert_allclose(out.last_hidden_state.numpy()[real], tokens[real], atol=1e-4)
    if pool == "map":
        np.testing.assert_allclose(out.pooler_output, ours.pooled, atol=1e-4)

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    seen = processor(images=photographs(), return_tensors="np")
    np.testing.assert_array_equal(seen["spatial_shapes"], given["spatial_shapes"])
    np.testing.assert_array_equal(seen["pixel_attention_mask"], given["pixel_attention_mask"])
    difference = np.abs(seen["pixel_values"] - given["pixel_values"].numpy())[real]
    assert difference.mean() < 0.1  # of 2; they smooth differently

    tokenizer = SentencePieceTokenizer(tokenizer_path, c.text.length)
    ids = np.stack([tokenizer.encode(text) for text in TEXTS])

    def logits(learner, images, ids):
        return learner.logits(learner.embed_images(images), learner.embed_text(ids))

    whole = loaded(transformers.Siglip2Model, tmp_path / "out" / "siglip")
    found = whole(input_ids=torch.tensor(ids), **given).logits_per_image
    np.testing.assert_allclose(found, tiny.jitted(split, logits)(packed, ids), atol=1e-4)

    model = cap_pretrain.load(tmp_path / "out" / "siglip")
    pooled = whole.vision_model(**given).pooler_output
    pooled = pooled / pooled.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(model.embed(photographs()), pooled, atol=1e-4)
    assert model.config.data.layout == naflex.NAFLEX
    assert model.score(photographs(), TEXTS).shape == (4, 3)

    back = open_encoder(tmp_path / "out")
    assert (back.layout, back.image_size) == (naflex.NAFLEX, tiny.SIDE)
    encoder = rules.flatten(split[1]["encoder"])
    for path, array in rules.flatten(back.params).items():
        assert array.tobytes() == np.asarray(encoder.pop(path)).tobytes(), path
    assert not encoder


def test_other_layouts_and_grids_are_refused(tokenizer_path, tmp_path, capsys):
    make_run(tmp_path / "run", tokenizer_path, data__layout=naflex.NAFLEX)
    arguments = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert export_encoder.main([*arguments, "--layout=timm"]) == 2
    assert "data.layout: naflex has no counterpart in timm; export for" in capsys.readouterr().err
    assert export_encoder.main(arguments) == 0
    where = tmp_path / "out" / "config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"num_patches": 15}))
    with pytest.raises(UserError, match="num_patches is 15, which is no square grid"):
        open_encoder(tmp_path / "out")
