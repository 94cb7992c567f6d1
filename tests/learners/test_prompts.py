"""Captioners with prompts: which tokens count, and which are read."""

import jax
import numpy as np
import pytest

from cap_pretrain.models.text import PAD
from tests import tiny
from tests.learners.test_captioner import KEY, log_softmax, loss_with

PROMPT = np.array([3, 0, 2, 4], np.int32)
TEXT = tiny.texts([7, 5, 6, 4])  # the last text is only a prompt


@pytest.fixture(scope="module")
def cap():
    return tiny.split(tiny.config())


@pytest.fixture(scope="module")
def encoded(cap):
    return tiny.jitted(cap, lambda learner, images: learner.encode(images))(tiny.images(4)).tokens


@pytest.fixture(scope="module")
def predict(cap, encoded):
    """Function (text, parallel, prompt) -> logits, for the images of the batch."""
    logits = tiny.jitted(
        cap,
        lambda learner, encoded, text, parallel, prompt: learner.predict(
            encoded, text, parallel, prompt=prompt
        ),
    )
    return lambda *args: np.asarray(logits(encoded, *args))


@pytest.mark.parametrize(
    ("average", "train", "fraction"),
    [("example", True, 0.0), ("token", True, 1.0), ("example", False, 1.0)],
)
def test_the_prompt_is_no_part_of_the_loss(cap, predict, average, train, fraction):
    logits = predict(TEXT, np.full(4, bool(train and fraction)), PROMPT)
    # One correct token in the prompt and one after it; only the latter counts.
    text = TEXT.copy()
    text[1, 2] = logits[1, 2].argmax() if train and fraction else text[1, 2]
    batch = {"image": tiny.images(4), "text": text, "prompt": PROMPT}
    options = dict(average=average, parallel_fraction=fraction)
    loss, metrics = loss_with(cap, train, **options)(batch, KEY)
    nll, right = [], []
    for row in range(3):  # the fourth has no target
        counted = (np.arange(tiny.LENGTH) >= PROMPT[row]) & (text[row] != PAD)
        scores = log_softmax(logits[row])[np.arange(tiny.LENGTH), text[row]]
        nll.append(-scores[counted])
        right.append((logits[row].argmax(-1) == text[row])[counted])
    join = np.concatenate if average == "token" else lambda rows: [np.mean(row) for row in rows]
    assert loss == pytest.approx(np.mean(join(nll)), rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(np.mean(join(right)))
    assert metrics["loss_weight"] == (4 + 5 + 4 if average == "token" else 3)


def test_parallel_prediction_reads_the_prompt_and_nothing_after_it(predict):
    parallel = np.ones(4, bool)
    logits = predict(TEXT, parallel, PROMPT)
    for changed in range(tiny.LENGTH):
        other = TEXT.copy()
        other[:, changed] = 1 + TEXT[:, changed] % (tiny.VOCAB - 1)
        difference = np.abs(predict(other, parallel, PROMPT) - logits).max((1, 2))
        assert ((difference > 1e-3) == (changed < PROMPT)).all(), changed
    mixed = predict(TEXT, np.array([True, False] * 2), PROMPT)
    np.testing.assert_allclose(mixed[::2], logits[::2], atol=1e-6)
    np.testing.assert_allclose(mixed[1::2], predict(TEXT, ~parallel, PROMPT)[1::2], atol=1e-6)


@pytest.mark.parametrize(("train", "fraction"), [(True, 0.75), (False, 0.0)])
def test_without_a_prompt_nothing_changes(cap, train, fraction):
    batch = {"image": tiny.images(4), "text": tiny.texts([7, 4, 0, 1])}
    loss = loss_with(cap, train, parallel_fraction=fraction)
    without, empty = (
        jax.device_get(loss(given, KEY)) for given in (batch, batch | {"prompt": 0 * PROMPT})
    )
    jax.tree.map(np.testing.assert_array_equal, without, empty)


def test_likelihoods_are_those_of_what_follows_the_prompt(cap, encoded, predict):
    compare = tiny.jitted(cap, lambda learner, *args: learner.compare(*args))
    text = np.stack([TEXT, np.roll(TEXT, 1, axis=0)], axis=1)  # two per image
    prompt = np.array([[3, 1], [0, 2], [2, 0], [1, 4]], np.int32)
    found = np.asarray(compare(encoded, text, prompt))
    whole = np.asarray(compare(encoded, text))
    for k in range(2):
        logits = log_softmax(predict(text[:, k], None, 0))
        for row in range(4):
            scores = logits[row, np.arange(tiny.LENGTH), text[row, k]] * (text[row, k] != PAD)
            assert found[row, k] == pytest.approx(scores[prompt[row, k] :].sum(), rel=1e-5)
            assert whole[row, k] == pytest.approx(scores.sum(), rel=1e-5)
    same = np.asarray(compare(encoded, TEXT, PROMPT))
    np.testing.assert_allclose(
        same, compare(encoded, np.broadcast_to(TEXT, (4, *TEXT.shape)), np.tile(PROMPT, (4, 1)))
    )
