"""Several captions per image with their log-probabilities, and rules on tokens, in each method."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.models.decoding import CaptionSpec, Decoding, decode_all, write_all
from tests import tiny
from tests.learners import test_recurrent
from tests.models.plain_search import ruled, search
from tests.models.test_beam_search import EOS, IMAGES, START, Recurrent, padded
from tests.models.test_beam_search import recurrent_step as step

RULES = dict(min_length=2, repetition_penalty=1.4, no_repeat_ngram=2)
HOW = {
    "greedy": Decoding(**RULES),
    "beam": Decoding("beam", beams=3, captions=3),
    "beam_with_rules": Decoding("beam", beams=3, captions=2, length_norm=0.5, **RULES),
    "groups": Decoding("beam", beams=6, groups=3, captions=5, diversity=0.7, **RULES),
    "sample": Decoding("sample", captions=4, top_k=3, **RULES),
}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _decoded(weights, how, length, prompt, keys):
    cache = (jnp.zeros((IMAGES * how.rows, 8)), weights)
    spec = CaptionSpec(batch=IMAGES, length=length, start=START, eos=EOS)
    return decode_all(step, cache, how, spec, keys=keys, prompt=prompt)


def decoded(decoder, how, prompts, length=7, seed=0):
    prompts = np.array([padded(prompt, length) for prompt in prompts], np.int32)
    keys = jax.random.split(jax.random.key(seed), IMAGES)
    return jax.device_get(_decoded(decoder.weights, how, length, prompts, keys))


def logits_of(decoder, image):
    return lambda past: decoder._state(image, (START, *past)) @ decoder.weights["out"]


def log_p(logits, caption, given=0):
    """Return the log-probability of a caption after its prompt, by the decoder itself."""
    total = 0.0
    for n in range(given, len(caption)):
        own = logits(tuple(caption[:n])).astype(np.float64)
        total += own[caption[n]] - np.log(np.sum(np.exp(own)))
    return total


@pytest.mark.parametrize(
    "name",
    [
        "groups",
        pytest.param("beam", marks=pytest.mark.slow),
        pytest.param("beam_with_rules", marks=pytest.mark.slow),
    ],
)
def test_a_search_is_that_of_plain_python(name):
    how, prompts, different = HOW[name], [[2, 4], [], [3]], 0
    for seed in range(6):
        decoder = Recurrent(seed)
        found = decoded(decoder, how, prompts)
        for image, prompt in enumerate(prompts):
            logits = logits_of(decoder, image)
            expected = search(logits, how, length=7, prompt=prompt)
            assert len(expected) == how.captions
            for tokens, score, (caption, total) in zip(
                found.tokens[image], found.log_p[image], expected, strict=True
            ):
                assert tokens.tolist() == padded(caption, 7)
                assert score == pytest.approx(total, abs=1e-4)
                assert score == pytest.approx(log_p(logits, caption, len(prompt)), abs=1e-4)
            different += len({caption for caption, _ in expected}) == how.captions
    assert different > 3


def caption_of(tokens):
    """Return the tokens up to the end or the padding; the toy decoder also writes token 0."""
    ends = np.flatnonzero(tokens == EOS)
    return tuple(tokens[: ends[0] + 1].tolist()) if len(ends) else tuple(tokens.tolist())


def test_greedy_decoding_and_samples_follow_the_rules():
    for name, seed in itertools.product(("greedy", "sample"), range(3)):
        how, decoder, prompts = HOW[name], Recurrent(seed), [[2, 4], [], [3]]
        found = decoded(decoder, how, prompts, seed=seed)
        assert found.tokens.shape == (IMAGES, how.captions, 7)
        for image, prompt in enumerate(prompts):
            logits = logits_of(decoder, image)
            for tokens, score in zip(found.tokens[image], found.log_p[image], strict=True):
                caption = caption_of(tokens)
                assert score == pytest.approx(log_p(logits, caption, len(prompt)), abs=1e-4)
                for n in range(len(prompt), len(caption)):
                    past = caption[:n]
                    allowed = ruled(past, logits(past), how, given=len(prompt), eos=EOS)
                    best = np.argsort(-allowed)[: 1 if name == "greedy" else 3]
                    assert caption[n] in best


def test_the_first_captions_are_those_that_are_found_alone():
    decoder, prompts = Recurrent(1), [[2, 4], [], [3]]
    one = decoded(decoder, Decoding("sample"), prompts)
    several = decoded(decoder, Decoding("sample", captions=5), prompts)
    np.testing.assert_array_equal(several.tokens[:, 0], one.tokens[:, 0])
    np.testing.assert_allclose(several.log_p[:, 0], one.log_p[:, 0], rtol=1e-6)
    assert sum(len({tuple(row) for row in of_image}) for of_image in several.tokens) > 6


@pytest.mark.slow
def test_more_captions_extend_fewer():
    for seed in range(4):
        decoder, prompts = Recurrent(seed), [[], [], []]
        one, three = (
            decoded(decoder, Decoding("beam", beams=4, captions=n), prompts) for n in (1, 3)
        )
        np.testing.assert_array_equal(three.tokens[:, :1], one.tokens)


# Learners: with a cache as when all is predicted anew


def learner_of(kind):
    """Return a learner whose captions depend on the image, split."""
    if kind != "captioner":
        return test_recurrent.random(kind)
    graphdef, params, stats = tiny.split(tiny.config(), seed=64)
    params["decoder"]["blocks"]["cross_attention"]["value"]["kernel"] *= 4
    params["decoder"]["logits"]["bias"] *= 0
    return graphdef, params, stats


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captioner", *test_recurrent.KINDS])
def test_learners_write_what_a_search_without_cache_finds(kind):
    split, images, eos = learner_of(kind), tiny.images(3), 15
    how = Decoding("beam", beams=4, groups=2, captions=3, **RULES)
    write = tiny.jitted(
        split,
        lambda learner, images: write_all(learner, images, how, length=tiny.LENGTH, eos=eos),
    )
    found = jax.device_get(write(images))
    predict = tiny.jitted(
        split,
        lambda learner, images, text: learner.predict(learner.image_features(images), text),
    )
    for image in range(len(images)):

        def logits(past, image=image):
            text = np.zeros((1, tiny.LENGTH), np.int32)
            text[0, : len(past)] = past
            return np.asarray(predict(images[image : image + 1], text))[0, len(past)]

        expected = search(logits, how, length=tiny.LENGTH, eos=eos)
        assert [padded(caption, tiny.LENGTH) for caption, _ in expected] == found.tokens[
            image
        ].tolist()
        np.testing.assert_allclose(found.log_p[image], [total for _, total in expected], atol=1e-3)


@pytest.mark.slow
def test_log_probabilities_are_those_of_teacher_forcing():
    split, images, eos = learner_of("captioner"), tiny.images(4), 15
    split[1]["decoder"]["logits"]["bias"] += -50.0 * (jnp.arange(tiny.VOCAB) == 0)  # no padding
    keys = jax.random.split(jax.random.key(0), 4)
    how = Decoding("sample", captions=3, temperature=0.5, **RULES)
    options = dict(length=tiny.LENGTH, eos=eos)
    found = tiny.jitted(
        split, lambda learner, *a: write_all(learner, a[0], how, keys=a[1], **options)
    )(images, keys)
    scores = tiny.jitted(split, lambda learner, *a: learner.score(*a))(images, found.tokens)
    np.testing.assert_allclose(found.log_p, scores, atol=1e-4)
