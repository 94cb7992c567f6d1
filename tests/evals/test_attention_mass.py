"""Attention inside boxes, for learners with known attention."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import evals, train
from cap_pretrain.data.scenes.render import _RGB, render
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import Mention, find_mentions
from cap_pretrain.data.scenes.world import COLOURS
from cap_pretrain.data.text import words
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.attention_mass import AttentionMass, covered
from cap_pretrain.evals.base import Context
from cap_pretrain.training import step
from tests import toy
from tests.evals import stubs
from tests.layouts import on_eight_devices

SIDE = 32
GREY = (128, 128, 128)


class Uniform(nnx.Module):
    """Attends uniformly to the tokens of 5 x 5 patches."""

    def attend(self, images, text):
        return jnp.full((*text.shape, 25), 1 / 25)


class Spotter(nnx.Module):
    """Attends, at a word for a color, to the pixels that are closer to it than to other colors."""

    ids: list[int] = []  # token ids of the color words, in the order of COLOURS

    def attend(self, images, text):
        colours = jnp.array([*(_RGB[colour] for colour in COLOURS), GREY], jnp.float32)
        pixels = images.reshape(len(images), -1, 1, 3).astype(jnp.float32)
        nearest = jnp.argmin(jnp.sum((pixels - colours) ** 2, -1), -1)
        attention = jnp.ones((*text.shape, SIDE * SIDE))
        for k, word in enumerate(self.ids):
            like = (nearest == k)[:, None] + 1e-6
            attention = jnp.where((text == word)[..., None], like, attention)
        return attention / attention.sum(-1, keepdims=True)


@pytest.fixture
def measure(tmp_path):
    """Return a function from a learner to its result on scenes without synonyms and patterns."""

    def measure(learner, batch_size=5, **fields):
        plain = dict(synonyms=False, patterns=False, backgrounds=False, noise=0.0)
        fields = plain | dict(length_val=23) | fields
        fields = {f"data__scenes__{name}": value for name, value in fields.items()}
        c = toy.config(data__image_size=SIDE, text__length=24, **fields)
        captions = [text for i in range(50) for text in Scenes("val", SIDE)[i]["captions"]]
        path = words.write_words(captions, tmp_path, words.Rules(min_count=1))
        tokenizer = words.WordTokenizer(path, c.text.length)
        Spotter.ids = [tokenizer.encode(colour)[0] for colour in COLOURS]
        graphdef, *variables = step.split_learner(learner())
        context = Context(c, graphdef, tokenizer, sharding.make_mesh(c))
        return AttentionMass(context, AttentionMass.Options(batch_size=batch_size))(variables)

    return measure


def test_looking_everywhere_is_chance(measure):
    result = measure(Uniform)
    for kind in ("", "_colour", "_shape"):
        for metric in ("ratio", "own", "others"):
            assert result.metrics[metric + kind] == pytest.approx(1, abs=1e-5)
        assert result.metrics["share" + kind] == pytest.approx(result.metrics["area" + kind])
    assert 10 < result.details["images"] <= 23
    assert min(result.details["words"].values()) > 15


def test_looking_at_what_is_named_is_far_above_it(measure):
    result = measure(Spotter)
    metrics = result.metrics
    assert metrics["share_colour"] > 0.85 and metrics["ratio_colour"] > 3
    assert metrics["own_colour"] > 3
    assert metrics["others_colour"] < 0.7  # sometimes another object has the same color
    assert metrics["ratio_shape"] == pytest.approx(1, abs=1e-5)
    assert metrics["others_shape"] == pytest.approx(1, abs=1e-5)
    assert f"{metrics['share']:.1%} of the attention" in result.lines[0]


def test_a_lone_object_has_no_others(measure):
    metrics = measure(Spotter, max_objects=1).metrics
    assert not {"own", "others"} & metrics.keys() and metrics["share_colour"] > 0.95


def test_batches_do_not_matter(measure):
    first, second = measure(Spotter, batch_size=4), measure(Spotter, batch_size=40)
    assert first.details == second.details
    assert first.metrics == pytest.approx(second.metrics, rel=1e-6)


def test_how_much_of_each_cell_is_in_a_box():
    np.testing.assert_allclose(covered((0.25, 0.5, 1, 1), 2), [[0, 0], [0.5, 1]])
    rng = np.random.default_rng(0)
    for _ in range(10):
        left, top = rng.uniform(0, 0.5, 2)
        width, height = rng.uniform(0, 0.5, 2)
        cells = covered((left, top, left + width, top + height), 3)
        assert cells.min() >= 0 and cells.max() <= 1
        assert cells.mean() == pytest.approx(width * height)


def test_boxes_hold_the_objects():
    source = Scenes("val", 64, backgrounds=False, max_objects=1)
    for i in range(20):
        scene = source.scene(i)
        drawn = np.any(render(scene, 64, 0.0) != 128, axis=-1)
        (thing,) = scene.things
        inside = covered(thing.box, 64)
        assert drawn.sum() > 0.2 * inside.sum()  # a thin cross has a fifth
        assert inside[drawn].min() > 0


def test_where_objects_are_named():
    caption = "a tiny CRIMSON striped box over two shapes: a cobalt object and a ring"
    assert find_mentions(caption) == [
        Mention("red", "square", caption.index("CRIMSON"), caption.index("box")),
        Mention("blue", None, caption.index("cobalt"), None),
        Mention(None, "ring", None, caption.index("ring")),
    ]


def test_what_cannot_be_measured_is_told(tokenizer_path):
    context, _ = stubs.small("dual_encoder", tokenizer_path)
    with pytest.raises(UserError, match="a DualEncoder has no attention from words"):
        AttentionMass(context, AttentionMass.Options())
    context, _ = stubs.context(Uniform, stubs.Pictures(captions=[["a red circle"]]))
    with pytest.raises(UserError, match="on the dataset `scenes` only"):
        AttentionMass(context, AttentionMass.Options())


def test_recurrent_attention_is_measured_alike(tokenizer_path):
    sizes = dict(learner__embed=8, learner__hidden=8, learner__attention=8)
    context, variables = stubs.small(
        "recurrent", tokenizer_path, learner__decoder="attention", **sizes
    )
    metrics = AttentionMass(context, AttentionMass.Options())(variables).metrics
    assert 0.2 < metrics["ratio"] < 5
    context, variables = stubs.small("recurrent", tokenizer_path, learner__decoder="lstm", **sizes)
    with pytest.raises(UserError, match="decoder='lstm' has no attention"):
        AttentionMass(context, AttentionMass.Options())(variables)


@pytest.mark.slow
def test_what_a_captioner_has_learned_is_above_chance(tmp_path):
    plain = dict(noise=0.0, patterns=False, backgrounds=False, synonyms=False)
    scenes = plain | dict(plain_captions=True, colours=4, shapes=4, max_objects=2, smallest=0.2)
    c = toy.config(
        options={"parallel_fraction": 0.75},
        total_steps=200,
        batch_size=32,
        data__image_size=32,
        text__length=12,
        text__vocab_size=60,
        optim__name="adamw",
        optim__lr=3e-3,
        log__every_steps=100,
        **dict(model__depth=1, model__decoder_depth=1, model__mlp=128),
        **{f"data__scenes__{name}": value for name, value in scenes.items()},
        data__scenes__length_train=10_000,
        data__scenes__length_val=200,
    )
    c.evals = ConfigDict({"attention": evals.defaults("attention_mass", when="end")})
    train.run(c, tmp_path)
    found = json.loads((tmp_path / "evals" / "attention" / "200.json").read_text())
    # Shapes are learned later, and which object is named first is random.
    assert found["ratio_colour"] > 1.3
    assert found["own_colour"] > 1.1 * found["others_colour"]


def of_captioner(tokenizer_path, shape):
    """Return the result for a captioner on a mesh of this shape."""
    fields = {f"mesh__{axis}": n for axis, n in zip(("data", "fsdp", "tensor"), shape, strict=True)}
    context, (params, stats) = stubs.small("captioner", tokenizer_path, **fields)
    params["decoder"]["blocks"]["cross_attention"]["query"]["kernel"] *= 4
    params = jax.device_put(params, sharding.param_shardings(params, context.mesh))
    variables = params, jax.device_put(stats, sharding.replicated(context.mesh))
    with jax.set_mesh(context.mesh), jax.transfer_guard("disallow"):
        result = AttentionMass(context, AttentionMass.Options(batch_size=3))(variables)
    assert not result.metrics.keys() & result.details.keys()  # of one JSON object
    return result.metrics, result.details


@pytest.mark.slow
def test_one_device_and_eight_measure_the_same(tokenizer_path):
    path = str(tokenizer_path)
    metrics, details = of_captioner(path, (1, 1, 1))
    ((metrics_8, details_8),) = on_eight_devices(of_captioner, [[path, (2, 2, 2)]])
    assert details == details_8
    assert abs(metrics["ratio"] - 1) > 1e-3
    assert metrics == pytest.approx(metrics_8, rel=1e-5)
