"""Greedy decoding: scripted steps, and the cached captioner against the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.models.decoding import CaptionSpec, greedy
from tests import tiny

NEVER = -1  # EOS that never occurs


def scripted(script, calls=None):
    """Return a step that predicts row i of `script` for caption i, and its cache."""
    script = jnp.asarray(script)

    def step(tokens, position, heard):
        if calls is not None:
            jax.debug.callback(lambda *args: calls.append(args), position, tokens)
        logits = jax.nn.one_hot(script[:, position], 10)
        return logits, heard + 1

    return step, jnp.int32(0)


def run(script, calls=None, *, length=None, eos=1, pad=0, start=7):
    step, cache = scripted(script, calls)
    batch, longest = np.shape(script)
    out = greedy(step, cache, CaptionSpec(batch, length or longest, start, eos, pad))
    jax.effects_barrier()
    return np.asarray(out)


def test_the_end_is_kept_and_padding_follows():
    out = run([[4, 1, 5, 6], [2, 3, 4, 1], [1, 2, 1, 2], [2, 3, 4, 5]])
    np.testing.assert_array_equal(out, [[4, 1, 0, 0], [2, 3, 4, 1], [1, 0, 0, 0], [2, 3, 4, 5]])
    assert out.dtype == np.int32


def test_another_padding():
    np.testing.assert_array_equal(run([[4, 1, 5], [2, 2, 2]], pad=9), [[4, 1, 9], [2, 2, 2]])


def test_length_is_a_cap():
    np.testing.assert_array_equal(run([[2, 3, 4, 1]], length=2), [[2, 3]])


def test_each_step_reads_the_token_before_it():
    calls = []
    run([[4, 5, 6], [3, 1, 2]], calls)
    calls = sorted((int(position), tokens.tolist()) for position, tokens in calls)
    assert calls == [(0, [7, 7]), (1, [4, 3]), (2, [5, 1])]


def test_stops_when_all_have_ended():
    calls = []
    script = np.full((3, 50), 2)
    script[0, 0] = script[1, 4] = script[2, 2] = 1
    out = run(script, calls)
    assert len(calls) == 5
    np.testing.assert_array_equal(out[1, :6], [2, 2, 2, 2, 1, 0])
    assert not out[:, 5:].any()


def test_ties_go_to_the_first_token():
    def step(tokens, position, cache):
        return jnp.zeros((2, 5)), cache

    out = greedy(step, (), CaptionSpec(batch=2, length=3, start=0, eos=1))
    np.testing.assert_array_equal(out, np.zeros((2, 3)))


# The captioner


@pytest.fixture(scope="module")
def captioner():
    """A captioner whose captions depend on the image; seed and scale make them differ."""
    graphdef, params, stats = tiny.split(tiny.config(), seed=57)
    params["decoder"]["blocks"]["cross_attention"]["value"]["kernel"] *= 2
    params["decoder"]["logits"]["bias"] *= 0
    return graphdef, params, stats


@pytest.fixture(scope="module")
def decode(captioner):
    """Function (images, eos, length) -> captions, with the cache."""

    def decode(learner, images, eos, length):
        return greedy(
            learner.decode_step,
            learner.init_decoding(images),
            CaptionSpec(batch=len(images), length=length, start=0, eos=eos),
        )

    jitted = tiny.jitted(captioner, decode, static_argnums=3)
    return lambda images, eos=NEVER, length=tiny.LENGTH: np.asarray(jitted(images, eos, length))


@pytest.fixture(scope="module")
def uncached(captioner):
    """Four images and their captions without EOS, each token from a forward pass of its prefix."""
    images = tiny.images(4)
    encoded = tiny.jitted(captioner, lambda learner, images: learner.encode(images))(images).tokens
    predict = tiny.jitted(captioner, lambda learner, *args: learner.predict(*args))
    text = np.zeros((4, tiny.LENGTH), np.int32)
    for position in range(tiny.LENGTH):
        logits = np.asarray(predict(encoded, text))[:, position]
        first, second = np.sort(logits, axis=-1)[:, :-3:-1].T
        assert (first - second).min() > 1e-4  # rounding must not decide
        text[:, position] = logits.argmax(-1)
    return images, text


def test_the_cache_changes_no_token(decode, uncached):
    images, text = uncached
    assert len({tuple(row) for row in text}) == 4  # the captions differ
    np.testing.assert_array_equal(decode(images), text)


def test_captions_end_at_the_end_of_sentence_wherever_it_comes(decode, uncached):
    images, text = uncached
    eos = next(t for t in text[0, 1:] if 1 < (text == t).any(1).sum() < 4)
    ended = np.cumsum(text == eos, axis=1) - (text == eos) > 0
    np.testing.assert_array_equal(decode(images, eos), np.where(ended, 0, text))


def test_a_shorter_length_cuts(decode, uncached):
    images, text = uncached
    np.testing.assert_array_equal(decode(images, length=3), text[:, :3])


def test_a_caption_does_not_depend_on_its_batch(decode, uncached):
    images, text = uncached
    for i in range(4):
        np.testing.assert_array_equal(decode(images[i : i + 1]), text[i : i + 1])
    np.testing.assert_array_equal(decode(images[::-1]), text[::-1])
