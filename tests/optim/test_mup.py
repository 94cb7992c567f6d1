"""muP: factors as in its tables, the same as multipliers, and coordinates flat in width."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cap_pretrain import learners
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.models.narrowing import narrowed
from cap_pretrain.optim import mup, optimizers
from cap_pretrain.optim.mup import Mup
from cap_pretrain.rules import flatten
from cap_pretrain.training import setup, step, widths
from cap_pretrain.validation import validate
from tests import tiny, toy
from tests.optim.test_optimizers import run, section

BASE = 32


def config(width, heads=2, base_width=BASE, base_heads=2, learner="captioner", **options):
    """Return a tiny config of this width; the base model has heads of size 16."""
    size = dict(width=width, depth=1, mlp=2 * width, heads=heads, decoder_depth=1)
    c = tiny.config(learner, options, **size)
    c.optim.update(dict(name="adamw", weight_decay=0.0, clip_norm=0.0))
    c.optim.mup.update(dict(base_width=base_width, base_heads=base_heads))
    return c


def test_the_factors_are_those_of_the_tables():
    """Yang et al. 2022 (2203.03466), table 8, and definition 4.1 for attention."""
    rates = flatten(widths.rates(config(128)))
    blocks = "encoder/blocks/"
    assert rates[f"{blocks}mlp/up/kernel"] == rates[f"{blocks}attention/out/kernel"] == 1 / 4
    assert rates["decoder/logits/kernel"] == 1 / 4
    assert rates["encoder/patch_embedding/kernel"] == rates["decoder/embedding/embedding"] == 1
    assert rates["encoder/positions"] == rates[f"{blocks}mlp/up/bias"] == 1
    assert rates[f"{blocks}attention/query/kernel"] == 1 / 4 / 2  # 1/d, not 1/sqrt(d)
    assert rates["decoder/blocks/cross_attention/query/kernel"] == 1 / 4 / 2
    assert rates[f"{blocks}attention/query/bias"] == 1 / 2
    assert Mup(BASE, 2).query(BASE // 2) == Mup(BASE, 0).query(64) == 1

    c = config(128, learner="rotation")
    _, params, _ = tiny.split(c)
    after = flatten(widths.initial(c, params))
    scales = {path: jnp.std(after[path]) / jnp.std(p) for path, p in flatten(params).items()}
    np.testing.assert_allclose(scales["head/kernel"], 1 / 2, rtol=1e-6)  # variance / 4
    np.testing.assert_allclose(scales["encoder/positions"], 2, rtol=1e-6)
    np.testing.assert_allclose(scales[f"{blocks}attention/query/kernel"], 1 / 2, rtol=1e-6)
    assert scales[f"{blocks}mlp/up/kernel"] == scales["encoder/patch_embedding/kernel"] == 1


def test_at_the_width_of_the_base_nothing_changes():
    assert set(flatten(widths.rates(config(BASE))).values()) == {1.0}
    _, params, _ = tiny.split(config(BASE))
    toy.assert_same(widths.initial(config(BASE), params), params)
    assert widths.rates(config(128, base_width=0, base_heads=0)) is None


def test_output_layers_get_the_same_variance_by_any_initialization():
    outputs = {"layer1": 1024, "image_projection": 512, "pixels": 768, "head": 4}
    params, base = (
        {name: {"kernel": np.ones((width, n))} for name, n in outputs.items()}
        | {"probe": np.ones((100, width))}
        for width in (256, 64)
    )
    found = mup.initial(params, base, 1.0)
    for name, n in outputs.items():
        usual = 1 / 256 if name == "head" else 2 / (256 + n)
        of_base = 1 / 64 if name == "head" else 2 / (64 + n)
        scaled = found[name]["kernel"][0, 0] ** 2 * usual
        np.testing.assert_allclose(scaled, of_base / 4**2)
    np.testing.assert_allclose(found["probe"][0, 0] ** 2 / (100 + 256), 1 / (100 + 64))


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["captioner", "dual_encoder", "distillation", "aimv2", "coca"])
def test_the_variances_are_those_of_the_initialization(learner):
    c = config(64, learner=learner)
    params = nnx.to_pure_dict(nnx.state(learners.build(c, 500, jax.random.key(0)), nnx.Param))
    for path, leaf in flatten(params).items():
        kernel = path.endswith("kernel") and jnp.any(leaf)
        if kernel or re.fullmatch(mup.INPUTS, path):
            expected = mup.variance(path, leaf.shape)
            np.testing.assert_allclose(np.var(leaf), expected, rtol=0.4, err_msg=path)


@pytest.mark.slow
def test_convolutions_and_widths_of_other_parts():
    c = config(0, base_width=16, base_heads=0, learner="recurrent")
    c.model.update(name="resnet18", mlp=0, depth=0, heads=0, decoder_depth=0)
    rates = flatten(widths.rates(c))
    assert rates["encoder/stem/conv/kernel"] == 1  # three colours
    assert rates["encoder/stage_3/block_1/unit_1/conv/kernel"] == 1 / 4
    assert rates["decoder/image/kernel"] == 1 / 4
    assert rates["decoder/layers/0/recurrent/kernel"] == rates["decoder/logits/kernel"] == 1
    c = config(0, base_width=16, base_heads=0)
    c.model.update(name="resnet18", mlp=0, depth=0, heads=0, decoder_width=64, decoder_heads=4)
    assert flatten(widths.rates(c))["decoder/logits/kernel"] == 1 / 4
    c = config(128, learner="recurrent")
    c.learner.decoder = "attention"
    rates = flatten(widths.rates(c))
    assert rates["decoder/query/kernel"] == 1 and rates["decoder/key/kernel"] == 1 / 4


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_rate_and_initialization_are_the_same_as_a_multiplier(name):
    rng, factor = np.random.default_rng(0), 0.25
    target = jnp.asarray(rng.normal(size=(40, 40)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(40, 40)), jnp.float32)
    c = section(name=name, weight_decay=0.1, clip_norm=0.0, moment_dtype="float32")

    def trained(start, multiplier, scales):
        params = {"kernel": start}
        tx = optimizers.build(c, params, optax.constant_schedule(0.1), scales)
        return run(tx, params, 5, lambda p: jnp.sum((multiplier * p["kernel"] - target) ** 2))[0]

    expected = factor * trained(kernel, factor, None)["kernel"]
    found = trained(factor * kernel, 1.0, {"kernel": factor})["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    other = trained(factor * kernel, 1.0, None)["kernel"]
    assert np.abs(other - expected).max() > 0.05


@pytest.mark.parametrize(
    ("given", "optimizer", "message"),
    [
        ({"base_width": 32}, "muon", "base_width: is for adamw, adafactor, lion, not for .*=muon"),
        ({"base_width": -1}, "adamw", "base_width: -1 must not be negative"),
        ({"base_width": 32, "base_heads": 3}, "adamw", "base_heads: 3 does not divide"),
    ],
)
def test_invalid_settings_are_refused(given, optimizer, message):
    c = config(64)
    c.optim.name = optimizer
    c.optim.mup.update(dict(base_heads=0) | given)
    with pytest.raises(UserError, match=f"optim.mup.{message}"):
        validate(c)


def test_a_base_that_is_no_model_is_refused():
    c = config(64, base_width=33, base_heads=0)
    c.model.mlp = 100
    with pytest.raises(UserError, match="base_width: 33 of 64 is no whole number of model.mlp=100"):
        validate(c)
    stored = config(64)
    stored.model.name = "stored"
    with pytest.raises(UserError, match="model.name=stored has no widths"):
        narrowed(stored)
    stored.model.name = "resnet18"
    with pytest.raises(UserError, match="base_heads: model.name=resnet18 has no heads"):
        narrowed(stored)
    Mup().check("sgd")


def changes(c, steps=4):
    """Return how much tokens, states and logits change on average in the first steps."""
    rate = optax.constant_schedule(0.01)
    mesh = sharding.make_mesh(c)
    init, abstract, graphdef, tx = step.init_state(
        lambda key: learners.build(c, tiny.VOCAB, key),
        functools.partial(setup.make_optimizer, c, rate, idle=False),
        c,
        mesh,
    )
    state, n = init(), c.batch_size
    batch = {"image": tiny.images(n), "text": tiny.texts([7, 5] * (n // 2))}
    batch["prompt"] = np.zeros(n, np.int32)

    @jax.jit
    def coordinates(params):
        learner = nnx.merge(graphdef, params, state.stats)
        tokens = learner.encode(batch["image"]).tokens
        states = learner.states(tokens, batch["text"])
        return tokens, states, learner.decoder.to_logits(states)

    before = coordinates(jax.tree.map(jnp.copy, state.params))
    take = step.make_train_step(
        graphdef, tx, rate, c, jax.tree.map(lambda leaf: leaf.sharding, abstract)
    )
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, _ = take(state, batch)
    after = coordinates(state.params)
    return np.array([np.mean(np.abs(a - b)) for a, b in zip(after, before, strict=True)])


@pytest.mark.slow
def test_coordinates_change_as_much_at_every_width():
    """The coordinate check of Yang et al. 2022, appendix D.1, with two heads at every width."""
    base, *wider = (changes(config(width)) for width in (BASE, 64, 128, 256))
    usual = changes(config(256, base_width=0, base_heads=0))
    print(base, wider, usual)
    for found in wider:
        np.testing.assert_allclose(found, base, rtol=0.35)
    assert (usual > 1.6 * base).all()
