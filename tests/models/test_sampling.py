"""Sampling: the restricted distribution, and captions drawn from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.errors import UserError
from cap_pretrain.models.decoding import METHODS, CaptionSpec, Decoding, decode, restrict, sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 3.0


def left(**options):
    """Return the remaining tokens and their probabilities."""
    logits = np.asarray(restrict(jnp.asarray(LOGITS)[None], **options))[0]
    kept = np.flatnonzero(logits > -np.inf)
    return kept.tolist(), np.exp(logits[kept]) / np.sum(np.exp(logits[kept]))


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.64}, [1, 3]),
        ({"top_p": 0.66}, [1, 3, 4]),
        ({"top_p": 0.99}, [0, 1, 2, 3, 4]),
        # The nucleus is of the tokens that top-k leaves (4/6 and 2.5/6 of the mass), not of all.
        ({"top_k": 2, "top_p": 0.6}, [1]),
        ({"top_k": 2, "top_p": 0.64}, [1, 3]),
    ],
)
def test_what_is_left(options, tokens):
    found, shares = left(**options)
    assert found == tokens
    expected = PROBABILITIES[tokens] / PROBABILITIES[tokens].sum()
    np.testing.assert_allclose(shares, expected, rtol=1e-5)


def test_the_temperature_comes_first():
    cold = PROBABILITIES**2 / np.sum(PROBABILITIES**2)  # the first two have 0.84 of the mass
    tokens, shares = left(temperature=0.5, top_p=0.8)
    assert tokens == [1, 3]
    np.testing.assert_allclose(shares, cold[[1, 3]] / cold[[1, 3]].sum(), rtol=1e-5)


def test_each_row_has_its_own_limit():
    rows = restrict(jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])), top_p=0.65)
    np.testing.assert_array_equal(rows > -jnp.inf, [[True, False, False], [False, True, True]])


def always(tokens, position, cache):
    return jnp.tile(jnp.asarray(LOGITS), (len(tokens), 1)), cache


def drawn(count, length, eos=-1, seed=0, **options):
    keys = jax.random.split(jax.random.key(seed), count)
    draw = jax.jit(
        lambda keys: sample(
            always, (), keys, CaptionSpec(count, length, start=0, eos=eos), **options
        )
    )
    return np.asarray(draw(keys))


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.7}])
def test_tokens_come_as_often_as_they_should(options):
    count = 20_000
    tokens, shares = left(**options)
    expected = np.zeros(5)
    expected[tokens] = shares
    captions = drawn(count, 2, **options)
    for position in range(2):
        found = np.bincount(captions[:, position], minlength=5) / count
        assert np.all(found[expected == 0] == 0)
        sigma = np.sqrt(expected * (1 - expected) / count)
        assert np.all(np.abs(found - expected) < 4 * sigma + 1e-12)
    # Positions are independent: pairs have the product of the frequencies of their tokens.
    pairs = np.histogram2d(*captions.T, bins=np.arange(6) - 0.5)[0] / count
    assert np.abs(pairs - np.outer(expected, expected)).max() < 0.01


def test_a_caption_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(3), 6)

    def captions(keys):
        return np.asarray(sample(always, (), keys, CaptionSpec(len(keys), 9, start=0, eos=2)))

    whole = captions(keys)
    assert len({tuple(row) for row in whole}) == 6
    np.testing.assert_array_equal(captions(keys[::-1]), whole[::-1])
    np.testing.assert_array_equal(captions(keys[2:4]), whole[2:4])


def test_the_end_is_kept_and_padding_follows():
    captions = drawn(200, 12, eos=3)
    ended = np.cumsum(captions == 3, axis=1) - (captions == 3) > 0
    assert ended.any() and not captions[ended].any()
    assert (captions == 3).sum(1).max() == 1


def test_decode_does_what_the_options_say():
    keys = jax.random.split(jax.random.key(0), 4)
    spec = CaptionSpec(batch=4, length=5, start=0, eos=2)

    def captions(how, **more):
        cache = (jnp.zeros((4 * how.rows, 1)), ())
        return np.asarray(decode(always, cache, how, spec, **more))

    greedy = captions(Decoding())
    np.testing.assert_array_equal(greedy, np.ones((4, 5)))
    np.testing.assert_array_equal(captions(Decoding("beam", beams=3)), greedy)
    restricted = Decoding("sample", top_k=2, top_p=0.1)
    np.testing.assert_array_equal(captions(restricted, keys=keys), greedy)
    np.testing.assert_array_equal(captions(Decoding("sample", temperature=1e-4), keys=keys), greedy)
    np.testing.assert_array_equal(
        captions(Decoding("sample"), keys=keys), sample(always, (), keys, spec)
    )
    assert {how: Decoding(how, beams=3).rows for how in METHODS} == dict(greedy=1, beam=3, sample=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "beams"}, "method: .*'beams'. Did you mean 'beam'"),
        ({"beams": 0}, "beams: 0 must be at least 1"),
        ({"length_norm": -1.0}, "length_norm: -1.0 must not be negative"),
        ({"temperature": 0.0}, "temperature: 0.0 must be positive"),
        ({"top_k": -1}, "top_k: -1"),
        ({"top_p": 0.0}, "top_p: 0.0 is not in"),
        ({"top_p": 1.5}, "top_p: 1.5 is not in"),
    ],
)
def test_options_that_cannot_be_are_told(options, message):
    with pytest.raises(UserError, match=message):
        Decoding(**options)
