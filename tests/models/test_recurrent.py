"""Recurrent decoders: parity with torch, stepwise against full reading, pooling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.models.layers import Compute
from cap_pretrain.models.recurrent import DECODERS, Options, pool_grid

WIDTH, VOCAB, IMAGES, TEXTS, LENGTH = 10, 13, 3, 2, 6
SIZES = dict(embed=7, hidden=8, attention=5)

KINDS = {
    "lstm": Options("lstm", **SIZES),
    "lstm of two layers": Options("lstm", layers=2, **SIZES),
    "gru": Options("gru", **SIZES),
    "gru, reset before": Options("gru", reset="before", **SIZES),
    "attention": Options("attention", **SIZES),
    "attention without gate": Options("attention", gate=False, **SIZES),
    "attention to a grid": Options("attention", grid=3, **SIZES),
    "merge": Options("merge", **SIZES),
}


FLOAT32 = Compute()


def random_decoder(options, compute=FLOAT32):
    """Return a decoder with random parameters, and its parameters as a nested dict."""
    decoder = DECODERS[options.decoder](
        options, vocab_size=VOCAB, width=WIDTH, compute=compute, rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(0)
    graphdef, params = nnx.split(decoder)

    def draw(p):
        return jnp.asarray(0.5 * rng.standard_normal(p.shape), p.dtype)

    params = jax.tree.map(draw, params)
    return nnx.merge(graphdef, params), jax.device_get(nnx.to_pure_dict(params))


@nnx.jit
def whole(decoder, *args, **kwargs):
    return decoder(*args, **kwargs)


def encoded(decoder, seed=1):
    """Return random encoder output, four tokens per image if the decoder reads tokens."""
    shape = (IMAGES, 4, WIDTH) if decoder.reads == "tokens" else (IMAGES, WIDTH)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def words(seed=2):
    return np.random.default_rng(seed).integers(0, VOCAB, (IMAGES * TEXTS, LENGTH), np.int32)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_attention_are_those_of_torch(kind):
    from tests.models.torch_decoders import torch_decoder

    decoder, params = random_decoder(KINDS[kind])
    seen, text = encoded(decoder), words()
    logits, weights = whole(decoder, seen, text)
    expected, expected_weights = torch_decoder(KINDS[kind], params, seen, text)
    assert logits.shape == (IMAGES * TEXTS, LENGTH, VOCAB) and logits.dtype == np.float32
    assert np.std(logits) > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert (weights is None) == (expected_weights is None) == (not decoder.attends)
    if weights is not None:
        assert np.ptp(weights, axis=-1).max() > 0.05
        np.testing.assert_allclose(weights, expected_weights, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_word_by_word_is_all_at_once(kind):
    decoder, _ = random_decoder(KINDS[kind])
    seen, text = encoded(decoder), words()
    cache = decoder.begin(seen, TEXTS)
    own, shared = cache
    assert all(len(leaf) == IMAGES * TEXTS for leaf in jax.tree.leaves(own))
    assert all(len(leaf) == IMAGES for leaf in jax.tree.leaves(shared))
    step = nnx.jit(lambda decoder, *args: decoder.step(*args))
    expected = whole(decoder, seen, text)[0]
    for t in range(LENGTH):
        logits, cache = step(decoder, text[:, t], cache)
        np.testing.assert_allclose(logits, expected[:, t], atol=1e-6)


@pytest.mark.parametrize("kind", ["lstm of two layers", "gru", "attention"])
def test_in_bfloat16_states_and_logits_are_float32_and_near(kind):
    exact, _ = random_decoder(KINDS[kind])
    half, _ = random_decoder(KINDS[kind], Compute(dtype=jnp.bfloat16))
    seen, text = encoded(exact), words()
    own, _ = half.begin(seen)
    assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {np.dtype(np.float32)}
    logits, weights = whole(half, seen, text)
    expected, expected_weights = whole(exact, seen, text)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=0.1)
    if weights is not None:
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, expected_weights, atol=0.02)
        np.testing.assert_allclose(np.sum(weights, -1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["gru", "attention"])
def test_rematerialisation_changes_no_gradient(kind):
    gradients = []
    for remat in ("none", "full"):
        decoder, _ = random_decoder(KINDS[kind], Compute(remat=remat))
        graphdef, params = nnx.split(decoder)

        def loss(params, graphdef=graphdef):
            decoder = nnx.merge(graphdef, params)
            return jnp.sum(decoder(encoded(decoder), words())[0] ** 2)

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(params)))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lstm", "gru", "attention", "merge"])
def test_dropout_is_before_the_output_and_in_the_merge_model_on_what_is_read(kind):
    decoder, _ = random_decoder(dataclasses.replace(KINDS[kind], dropout=0.5))
    plain, _ = random_decoder(KINDS[kind])
    seen, text = encoded(decoder), words()
    np.testing.assert_array_equal(decoder(seen, text)[0], plain(seen, text)[0])
    one, other = (decoder(seen, text, key=jax.random.key(n))[0] for n in (0, 1))
    assert np.abs(one - other).max() > 0.01
    logits = decoder.logits
    decoder.logits = lambda x: x  # return the hidden states
    dropped, whole = (decoder(seen, text, key=key)[0] for key in (jax.random.key(0), None))
    decoder.logits = logits
    if kind == "merge":
        assert np.abs(dropped - whole).max() > 0.01
    else:  # half of the units are zero, the others doubled; the recurrence is unaffected
        kept = np.asarray(dropped != 0)
        assert 0.3 < kept.mean() < 0.7
        np.testing.assert_allclose(dropped, np.where(kept, 2 * whole, 0), atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("old", "new"), [(8, 14), (7, 14), (14, 7), (5, 5), (4, 3), (1, 2)])
def test_grids_are_pooled_as_torch_does(old, new):
    from tests.torch_reference import F, tensor

    tokens = np.random.default_rng(0).standard_normal((2, old * old, 3)).astype(np.float32)
    grid = tensor(tokens).reshape(2, old, old, 3).permute(0, 3, 1, 2)
    expected = F.adaptive_avg_pool2d(grid, new).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(pool_grid(jnp.asarray(tokens), new), expected, atol=1e-6)


def test_what_is_no_square_has_no_grid():
    with pytest.raises(UserError, match="50 tokens do not form a square grid; set learner.grid=0"):
        pool_grid(jnp.zeros((1, 50, 2)), 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "lsmt"}, "learner.decoder: 'lsmt' is unknown. Did you mean 'lstm'"),
        ({"hidden": 0}, "learner.hidden: 0 must be at least 1"),
        ({"decoder": "gru", "layers": 2}, "learner.layers: decoder='gru' has one layer"),
        ({"grid": 14}, "learner.grid: 14 is invalid for decoder='lstm'"),
        ({"reset": "never"}, "learner.reset: 'never'"),
        ({"dropout": 1.0}, "learner.dropout: 1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Options(**options)
