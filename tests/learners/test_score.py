"""Scores of texts for images: log-likelihoods by hand, cosines, and invariances."""

import numpy as np
import pytest

from tests import tiny

IMAGES, TEXTS = 5, 3


@pytest.fixture(scope="module")
def text():
    """Return texts [B, C, T] of every length from one token."""
    lengths = [1 + i % tiny.LENGTH for i in range(IMAGES * TEXTS)]
    return tiny.texts(lengths).reshape(IMAGES, TEXTS, tiny.LENGTH)


@pytest.fixture(scope="module", params=["captioner", "dual_encoder"])
def learner(request):
    """Name, split learner and its jitted `score`."""
    split = tiny.split(tiny.config(request.param))
    return request.param, split, tiny.jitted(split, lambda learner, *args: learner.score(*args))


@pytest.fixture(scope="module")
def scores(learner, text):
    return np.asarray(learner[2](tiny.images(IMAGES), text))


def test_captions_score_the_sum_of_their_tokens_log_softmax(text):
    split = tiny.split(tiny.config())
    score = tiny.jitted(split, lambda learner, *args: learner.score(*args))
    predict = tiny.jitted(
        split, lambda learner, images, text: learner.predict(learner.encode(images).tokens, text)
    )
    images = tiny.images(IMAGES)
    expected = np.zeros((IMAGES, TEXTS))
    for c in range(TEXTS):  # one text per image at a time, as in training
        logits = np.asarray(predict(images, text[:, c])).astype(np.float64)
        log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for b in range(IMAGES):
            for t, token in enumerate(text[b, c]):
                expected[b, c] += log_softmax[b, t, token] if token else 0
    np.testing.assert_allclose(score(images, text), expected, rtol=1e-5)
    assert np.ptp(expected) > 5


def test_dual_encoders_score_the_cosine(text):
    split = tiny.split(tiny.config("dual_encoder"))

    def embed(learner, images, text):
        return learner.embed_images(images), learner.embed_text(text)

    images, texts = tiny.jitted(split, embed)(tiny.images(IMAGES), text.reshape(-1, tiny.LENGTH))
    expected = np.einsum("bd,bcd->bc", images, texts.reshape(IMAGES, TEXTS, -1))
    score = tiny.jitted(split, lambda learner, *args: learner.score(*args))
    np.testing.assert_allclose(score(tiny.images(IMAGES), text), expected, atol=1e-6)
    assert np.ptp(expected) > 0.1 and np.abs(expected).max() <= 1


def test_scores_are_float32_and_each_pair_has_its_own(learner, scores, text):
    _, _, score = learner
    assert scores.shape == (IMAGES, TEXTS) and scores.dtype == np.float32
    assert len(np.unique(scores)) == scores.size
    for b, c in ((0, 0), (IMAGES - 1, TEXTS - 1)):  # scored alone, without the batch
        alone = score(tiny.images(IMAGES)[b : b + 1], text[b : b + 1, c : c + 1])
        np.testing.assert_allclose(alone[0, 0], scores[b, c], rtol=1e-5, atol=1e-6)
    order = np.random.default_rng(0).permutation(TEXTS)
    shuffled = score(tiny.images(IMAGES), text[:, order])
    np.testing.assert_allclose(shuffled, scores[:, order], rtol=1e-5, atol=1e-6)


def test_a_list_of_texts_is_compared_with_every_image(learner, text):
    _, split, score = learner
    shared = text.reshape(-1, tiny.LENGTH)
    compare = tiny.jitted(
        split,
        lambda learner, images, text: learner.compare(
            learner.image_features(images), learner.text_features(text)
        ),
    )
    images = tiny.images(IMAGES)
    expected = score(images, np.broadcast_to(shared, (IMAGES, *shared.shape)))
    np.testing.assert_allclose(compare(images, shared), expected, rtol=1e-5, atol=1e-6)


def test_padding_a_captioners_text_changes_nothing(text):
    split = tiny.split(tiny.config())
    score = tiny.jitted(split, lambda learner, *args: learner.score(*args))
    short = np.where(np.arange(tiny.LENGTH) < 4, text, 0)
    images = tiny.images(IMAGES)
    np.testing.assert_allclose(score(images, short[..., :4]), score(images, short), rtol=1e-5)


def test_an_option_of_training_has_no_say_in_evaluation(text):
    split = tiny.split(tiny.config())
    other, *_ = tiny.abstract(tiny.config(options={"parallel_fraction": 0.75}))

    def score(learner, *args):
        return learner.score(*args)

    args = (tiny.images(IMAGES), text)
    np.testing.assert_array_equal(
        tiny.jitted((other, *split[1:]), score)(*args), tiny.jitted(split, score)(*args)
    )
