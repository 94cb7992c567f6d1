"""A loaded model computes what the evaluators and tools of a run compute."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import cap_pretrain
from cap_pretrain import inputs, rules
from cap_pretrain.api.images import listed
from cap_pretrain.api.model import Model
from cap_pretrain.checkpoints.load import Learner, assemble, load_learner
from cap_pretrain.cli.captioning import captioner, scored_captioner
from cap_pretrain.data.text.tokenizers import NoText, SentencePieceTokenizer
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context
from cap_pretrain.evals.probes.features import Features
from cap_pretrain.evals.zero_shot import ZeroShot
from cap_pretrain.models.decoding import Decoding
from tests import tiny, toy
from tests.evals.stubs import Pictures

SIDE = 16
IMAGES = np.random.default_rng(1).integers(0, 256, (11, 24, 20, 3), np.uint8)
CLASSES = ["red circle", "blue star", "green ring"]


def made(tokenizer_path, learner="captioner", options=None, **fields) -> Model:
    """Return the model of a tiny learner with random parameters."""
    c = tiny.config(learner, options, **fields)
    text = learner in ("captioner", "dual_encoder", "recurrent")
    tokenizer = SentencePieceTokenizer(tokenizer_path, c.text.length) if text else NoText()
    _, *variables = tiny.split(c, vocab=tokenizer.vocab_size)
    params, stats = (
        {path: np.asarray(leaf) for path, leaf in rules.flatten(tree).items()} for tree in variables
    )
    return Model(assemble(c, tokenizer, params, stats, ("tiny", None)), "runs/tiny")


class Photos(Pictures):
    """The images above, as a labelled source."""

    def __init__(self):
        super().__init__(labels=[k % len(CLASSES) for k in range(len(IMAGES))], classes=CLASSES)

    def __getitem__(self, index):
        return super().__getitem__(index) | {"image": IMAGES[index]}


class Fixed(Context):
    """A context whose only dataset is `Photos`."""

    def source(self, split="", data=""):
        return Photos()


def context(model: Model):
    """Return what the evaluators of the run of a model work with, and its variables."""
    inner = model._context
    return Fixed(inner.config, inner.graphdef, inner.tokenizer, inner.mesh), model._variables


def test_embeddings_are_the_evaluators_features_whatever_the_batch(tokenizer_path):
    model = made(tokenizer_path)
    found = model.embed(IMAGES)
    made_of, variables = context(model)
    expected = Features(made_of, Photos(), layer="pooled", batch_size=8)(variables).features
    assert found.dtype == np.float32 and found.shape == (11, 16)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    program = model._programs["embed", "pooled"]
    before = program._cache_size()
    for images in (list(IMAGES), [Image.fromarray(image) for image in IMAGES]):
        np.testing.assert_array_equal(model.embed(images), found)
    np.testing.assert_allclose(model.embed(IMAGES[:9]), found[:9], atol=1e-5)
    assert program._cache_size() == before  # 9 to 16 images make one shape
    np.testing.assert_allclose(model.embed(IMAGES, batch_size=4), found, atol=1e-5)


def test_a_method_that_a_learner_lacks_says_which_have_it(tokenizer_path):
    model = made(tokenizer_path, "rotation")
    assert model.methods == ("embed",) and "rotation, mu/4, 16 pixels; embed" in repr(model)
    for call, message in (
        (lambda: model.caption(IMAGES), "caption: runs/tiny is a rotation, which writes no capti"),
        (lambda: model.caption(IMAGES), "captioner, .*recurrent can.$"),
        (lambda: model.score(IMAGES, "a"), "captioner, .* and dual_encoder can.$"),
        (lambda: model.embed_text("a"), "texts without an image; coca and dual_encoder can.$"),
        (lambda: model.zero_shot(IMAGES, ["a"]), "zero_shot: .* scores no texts"),
        (lambda: model.attention(IMAGES[0]), "attention: .* captioner, .*recurrent can"),
        (lambda: model.embed(IMAGES, what="projected"), "dual_encoder and jigsaw have them"),
        (lambda: model.embed(IMAGES, what="block_9"), "no layer 'block_9'. Did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    model = made(tokenizer_path)
    for call, kind, message in (
        (lambda: model.embed([]), ValueError, "the list is empty"),
        (lambda: model.embed(IMAGES, batch_size=0), ValueError, "batch_size: 0"),
        (lambda: model.score(IMAGES, [3]), TypeError, "texts: found a int, 3"),
        (lambda: model.zero_shot(IMAGES, "cat"), TypeError, "give a list of names"),
        (lambda: model.zero_shot(IMAGES, ["a"], templates=["b"]), ValueError, "'b' has no {}"),
        (lambda: model.zero_shot(IMAGES, ["a"], rule="prior"), UserError, "over_prior"),
        (lambda: model.caption(IMAGES, beam=3), TypeError, "no option 'beam'. Did you mean 'beam"),
        (lambda: model.attention(IMAGES), ValueError, "found 11 images; give one"),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_importing_the_package_is_light():
    program = (
        "import sys, cap_pretrain\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)\n"
        "assert {'load', 'train', 'Model'} <= set(dir(cap_pretrain))\n"
        "cap_pretrain.UserError\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=toy.CONFIGS.parent)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        cap_pretrain.lode  # noqa: B018


@pytest.mark.slow
def test_captions_are_those_of_the_command(tokenizer_path):
    model = made(tokenizer_path)
    learner = Learner(model.config, model._tokenizer, model._context.graphdef, model._variables)
    pixels = np.stack([item.read(inputs.view(model.config)) for item in listed(IMAGES)])
    for how, options in (
        (Decoding(), {"batch_size": 4}),
        (Decoding(method="sample"), {"method": "sample", "seed": 5, "batch_size": 4}),
    ):
        expected = captioner(learner, how, len(pixels), options.get("seed", 0))(pixels)
        assert model.caption(IMAGES, **options) == expected and len(set(expected)) > 1
    how = Decoding(method="beam", beams=2, captions=2)
    expected = scored_captioner(learner, how, len(pixels), 0)(pixels)
    for ours, theirs in zip(model.captions(IMAGES, beams=2, captions=2), expected, strict=True):
        assert [one.text for one in ours] == [one.text for one in theirs] and len(ours) == 2
        np.testing.assert_allclose(ours[1].log_prob, theirs[1].log_prob, rtol=1e-4)
    assert model.caption(IMAGES, method="beam") == model.caption(IMAGES, beams=4)
    assert model.caption(IMAGES, beams=4) != model.caption(IMAGES, beams=1)
    question = "is it a red circle or a blue star"
    expected = captioner(learner, Decoding(), len(pixels), 0, question)(pixels)
    assert model.caption(IMAGES, question=question, batch_size=4) == expected


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["captioner", "dual_encoder"])
def test_scores_and_classes_are_the_evaluators(learner, tokenizer_path):
    model = made(tokenizer_path, learner)
    texts = ["a red circle", "two blue stars and a ring", "green"]
    found = model.score(IMAGES, texts)
    tokens = np.stack([model._tokenizer.encode(text) for text in texts])
    pixels = np.stack([item.read(inputs.view(model.config)) for item in listed(IMAGES)])
    whole = nnx.merge(model._context.graphdef, *model._variables)
    expected = jax.jit(whole.score)(pixels, np.tile(tokens, (11, 1, 1)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.score(IMAGES, texts, batch_size=2), found, atol=1e-4)

    made_of, variables = context(model)
    metrics = ZeroShot(made_of, ZeroShot.Options(batch_size=16))(variables).metrics
    labels = np.array([Photos()[k]["label"] for k in range(len(IMAGES))])
    for rule, suffix in (("likelihood", ""), ("over_prior", "_over_prior")):
        if f"top1{suffix}" not in metrics:
            continue
        names, scores = model.zero_shot(IMAGES, CLASSES, rule=rule)
        top1 = np.mean(np.array(names) == np.array(CLASSES)[labels])
        assert scores.shape == (11, 3) and np.isclose(top1, metrics[f"top1{suffix}"])
    if learner == "dual_encoder":
        cosines = model.embed(IMAGES) @ model.embed_text(texts).T
        np.testing.assert_allclose(cosines, found, atol=1e-5)
        assert model.embed(IMAGES, what="pooled").shape == (11, 16)


@pytest.mark.slow
def test_attention_is_that_of_the_learner(tokenizer_path):
    model = made(tokenizer_path)
    words, maps = model.attention(IMAGES[3], "A red star")
    assert words == ["a", "red", "star"] and maps.shape == (3, 4, 4)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-5)
    first = model.attention(IMAGES[3], "A red star", layer=0).maps
    mean = model.attention(IMAGES[3], "A red star", layer="mean").maps
    np.testing.assert_allclose(mean, (first + maps) / 2, atol=1e-5)
    assert np.abs(first - maps).max() > 1e-3
    own = model.attention(iter(IMAGES[3:4]))  # which can be read once
    assert " ".join(own.words) in model.caption(IMAGES[3])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "options"),
    [
        ("simclr", {}),
        ("classifier", {"classes": 3}),
        ("recurrent", {"decoder": "attention", "embed": 8, "hidden": 8, "attention": 8}),
    ],
)
def test_other_learners_do_what_they_can(learner, options, tokenizer_path):
    model = made(tokenizer_path, learner, options)
    assert model.embed(IMAGES[:2]).shape == (2, 16)
    if learner == "recurrent":
        assert model.methods == ("embed", "caption", "score", "zero_shot", "attention")
        assert len(model.caption(IMAGES[:2])) == 2
        words, maps = model.attention(IMAGES[0], "a red star")
        assert len(words) == 3 and maps.shape == (3, 4, 4)


@pytest.mark.slow
def test_runs_and_checkpoints_load(tokenizer_path, tmp_path):
    c = toy.config(model__depth=1, data__image_size=SIDE, text__length=8)
    toy.saved_run(c, tmp_path / "run", tokenizer_path, 3, 7)
    model = cap_pretrain.load(tmp_path / "run")
    assert model.methods == ("embed", "caption", "score", "zero_shot", "attention")
    again = cap_pretrain.load(str(tmp_path / "run" / "checkpoints" / "3"))
    np.testing.assert_array_equal(model.embed(IMAGES), again.embed(IMAGES))  # saved alike
    assert model.identity == again.identity != made(tokenizer_path).identity
    learner = load_learner(tmp_path / "run", step=3)
    toy.assert_same(again._variables, learner.variables)
    for path, step, message in (
        ("run", 5, "has no checkpoint of step 5; there are 3, 7"),
        ("run/checkpoints/3", 7, "step: 7 is given, but .* is the checkpoint of step 3"),
        ("nothing", None, "no such file or folder; give the workdir"),
        ("run/tokenizer", None, "has neither a config.json"),
    ):
        with pytest.raises(UserError, match=message):
            cap_pretrain.load(tmp_path / path, step=step)
    with pytest.raises(UserError, match="s3://bucket/run: a run cannot be there"):
        cap_pretrain.load("s3://bucket/run")


DEVICES = """
import jax, numpy as np, sys
import cap_pretrain
from tests.api.test_model import CLASSES, IMAGES
many = cap_pretrain.load(sys.argv[1])
one = cap_pretrain.load(sys.argv[1], devices=jax.devices()[:1])
assert many._mesh.size == 4 and one._mesh.size == 1
np.testing.assert_allclose(many.embed(IMAGES), one.embed(IMAGES), atol=1e-5)
assert many.caption(IMAGES) == one.caption(IMAGES)
found = [model.score(IMAGES, CLASSES) for model in (many, one)]
np.testing.assert_allclose(*found, atol=1e-3)
assert np.allclose(*[m.attention(IMAGES[0], "a red star").maps for m in (many, one)], atol=1e-4)
"""


@pytest.mark.slow
def test_four_devices_compute_what_one_does(tokenizer_path, tmp_path):
    c = toy.config(model__depth=1, data__image_size=SIDE, text__length=8)
    toy.saved_run(c, tmp_path / "run", tokenizer_path, 3)
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-c", DEVICES, str(tmp_path / "run")],
        check=True,
        cwd=toy.CONFIGS.parent,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(toy.CONFIGS.parent)},
    )
