"""Prompted decoding against exhaustive search, plain Python and the full forward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.models.decoding import CaptionSpec, Decoding, decode
from tests import tiny
from tests.models.test_beam_search import EOS, IMAGES, START, VOCAB, Recurrent, padded, plain
from tests.models.test_beam_search import recurrent_step as step


@functools.partial(jax.jit, static_argnums=(1, 2))
def _decoded(weights, how, length, prompt, keys):
    cache = (jnp.zeros((IMAGES * how.rows, 8)), weights)
    spec = CaptionSpec(batch=IMAGES, length=length, start=START, eos=EOS)
    return decode(step, cache, how, spec, keys=keys, prompt=prompt)


def decoded(decoder, how, prompts, length, seed=0):
    """Return captions [IMAGES, length] that begin with `prompts`, a list of tokens per image."""
    if prompts is not None:
        prompts = np.array([padded(prompt, length) for prompt in prompts], np.int32)
    keys = jax.random.split(jax.random.key(seed), IMAGES)
    return np.asarray(_decoded(decoder.weights, how, length, prompts, keys))


@pytest.mark.parametrize("norm", [0.0, 0.6, 1.0])
def test_wide_enough_a_beam_finds_the_best_continuation_of_all(norm):
    length, decoder = 4, Recurrent(0, vocab=4)
    words = [token for token in range(4) if token != EOS]
    prompts = [[], [3], [2, 2]]
    how = Decoding(method="beam", beams=121, length_norm=norm)
    found = decoded(decoder, how, prompts, length)
    for image, prompt in enumerate(prompts):
        free = length - len(prompt)
        continuations = [
            (*said, EOS) for n in range(free) for said in itertools.product(words, repeat=n)
        ]
        continuations += itertools.product(words, repeat=free)

        def score(said, image=image, prompt=prompt):
            parts = (decoder.log_probs(image, (*prompt, *said[:n]))[w] for n, w in enumerate(said))
            return sum(parts) / len(said) ** norm

        best = max(continuations, key=score)
        assert found[image].tolist() == padded([*prompt, *best], length)


@pytest.mark.parametrize(("beams", "norm"), [(1, 1.0), (2, 0.0), (3, 1.0)])
def test_a_narrow_beam_is_that_of_plain_python_after_the_prompt(beams, norm):
    lengths = set()
    how = Decoding(method="beam", beams=beams, length_norm=norm)
    for seed in range(4):
        decoder = Recurrent(seed)
        prompts = [[2, 4], [], [3, 3, 2]]
        found = decoded(decoder, how, prompts, length=7)
        for image, prompt in enumerate(prompts):

            def log_probs(past, image=image, prompt=prompt, decoder=decoder):
                return decoder.log_probs(image, (*prompt, *past))

            _, said = plain(log_probs, beams=beams, length=7 - len(prompt), norm=norm)
            assert found[image].tolist() == padded([*prompt, *said], 7)
            lengths.add(len(said))
    assert len(lengths) > 2


def test_what_is_given_costs_nothing_and_has_no_length():
    # Neither the probability nor the length of the prompt affects the continuation. The first two
    # continuations have log-probability log 0.3, and means log 0.3 and log 0.3 / 2.
    table = np.full((5, 5), 1e-9)
    table[0, 2] = 1 - 1e-6  # the prompt [3, 3] is nearly impossible
    table[3] = [1e-9, 0.3, 0.32, 1e-9, 0.38]
    table[2] = [1e-9, 0.9, 0.04, 0.03, 0.03]
    table[4] = [1e-9, 0.2, 0.2, 0.3, 0.3]

    def scripted(tokens, position, cache):
        return jnp.log(jnp.asarray(table))[tokens], cache

    said = {}
    for norm in (0.0, 1.0):
        how = Decoding(method="beam", beams=4, length_norm=norm)
        prompt = np.array([[3, 3, 0, 0, 0], [3, 0, 0, 0, 0]], np.int32)
        spec, cache = CaptionSpec(batch=2, length=5, start=0, eos=EOS), (jnp.zeros((8, 1)), ())
        said[norm] = np.asarray(decode(scripted, cache, how, spec, prompt=prompt))
    # log 0.3 against log (0.32 * 0.9) = log 0.288: the shorter wins, but by the mean the longer.
    np.testing.assert_array_equal(said[0.0], [[3, 3, 1, 0, 0], [3, 1, 0, 0, 0]])
    np.testing.assert_array_equal(said[1.0], [[3, 3, 2, 1, 0], [3, 2, 1, 0, 0]])


METHODS = {
    "greedy": Decoding(),
    "beam": Decoding(method="beam", beams=3),
    "sample": Decoding(method="sample", temperature=1.5, top_k=4, top_p=0.9),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_prompt_changes_nothing(method):
    how, captions = METHODS[method], set()
    for seed in range(4):
        decoder = Recurrent(seed)
        without = decoded(decoder, how, None, 7, seed)
        np.testing.assert_array_equal(decoded(decoder, how, [[]] * IMAGES, 7, seed), without)
        captions.update(map(tuple, without))
    assert len(captions) > 4


def test_samples_begin_with_the_prompt_and_draw_the_rest():
    prompts = [[2, 4], [], [3, 3, 2]]
    decoder = Recurrent(1)
    likeliest = decoded(decoder, Decoding(), prompts, 7)
    only = Decoding(method="sample", top_k=1)
    np.testing.assert_array_equal(decoded(decoder, only, prompts, 7), likeliest)
    drawn = [decoded(decoder, METHODS["sample"], prompts, 7, seed) for seed in range(5)]
    for captions in drawn:
        assert captions[0, :2].tolist() == [2, 4] and captions[2, :3].tolist() == [3, 3, 2]
    assert len({tuple(captions[0]) for captions in drawn}) > 1


# The captioner


@pytest.fixture(scope="module")
def captioner():
    graphdef, params, stats = tiny.split(tiny.config(), seed=57)
    params["decoder"]["blocks"]["cross_attention"]["value"]["kernel"] *= 2
    params["decoder"]["logits"]["bias"] *= 0
    return graphdef, params, stats


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_with_the_cache_as_when_all_is_predicted_anew(captioner, method):
    images, eos, how = tiny.images(4), 15, METHODS[method]
    prompt = tiny.texts([0, 2, 3, 5], seed=4)
    prompt = np.where(prompt == eos, 2, prompt)

    def write(learner, images, prompt):
        cache = learner.init_decoding(images, how.rows)
        spec = CaptionSpec(batch=4, length=tiny.LENGTH, start=START, eos=eos)
        return decode(learner.decode_step, cache, how, spec, prompt=prompt)

    found = np.asarray(tiny.jitted(captioner, write)(images, prompt))
    encoded = tiny.jitted(captioner, lambda learner, images: learner.encode(images))(images).tokens
    predict = tiny.jitted(
        captioner, lambda learner, *args: jax.nn.log_softmax(learner.predict(*args))
    )
    for row in range(4):
        given = prompt[row][prompt[row] != 0].tolist()

        def log_probs(past, row=row, given=given):
            text = np.zeros((1, tiny.LENGTH), np.int32)
            said = [*given, *past]
            text[0, : len(said)] = said
            return np.asarray(predict(encoded[row : row + 1], text))[0, len(said)]

        free = tiny.LENGTH - len(given)
        _, said = plain(log_probs, beams=how.rows, length=free, eos=eos)
        assert found[row].tolist() == padded([*given, *said], tiny.LENGTH)
    assert len({token for row in found for token in row.tolist()}) > VOCAB
