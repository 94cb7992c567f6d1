"""Beam search against exhaustive search, plain Python and greedy decoding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.models.decoding import CaptionSpec, beam_search, greedy
from tests import tiny

START, EOS, VOCAB, IMAGES = 0, 1, 5, 3


class Recurrent:
    """A random recurrent decoder with a separate direction for each image.

    Its predictions depend on the whole past, so confusing the pasts of two captions is detected.
    """

    def __init__(self, seed, vocab=VOCAB):
        rng = np.random.default_rng(seed)
        shapes = dict(turn=(8, 8), words=(vocab, 8), out=(8, vocab), images=(IMAGES, 8))
        self.weights = {
            name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
        }
        self._states = {(image, ()): np.zeros(8) for image in range(IMAGES)}

    def log_probs(self, image, past):
        """Return log-probabilities [V] of the token after `past`, in plain numpy."""
        logits = self._state(image, (START, *past)) @ self.weights["out"]
        return logits - np.log(np.sum(np.exp(logits)))

    def _state(self, image, past):
        if (image, past) not in self._states:
            w, before = self.weights, self._state(image, past[:-1])
            state = np.tanh(before @ w["turn"] + w["words"][past[-1]] + w["images"][image])
            self._states[image, past] = state
        return self._states[image, past]


def recurrent_step(tokens, position, cache):
    state, w = cache
    rows = jnp.repeat(w["images"], len(tokens) // IMAGES, axis=0)
    state = jnp.tanh(state @ w["turn"] + w["words"][tokens] + rows)
    return state @ w["out"], (state, w)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _search(weights, beams, length, norm):
    spec = CaptionSpec(batch=IMAGES, length=length, start=START, eos=EOS)
    if beams is None:
        return greedy(recurrent_step, (jnp.zeros((IMAGES, 8)), weights), spec)
    cache = (jnp.zeros((IMAGES * beams, 8)), weights)
    return beam_search(recurrent_step, cache, spec, beams=beams, length_norm=norm)


def searched(decoder, *, beams, length, norm=1.0):
    """Return captions [IMAGES, length] by beam search; greedy if beams is None."""
    return np.asarray(_search(decoder.weights, beams, length, norm))


def plain(log_probs, *, beams, length, norm=1.0, eos=EOS, stop_early=True):
    """Search one image in plain Python; return (score, caption)."""
    followed, best, complete = [(0.0, ())], (-np.inf, ()), 0
    for n in range(1, length + 1):
        ranked = sorted(
            (
                (score + more, (*past, token))
                for score, past in followed
                for token, more in enumerate(log_probs(past))
            ),
            reverse=True,
        )
        scores = [score for score, _ in ranked[: 2 * beams + 1]]
        assert np.min(-np.diff(scores)) > 1e-5  # rounding must not decide
        for score, caption in ranked[:beams]:
            if caption[-1] == eos or n == length:
                complete += 1
                best = max(best, (score / n**norm, caption))
        followed = [c for c in ranked[: 2 * beams] if c[1][-1] != eos][:beams]
        if complete >= beams:
            break
        if stop_early and followed[0][0] / length**norm <= best[0]:
            break
    return best


def padded(caption, length):
    return [*caption, *[0] * (length - len(caption))]


@pytest.mark.parametrize("norm", [0.0, 0.6, 1.0])
def test_wide_enough_it_finds_the_best_of_all_captions(norm):
    length, decoder = 4, Recurrent(0, vocab=4)
    words = [token for token in range(4) if token != EOS]
    captions = [
        (*words, EOS)
        for n in range(length)
        for words in itertools.product([token for token in range(4) if token != EOS], repeat=n)
    ]
    captions += itertools.product(words, repeat=length)
    assert len(captions) == 121

    def score(image, caption):
        steps = (decoder.log_probs(image, caption[:n])[caption[n]] for n in range(len(caption)))
        return sum(steps) / len(caption) ** norm

    found = searched(decoder, beams=121, length=length, norm=norm)
    for image in range(IMAGES):
        best = max(captions, key=lambda caption: score(image, caption))
        assert found[image].tolist() == padded(best, length)


def test_the_length_norm_decides_between_short_and_long():
    decoder = Recurrent(3)
    short, long = (
        np.sum(searched(decoder, beams=5, length=7, norm=norm) != 0) for norm in (0.0, 1.0)
    )
    assert short < long


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_narrow_beams_are_those_of_plain_python(beams, norm):
    ends = set()
    for seed in range(4):
        decoder = Recurrent(seed)
        found = searched(decoder, beams=beams, length=7, norm=norm)
        for image in range(IMAGES):
            log_probs = functools.partial(decoder.log_probs, image)
            _, caption = plain(log_probs, beams=beams, length=7, norm=norm)
            assert found[image].tolist() == padded(caption, 7)
            # Ending early has lost nothing.
            patient = plain(log_probs, beams=beams, length=7, norm=norm, stop_early=False)
            assert patient[1] == caption
            ends.add(len(caption))
    assert len(ends) > 2


def test_one_beam_is_greedy():
    different = set()
    for seed in range(8):
        decoder = Recurrent(seed)
        one_by_one = searched(decoder, beams=None, length=7)
        np.testing.assert_array_equal(searched(decoder, beams=1, length=7), one_by_one)
        different.update(map(tuple, one_by_one))
    assert len(different) > 8


def scripted(probabilities, calls):
    """Return a step with constant predictions that records the positions of its calls."""

    def step(tokens, position, cache):
        jax.debug.callback(lambda position: calls.append(int(position)), position)
        return jnp.log(jnp.tile(jnp.asarray(probabilities), (len(tokens), 1))), cache

    return step


def test_ends_when_no_caption_can_beat_the_best():
    # Ending at once has log-probability log 0.5, and all other captions have less. Their mean could
    # still improve, but after another token, three captions have ended.
    script, spec = [0.3, 0.5, 0.2], CaptionSpec(batch=1, length=50, start=0, eos=EOS)
    cache = (jnp.zeros((3, 1)), ())
    for norm, asked in ((0.0, 1), (1.0, 2)):
        calls = []
        out = beam_search(scripted(script, calls), cache, spec, beams=3, length_norm=norm)
        jax.effects_barrier()
        np.testing.assert_array_equal(out[0, :2], [1, 0])
        assert sorted(calls) == list(range(asked))


def test_every_image_ends_on_its_own_and_the_last_ends_all():
    calls = []

    def step(tokens, position, cache):
        jax.debug.callback(lambda position: calls.append(int(position)), position)
        ends = jnp.repeat(jnp.asarray([2, 5]), 2) == position
        return jnp.where(ends[:, None], jnp.eye(4)[1], jnp.eye(4)[3]) * 50, cache

    cache = (jnp.zeros((4, 1)), ())
    out = beam_search(step, cache, CaptionSpec(2, 20, start=0, eos=EOS), beams=2, length_norm=0.0)
    jax.effects_barrier()
    np.testing.assert_array_equal(out[:, :7], [[3, 3, 1, 0, 0, 0, 0], [3, 3, 3, 3, 3, 1, 0]])
    assert sorted(calls) == list(range(6))


# The captioner never moves keys and values. Its seed, scale and end token are chosen so that the
# captions differ.
LAST = 15


@pytest.fixture(scope="module")
def captioner():
    graphdef, params, stats = tiny.split(tiny.config(), seed=64)
    params["decoder"]["blocks"]["cross_attention"]["value"]["kernel"] *= 4
    params["decoder"]["logits"]["bias"] *= 0
    return graphdef, params, stats


@pytest.fixture(scope="module")
def decode(captioner):
    """Function (images, beams) -> captions, with the cache; greedy if beams is None."""

    def decode(learner, images, beams):
        spec = CaptionSpec(batch=len(images), length=tiny.LENGTH, start=START, eos=LAST)
        if beams is None:
            return greedy(learner.decode_step, learner.init_decoding(images), spec)
        cache = learner.init_decoding(images, beams)
        return beam_search(learner.decode_step, cache, spec, beams=beams)

    jitted = tiny.jitted(captioner, decode, static_argnums=2)
    return lambda images, beams: np.asarray(jitted(images, beams))


@pytest.mark.slow
def test_captions_are_those_of_plain_python_without_a_cache(captioner, decode):
    images = tiny.images(6)
    encoded = tiny.jitted(captioner, lambda learner, images: learner.encode(images))(images).tokens
    predict = tiny.jitted(
        captioner, lambda learner, *args: jax.nn.log_softmax(learner.predict(*args))
    )
    found = decode(images, 3)
    for image in range(len(images)):

        def log_probs(past, image=image):
            text = np.zeros((1, tiny.LENGTH), np.int32)
            text[0, : len(past)] = past
            return np.asarray(predict(encoded[image : image + 1], text))[0, len(past)]

        _, caption = plain(log_probs, beams=3, length=tiny.LENGTH, eos=LAST)
        assert found[image].tolist() == padded(caption, tiny.LENGTH)
    assert len({tuple(row) for row in found}) == 6
    assert len(set(np.sum(found != 0, axis=1))) > 2
    np.testing.assert_array_equal(decode(images, 1), decode(images, None))
    assert (decode(images, 1) != found).any()


def test_a_caption_does_not_depend_on_its_batch(decode):
    images = tiny.images(6)
    found = decode(images, 3)
    np.testing.assert_array_equal(decode(images[[4, 2]], 3), found[[4, 2]])
