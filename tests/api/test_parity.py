"""A loaded folder of transformers gives the features that transformers computes."""

import numpy as np
import pytest

import cap_pretrain
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer
from tests import tiny
from tests.parity import require
from tests.tools.test_export_encoder import export, make_run

torch, transformers = require("torch"), require("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.slow]

IMAGES = tiny.images(5)  # of the model's own size: other sizes are resized in another way


def theirs(folder, cls):
    """Return what transformers computes for the images."""
    model = cls.from_pretrained(folder).eval().requires_grad_(False)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return model(**processor(images=list(IMAGES), return_tensors="pt"))


def test_an_export_of_ours(tokenizer_path, tmp_path):
    make_run(tmp_path / "run", tokenizer_path, pool="map")
    assert export(tmp_path / "run", tmp_path / "out") == 0
    model = cap_pretrain.load(tmp_path / "out")
    out = theirs(tmp_path / "out", transformers.SiglipVisionModel)
    np.testing.assert_allclose(model.embed(IMAGES), out.pooler_output, atol=1e-3)
    mean = out.last_hidden_state.mean(1)
    np.testing.assert_allclose(model.embed(IMAGES, what="tokens"), mean, atol=1e-3)
    assert model.learner == "encoder" and model.methods == ("embed",)


def test_a_clip_made_elsewhere_is_cropped_as_there(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPVisionConfig(image_size=16, patch_size=4, **sizes)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    square = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square).save_pretrained(
        tmp_path
    )
    model = cap_pretrain.load(tmp_path)
    out = theirs(tmp_path, transformers.CLIPVisionModel)
    np.testing.assert_allclose(model.embed(IMAGES), out.pooler_output, atol=1e-3)
    wide = np.pad(IMAGES, [(0, 0), (0, 0), (7, 7), (0, 0)])
    np.testing.assert_allclose(model.embed(wide), model.embed(IMAGES), atol=1e-5)


def test_a_whole_export_of_a_dual_encoder_compares_texts_as_the_run_does(tokenizer_path, tmp_path):
    c, split = make_run(tmp_path / "run", tokenizer_path, "dual_encoder", {"contrast": "softmax"})
    assert export(tmp_path / "run", tmp_path / "out") == 0
    model = cap_pretrain.load(tmp_path / "out" / "siglip")
    texts = ["A red star.", "two circles; one blue", ""]
    tokenizer = SentencePieceTokenizer(tokenizer_path, c.text.length)
    ids = np.stack([tokenizer.encode(text) for text in texts])
    cosines = tiny.jitted(
        split, lambda learner, i, t: learner.compare(learner.embed_images(i), learner.embed_text(t))
    )(IMAGES, ids)
    np.testing.assert_allclose(model.score(IMAGES, texts), cosines, atol=1e-4)
    np.testing.assert_allclose(model.embed(IMAGES) @ model.embed_text(texts).T, cosines, atol=1e-4)
    assert model.learner == "dual_encoder" and "embed_text" in model.methods
