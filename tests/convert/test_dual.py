"""Dual encoders of other libraries, loaded whole, compute the same as there; so do exports."""

import json

import jax
import numpy as np
import pytest

import cap_pretrain
from cap_pretrain import config as configs
from cap_pretrain import inputs
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.commands import export_encoder
from cap_pretrain.convert import clip as of_clip
from cap_pretrain.errors import UserError
from cap_pretrain.training.step import TrainState
from tests import tiny
from tests.convert import dual_models, torch_models
from tests.convert.dual_models import TEXTS
from tests.parity import require

torch, transformers = require("torch"), require("transformers")

pytestmark = pytest.mark.parity

OURS = ((0.5,) * 3, (0.5,) * 3)
IMAGES = tiny.images(4, side=torch_models.SIDE)


def vectors(model):
    """Return image and text vectors and logits of a loaded model."""
    split = (model._context.graphdef, *model._variables)
    text = np.stack([model._tokenizer.encode(t) for t in TEXTS])

    def compute(learner, images, text):
        images, texts = learner.embed_images(images), learner.embed_text(text)
        return images, texts, learner.logits(images, texts)

    return tiny.jitted(split, compute)(IMAGES, text)


def assert_close(ours, theirs):
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


def exported(model, workdir, out):
    """Save a loaded model as a run with one checkpoint, and export it."""
    workdir.mkdir()
    c = model.config.copy_and_resolve_references()
    c.total_steps = 3
    inputs._make_tokenizer(c, [], workdir)
    checkpoints = Checkpoints(workdir, c, identity=inputs.tokenizer_identity(workdir))
    params, stats = model._variables
    state = TrainState(jax.numpy.int32(3), params, stats, {"moment": jax.numpy.zeros(2)}, {})
    checkpoints.save(state)
    checkpoints.close()
    (workdir / "config.json").write_text(configs.to_json(c))
    assert export_encoder.main(["--checkpoint", str(workdir), "--out", str(out)]) == 0
    np.testing.assert_array_equal(cap_pretrain.load(workdir).embed(IMAGES), model.embed(IMAGES))


def loaded(name, folder):
    """Load a model with transformers and check that no weight is missing or unused."""
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_clip(tmp_path):
    theirs = dual_models.clip(tmp_path)
    expected = dual_models.embeddings(*theirs, IMAGES, of_clip.MEAN, of_clip.STD)
    model = cap_pretrain.load(tmp_path)
    assert model.config.learner.contrast == "softmax"
    assert_close(vectors(model), expected)


def test_siglip(tokenizer_path, tmp_path):
    theirs = dual_models.siglip(tmp_path, tokenizer_path)
    expected = dual_models.embeddings(*theirs, IMAGES, *OURS)
    model = cap_pretrain.load(tmp_path)
    assert not model.config.text.punctuation
    assert_close(vectors(model), expected)


@pytest.mark.slow
def test_an_export_of_a_clip_is_one_again(tmp_path):
    theirs = dual_models.clip(tmp_path / "clip")
    expected = dual_models.embeddings(*theirs, IMAGES, of_clip.MEAN, of_clip.STD)
    model = cap_pretrain.load(tmp_path / "clip")
    cosines = expected[0] @ expected[1].T
    np.testing.assert_allclose(model.score(IMAGES, TEXTS), cosines, atol=1e-5)
    exported(model, tmp_path / "run", tmp_path / "out")
    again = loaded("CLIPModel", tmp_path / "out" / "clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "clip")
    assert_close(dual_models.embeddings(again, tokenizer, IMAGES, *OURS), expected)
    assert_close(vectors(cap_pretrain.load(tmp_path / "out" / "clip")), expected)
    vision = loaded("CLIPVisionModel", tmp_path / "out")
    with torch.no_grad():
        pooled = vision(torch_models.pixels(IMAGES, *OURS)).pooler_output
    np.testing.assert_allclose(model.embed(IMAGES, what="pooled"), pooled, atol=1e-5)


@pytest.mark.slow
def test_an_export_of_a_siglip_is_one_again(tokenizer_path, tmp_path):
    theirs = dual_models.siglip(tmp_path / "siglip", tokenizer_path)
    expected = dual_models.embeddings(*theirs, IMAGES, *OURS)
    exported(cap_pretrain.load(tmp_path / "siglip"), tmp_path / "run", tmp_path / "out")
    inside = tmp_path / "out" / "siglip"
    again = loaded("SiglipModel", inside)
    tokenizer = transformers.AutoTokenizer.from_pretrained(inside)
    assert_close(dual_models.embeddings(again, tokenizer, IMAGES, *OURS), expected)
    assert_close(vectors(cap_pretrain.load(inside)), expected)


def test_open_clip(tmp_path):
    """OpenCLIP's layout of the same CLIP; its padding is id 0, which CLIP never reads."""
    theirs = dual_models.clip(tmp_path / "clip")
    expected = dual_models.embeddings(*theirs, IMAGES, of_clip.MEAN, of_clip.STD)
    folder = tmp_path / "open_clip"
    dual_models.write_open_clip(folder, theirs[0])
    dual_models.write_clip_tokenizer(folder)
    assert_close(vectors(cap_pretrain.load(folder)), expected)

    where = folder / "open_clip_config.json"
    model = json.loads(where.read_text())["model_cfg"]
    for damage, message in (
        ({"context_length": 99}, "context_length is 99, but the weights have 12"),
        ({"pool_type": "mean"}, "its text tower has pool_type mean"),
        ({"hf_model_name": "x"}, "its text tower has hf_model_name"),
        ({"heads": 5}, "5 attention heads do not divide the width 48"),
        ({"heads": "5"}, "'heads' must be int"),
    ):
        text = model["text_cfg"] | damage
        where.write_text(json.dumps({"model_cfg": model | {"text_cfg": text}}))
        with pytest.raises(UserError, match=message):
            cap_pretrain.load(folder)


def test_files_that_are_missing_or_do_not_fit(tokenizer_path, tmp_path, capsys):
    folder = tmp_path / "siglip"
    dual_models.siglip(folder, tokenizer_path)
    where = folder / "config.json"
    config = json.loads(where.read_text())
    for damage, message in (
        ({"max_position_embeddings": 9}, r"as positions it would be \[12, 48\]"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is unknown"),
        ({"num_attention_heads": 7}, "7 attention heads do not divide the width 48"),
        ({"num_hidden_layers": 3}, "it lacks encoder.layers.2.self_attn"),
        ({"max_position_embeddings": 2**40}, "'max_position_embeddings' must be from 3 to 4096"),
    ):
        damaged = config | {"text_config": config["text_config"] | damage}
        where.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=message):
            cap_pretrain.load(folder)
    where.write_text(json.dumps(config))
    (folder / "spiece.model").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        cap_pretrain.load(folder)
    (folder / "tokenizer_config.json").unlink()  # which says what happens to punctuation
    capsys.readouterr()
    assert cap_pretrain.load(folder).learner == "encoder"
    note = "as it has no tokenizer (spiece.model or tokenizer.model with tokenizer_config.json,"
    assert f"its text tower is left out, {note}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_clip_is_evaluated_and_fine_tuned_with_its_tokenizer(tmp_path):
    dual_models.clip(tmp_path / "clip")
    folder, sizes = str(tmp_path / "clip"), {"length_train": 40, "length_val": 24}
    given = {f"data.scenes.{name}": n for name, n in sizes.items()} | {"encoder": folder}
    judged = cap_pretrain.train(
        "evaluate:evals=retrieval+zero_shot,data=scenes", tmp_path / "judged", given
    )
    assert {"retrieval/text_to_image_r1", "zero_shot/top1"} <= judged.metrics.keys()
    steps = {"total_steps": 2, "batch_size": 8, "optim.lr": 1e-4}
    tuned = cap_pretrain.train("continue_training", tmp_path / "tuned", given | steps)
    before, after = cap_pretrain.load(folder), tuned.load()
    assert after.config.learner == before.config.learner
    own, other = before.embed_text(TEXTS), after.embed_text(TEXTS)
    assert 0 < np.abs(own - other).max() < 0.1
    # The folder is not needed any more, and more steps can follow.
    (tmp_path / "clip").rename(tmp_path / "elsewhere")
    again = cap_pretrain.train(
        "continue_training",
        tmp_path / "tuned",
        given | steps | {"total_steps": 3},
        allow_changes=["total_steps"],
    )
    assert again.step == 3
