"""Scan, rematerialization and precision do not change results; dropout and stochastic depth."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from cap_pretrain.models.layers import (
    REMAT_POLICIES,
    Compute,
    drop_branch,
    dropout,
    layer_randomness,
    scan_layers,
    stack_layers,
)
from cap_pretrain.models.mlp import Mlp
from cap_pretrain.telemetry.flops import count_flops
from tests import tiny

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
SCALES = np.array([1, 2, 3], np.float32)
BATCH = {
    "image": tiny.images(4),
    "text": tiny.texts([7, 4, 0, 1]),
    "encoded": np.random.default_rng(0).standard_normal((4, 16, 16)).astype(np.float32),
}


@pytest.fixture(scope="module")
def params():
    """Parameters of a captioner, which do not depend on how it computes."""
    return tiny.split(tiny.config())[1]


def of_encoder(learner, batch, key):
    tokens = learner.encode(batch["image"], train=True, key=key).tokens
    return jnp.mean(jnp.sin(3 * tokens))


def of_decoder(learner, batch, key):
    return jnp.mean(jnp.sin(3 * learner.predict(batch["encoded"], batch["text"], key=key)))


def of_captioner(learner, batch, key):
    return learner.loss(batch, key, train=True)[0]


def value_and_grad(loss, **fields):
    """Function (params, batch, key) -> loss and gradients of a captioner with these settings."""
    graphdef, _, _ = tiny.abstract(tiny.config(**fields))
    return jax.value_and_grad(lambda p, *args: loss(nnx.merge(graphdef, p), *args))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(getattr(inner, "jaxpr", inner))


def assert_same(one, other):
    """Assert equal losses and gradients, up to rounding relative to the largest gradient."""
    assert one[0] == pytest.approx(float(other[0]), rel=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(other[1]))
    for a, b in zip(*map(jax.tree.leaves, (one[1], other[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * scale)


# Scan and rematerialization


@pytest.fixture(scope="module")
def stack():
    """Three stacked layers, split, with loss and gradients from a Python loop."""

    def make(rngs):
        return Mlp(8, 12, bias=True, compute=Compute(), rngs=rngs)

    graphdef, params = nnx.split(nnx.eval_shape(lambda: stack_layers(make, 3, nnx.Rngs(0))))
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), leaf.dtype) / 2, params)

    def looped(params):
        x, product, keys = X, 1.0, jax.random.split(KEY, 3)
        for i in range(3):
            product *= x.sum()
            layer = nnx.merge(graphdef, jax.tree.map(operator.itemgetter(i), params))
            x = x + SCALES[i] * dropout(layer(x), 0.3, keys[i])
        return jnp.sum(jnp.sin(x)) + product

    return graphdef, params, jax.jit(jax.value_and_grad(looped))(params)


def scanned(graphdef, **fields):
    """Return the function of parameters with the same result by `scan_layers`."""

    def body(layer, x, inputs):
        scale, key = inputs
        return x + scale * dropout(layer(x), 0.3, key), x.sum()

    def loss(params):
        layers, inputs = nnx.merge(graphdef, params), (SCALES, jax.random.split(KEY, 3))
        x, sums = scan_layers(layers, body, X, inputs, depth=3, compute=Compute(**fields))
        return jnp.sum(jnp.sin(x)) + jnp.prod(sums)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
    ("remat", "unroll"), [*((remat, 1) for remat in REMAT_POLICIES), ("none", 2), ("full", 100)]
)
def test_a_scan_is_one_layer_after_the_other(stack, remat, unroll):
    graphdef, params, expected = stack
    assert_same(scanned(graphdef, remat=remat, unroll=unroll)(params), expected)


@pytest.mark.parametrize(
    ("backend", "asked", "unrolled"),
    [("tpu", 0, 3), ("gpu", 0, 3), ("cpu", 0, 1), ("tpu", 1, 1), ("cpu", 9, 3)],
)
def test_layers_are_unrolled_on_accelerators_by_default(
    stack, backend, asked, unrolled, monkeypatch
):
    graphdef, params, _ = stack
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    program = scanned(graphdef, unroll=asked).trace(params).jaxpr.jaxpr
    scans = [e.params["unroll"] for e in equations(program) if e.primitive.name == "scan"]
    assert scans and set(scans) == {unrolled}


def test_the_compiler_does_not_undo_rematerialisation_where_there_is_no_loop(stack):
    graphdef, params, _ = stack
    none, full = (
        scanned(graphdef, remat=remat, unroll=3).lower(params).compile().cost_analysis()["flops"]
        for remat in ("none", "full")
    )
    assert full > 1.1 * none


@pytest.mark.parametrize(
    ("loss", "remat"),
    [pytest.param(of_encoder, "dots", marks=pytest.mark.slow), (of_decoder, "full")],
)
def test_rematerialisation_changes_no_result(params, loss, remat):
    one, other = (
        jax.jit(value_and_grad(loss, remat=name))(params, BATCH, KEY) for name in (remat, "none")
    )
    assert_same(one, other)


@pytest.mark.parametrize("loss", [of_encoder, pytest.param(of_decoder, marks=pytest.mark.slow)])
def test_policies_say_what_is_computed_twice(params, loss):
    flops = {
        remat: count_flops(value_and_grad(loss, remat=remat), params, BATCH, KEY)
        for remat in REMAT_POLICIES
    }
    assert flops["full"] > 1.2 * flops["none"]
    assert flops["dots"] == flops["none"]  # only cheap operations are recomputed
    assert (
        flops["none"] < flops["dots_no_batch"] < flops["full"]
    )  # it recomputes the attention products


def test_the_program_does_not_grow_with_depth():
    def size(depth):
        fields = dict(depth=depth, decoder_depth=depth)
        params = tiny.abstract(tiny.config(**fields))[1]
        fn = value_and_grad(of_captioner, **fields)
        return len(list(equations(jax.make_jaxpr(fn)(params, BATCH, KEY).jaxpr)))

    assert size(2) == size(12)


# Precision


def test_bfloat16_leaves_parameters_logits_and_loss_in_float32(params):
    graphdef, abstract, _ = tiny.abstract(tiny.config(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}

    def forward(params):
        learner = nnx.merge(graphdef, params)
        encoded = learner.encode(BATCH["image"])
        return encoded, learner.predict(encoded.tokens, BATCH["text"])

    encoded, logits = jax.eval_shape(forward, params)
    assert encoded.tokens.dtype == encoded.pooled.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    step = value_and_grad(of_captioner, dtype="bfloat16")
    loss, gradients = jax.eval_shape(step, params, BATCH, KEY)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_products_of_bfloat16_models_are_bfloat16_and_exponentials_float32(params):
    step = jax.make_jaxpr(value_and_grad(of_captioner, dtype="bfloat16"))(params, BATCH, KEY)
    operands = {"dot_general": set(), "exp": set()}
    for equation in equations(step.jaxpr):
        if equation.primitive.name in operands:
            dtypes = operands[equation.primitive.name]
            dtypes |= {str(var.aval.dtype) for var in equation.invars}
    assert operands["exp"] == {"float32"}
    assert "bfloat16" in operands["dot_general"]


def test_bfloat16_is_close_to_float32(params):
    def loss(dtype):
        learner = nnx.merge(tiny.abstract(tiny.config(dtype=dtype))[0], params)
        return float(jax.jit(lambda key: of_captioner(learner, BATCH, key))(KEY))

    half, full = loss("bfloat16"), loss("float32")
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


# Dropout and stochastic depth


def test_dropout_keeps_the_mean_and_zeroes_its_rate():
    x = jnp.full((200, 500), 2.0)
    out = np.asarray(dropout(x, 0.3, KEY))
    assert set(np.unique(out)) == {0, np.float32(2 / 0.7)}
    assert (out == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert out.mean() == pytest.approx(2, abs=0.02)


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    out = np.asarray(drop_branch(jnp.full((20_000, 2, 3), 2.0), jnp.float32(0.25), KEY))
    assert (out == out[:, :1, :1]).all()
    assert set(np.unique(out)) == {0, np.float32(2 / 0.75)}
    assert out.mean() == pytest.approx(2, abs=0.05)


def test_stochastic_depth_grows_linearly_and_has_its_own_key_for_each_layer():
    keys, rates = layer_randomness(KEY, 5, Compute(stochastic_depth=0.4))
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 5


@pytest.mark.parametrize("off", [dropout, drop_branch])
def test_nothing_is_dropped_without_a_key(off):
    x = jnp.ones((4, 8))
    assert off(x, 0.9, None) is x


def draws(fn):
    """Return whether fn(key) draws random numbers."""
    jaxpr = jax.make_jaxpr(fn)(KEY).jaxpr
    return any(equation.primitive.name == "random_bits" for equation in equations(jaxpr))


@pytest.mark.parametrize(
    ("name", "field"), [("captioner", "dropout"), ("dual_encoder", "stochastic_depth")]
)
def test_the_loss_is_random_in_training_only(name, field):
    graphdef, params, _ = split = tiny.split(tiny.config(name, **{field: 0.5}))
    jitted = tiny.jitted(split, lambda learner, key: learner.loss(BATCH, key, True)[0])
    keys = jax.random.split(KEY, 3)
    assert len({float(jitted(key)) for key in (*keys, keys[0])}) == 3
    assert not draws(lambda key: nnx.merge(graphdef, params).loss(BATCH, key, False)[0])


@pytest.mark.parametrize("field", ["dropout", "stochastic_depth"])
def test_every_part_takes_part(field):
    captioner, dual_encoder = (
        nnx.merge(*tiny.split(tiny.config(name, **{field: 0.5})))
        for name in ("captioner", "dual_encoder")
    )
    image, text = BATCH["image"], BATCH["text"]
    assert draws(lambda key: captioner.encode(image, train=True, key=key))
    assert draws(lambda key: dual_encoder.embed_images(image, train=True, key=key))
    assert draws(lambda key: dual_encoder.embed_text(text, train=True, key=key))
    # Only encoders have stochastic depth.
    in_decoder = draws(lambda key: captioner.predict(BATCH["encoded"], text, key=key))
    assert in_decoder == (field == "dropout")
