"""`model.logit_chunks`: same loss, gradients and scores, without storing all logits at once."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.models.test_layers import equations

KEY = jax.random.key(3)
BATCH = {
    "image": tiny.images(4),
    "text": tiny.texts([7, 4, 6, 1]),
    "prompt": np.array([3, 0, 2, 0], np.int32),
    "mask": np.array([True, True, False, True]),
}
RECURRENT = dict(decoder="attention", embed=8, hidden=16, attention=8, penalty=1.0)


def value_and_grad(c, fn, vocab=tiny.VOCAB):
    """Function (params, stats, *args) -> `fn(learner, *args)`, gradients of its first item."""
    graphdef, _, _ = tiny.abstract(c, vocab)

    def of_params(params, stats, *args):
        return fn(nnx.merge(graphdef, params, stats), *args)

    return jax.value_and_grad(of_params, has_aux=True)


def training_loss(learner):
    return learner.loss(BATCH, KEY, train=True)


def assert_same(found, expected):
    """Compare loss, metrics, and gradients up to rounding relative to the largest gradient."""
    assert expected[0][1]
    for a, b in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    for a, b in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("learner", "options", "chunks"),
    [
        ("captioner", {}, 3),  # of 3, 3 and 1 positions
        ("recurrent", RECURRENT, 100),  # as many as there are
    ],
)
def test_what_becomes_of_the_logits_is_the_same(learner, options, chunks):
    c = tiny.config(learner, options)
    _, params, stats = tiny.split(c)
    states = np.random.default_rng(1).standard_normal((4, tiny.LENGTH, 16)).astype(np.float32)
    logits = nnx.merge(*tiny.split(c)).decoder.to_logits(states)
    text = np.where(np.arange(tiny.LENGTH) % 2, BATCH["text"], np.argmax(logits, -1))

    def judge(learner, states):
        nll, right = learner.token_losses(states, text, 0.1)
        return jax.numpy.sum(nll * np.arange(1, 29).reshape(4, 7)), (nll, right)

    expected = jax.jit(value_and_grad(c, judge))(params, stats, states)
    assert 0 < np.mean(expected[0][1][1]) < 1
    c.model.logit_chunks = chunks
    assert_same(jax.jit(value_and_grad(c, judge))(params, stats, states), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "options"),
    [
        ("captioner", dict(parallel_fraction=0.5, label_smoothing=0.1)),
        ("captioner", dict(average="token")),
        ("recurrent", RECURRENT),
    ],
)
def test_losses_are_the_same(learner, options):
    found = []
    for chunks in (1, 3):
        c = tiny.config(learner, options, logit_chunks=chunks)
        found.append(jax.jit(value_and_grad(c, training_loss))(*tiny.split(c)[1:]))
    assert_same(*found)


TEXTS = np.stack([tiny.texts([7, 4, 1, 3], seed=n) for n in range(3)], axis=1)


@pytest.mark.parametrize(
    ("learner", "options", "fn"),
    [
        ("captioner", dict(parallel_fraction=0.5), training_loss),
        pytest.param("recurrent", RECURRENT, training_loss, marks=pytest.mark.slow),
        ("captioner", {}, lambda learner: (learner.score(BATCH["image"], TEXTS).sum(), ())),
    ],
)
def test_no_array_holds_the_logits_of_all_tokens(learner, options, fn):
    vocab = 1009
    everything = len(BATCH["text"]) * tiny.LENGTH * vocab

    def largest(chunks):
        c = tiny.config(learner, options, logit_chunks=chunks)
        program = jax.make_jaxpr(value_and_grad(c, fn, vocab))(*tiny.abstract(c, vocab)[1:])
        made = (var.aval for equation in equations(program.jaxpr) for var in equation.outvars)
        return max(aval.size for aval in made if hasattr(aval, "size"))

    assert largest(1) >= everything
    assert largest(tiny.LENGTH) < everything
