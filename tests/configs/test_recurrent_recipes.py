"""Tests of configs/recurrent.py: sizes of the recipes' models, and that every recipe learns."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain import train
from cap_pretrain.data.text import words
from cap_pretrain.errors import UserError
from cap_pretrain.training import plan
from cap_pretrain.validation import validate
from tests import tiny, toy

RECIPES = (
    *("cnn_lstm", "gru", "show_attend_tell", "merge", "merge_jigsaw", "rotation_lstm"),
    *("clip_lstm", "clip_attention"),
)
# The default run trains `cnn_lstm`, with its evaluators; the slow tests train each.
NARROW = dict(model__depth=1, model__width=16, model__mlp=32, model__heads=2)


def small(recipe, **fields):
    """Return a recipe with small sizes, which runs in seconds, and its own other settings."""
    c = toy.shrink(toy.load("recurrent", f"recipe={recipe}"), **fields)
    c.learner.embed = c.learner.hidden = c.learner.attention = 32
    c.learner.grid = min(c.learner.grid, 3)
    c.data.scenes.max_objects = 1
    c.data.scenes.plain_captions = True
    for section in c.evals.values():
        section["count" if section.evaluator == "captions" else "limit"] = 8
        if "batch_size" in section:
            section.batch_size = 8
    return c


def test_there_is_no_other_recipe():
    with pytest.raises(UserError) as error:
        toy.load("recurrent", "recipe=?")
    listed = str(error.value).rpartition("Choose from:")[2].strip(" .").split(", ")
    assert sorted(filter(None, listed)) == sorted(RECIPES)


@pytest.mark.parametrize(
    ("recipe", "encoder", "decoder"),
    [
        # Computed by hand: embedding and logits 512 x 1000 + 513 x 1000; each LSTM layer
        # 4 x 512 x 1025; image projection 2048 x 512 + 512.
        ("cnn_lstm", 23_508_032, 512_000 + 513_000 + 2 * 2_099_200 + 1_049_088),
        # GRU 3 x 512 x 1025 and a second bias of the candidate.
        pytest.param(
            *("gru", 42_500_160, 512_000 + 513_000 + 1_574_400 + 512 + 1_049_088),
            marks=pytest.mark.slow,
        ),
        # Image 2 x 1,049,088, keys 1,049,088, queries 512 x 513, scores 512, gate 2048 x 513,
        # LSTM 4 x 512 x (1025 + 2048).
        pytest.param(
            "show_attend_tell",
            42_500_160,
            512_000 + 513_000 + 3 * 1_049_088 + 262_656 + 512 + 1_050_624 + 6_293_504,
            marks=pytest.mark.slow,
        ),
        # Image 2048 x 256 + 256, LSTM 4 x 256 x 513, merge layer 256 x 257.
        ("merge", 23_508_032, 256_000 + 257_000 + 524_544 + 525_312 + 65_792),
    ],
)
def test_sizes_are_those_of_the_sources(recipe, encoder, decoder):
    c = toy.load("recurrent", f"recipe={recipe}")
    counts = plan.count_parameters(tiny.abstract(c, vocab=1000)[1])
    assert counts == {"total": encoder + decoder, "encoder": encoder, "decoder": decoder}


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        pytest.param("show_attend_tell", 14 * 14, marks=pytest.mark.slow),
        ("clip_attention", 50),
    ],
)
def test_attention_has_the_number_of_parts_of_the_source(recipe, parts):
    c = toy.load("recurrent", f"recipe={recipe}")
    graphdef, *variables = tiny.abstract(c, vocab=100)
    image = jax.ShapeDtypeStruct((2, c.data.image_size, c.data.image_size, 3), np.uint8)
    text = jax.ShapeDtypeStruct((2, c.text.length), np.int32)

    def attend(variables, *args):
        return nnx.merge(graphdef, *variables).attend(*args)

    weights = jax.eval_shape(attend, variables, image, text)
    assert weights.shape == (2, 51, parts)


def test_arguments_override_the_recipe(tmp_path):
    c = toy.load("recurrent", "recipe=show_attend_tell,decoder=lstm,encoder=vit,data=coco")
    assert (c.learner.decoder, c.model.name, c.data.name) == ("lstm", "S/16", "coco")
    # Options that an LSTM lacks have their defaults, the others are those of the recipe.
    assert (c.learner.grid, c.learner.penalty, c.learner.dropout) == (0, 0.0, 0.5)
    validate(c)
    assert toy.load("recurrent", "decoder=attention") == toy.load(
        "recurrent", "recipe=show_attend_tell"
    )
    frozen = toy.load("recurrent", f"encoder={tmp_path}")
    assert frozen.encoder == str(tmp_path) and frozen.optim.lr_rules == (("encoder/.*", 0.0),)
    assert not c.encoder and not c.optim.lr_rules
    # A path may be gone when the run resumes; only the first start reads it.
    assert toy.load("recurrent", "encoder=gone/run").encoder == "gone/run"
    with pytest.raises(UserError, match="encoder='resent50' is neither .* mean 'resnet50'"):
        toy.load("recurrent", "encoder=resent50")


def evaluated_run(c, workdir):
    """Train a config, check that every evaluator ran at the end, and return the losses."""
    validate(c)
    train.run(c, workdir)
    assert (workdir / "tokenizer" / "words.tsv").is_file()
    results = {
        name: json.loads((workdir / "evals" / name / f"{c.total_steps}.json").read_text())
        for name in c.evals
    }
    name, _, metric = c.checkpoint.best.rpartition("/")
    assert np.isfinite(results[name][metric])
    return [line["train/loss"] for line in toy.losses(workdir)]


@pytest.mark.slow
def test_runs_and_selects_the_best_checkpoint_by_its_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # Java takes long to start
    c = small("cnn_lstm", **NARROW)
    for name in ("perplexity", "samples"):
        with c.unlocked():
            del c.evals[name]
    c.evals.scores.tokenizer = "python"
    assert len(evaluated_run(c, tmp_path)) == 2


@pytest.mark.slow
def test_batches_of_one_length_resume_exactly(tmp_path):
    c = small("rotation_lstm", total_steps=6, checkpoint__every_steps=2, checkpoint__best="")
    c.checkpoint.every_epochs = c.eval.every_epochs = 0.0
    c.checkpoint.keep_last = 3
    c.log.ids = True
    with c.unlocked():
        for name in set(c.evals) - {"val"}:
            del c.evals[name]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    train.run(c, whole)
    shutil.copytree(whole, halved)
    for step_number in (4, 6):
        shutil.rmtree(halved / "checkpoints" / str(step_number))
    train.run(c, halved)
    assert toy.losses(whole) == toy.losses(halved)
    vocab = words.WordTokenizer(whole / "tokenizer" / "words.tsv").vocab_size
    toy.assert_same(*(toy.saved_state(c, workdir, vocab, 6) for workdir in (whole, halved)))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_falls_and_all_evaluators_run(recipe, tmp_path):
    c = small(recipe, total_steps=60)
    losses = evaluated_run(c, tmp_path)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:3])
    first = toy.losses(tmp_path)[0]
    vocab_size = words.WordTokenizer(tmp_path / "tokenizer" / "words.tsv").vocab_size
    uniform = np.log(vocab_size)  # the loss of a uniform distribution over words
    assert (
        abs(first["train/loss"] - c.learner.penalty * first.get("train/penalty", 0) - uniform) < 1
    )
