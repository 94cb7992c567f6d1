"""Cap and CapPa: forward pass against torch, losses against NumPy, masks of parallel prediction."""

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.models.text import PAD
from cap_pretrain.training import plan
from cap_pretrain.training.step import loss_and_stats
from tests import tiny, toy

KEY = jax.random.key(3)
MIXED = np.array([True, False, True, False])


@pytest.fixture(scope="module")
def cap():
    """A captioner as (graphdef, params, stats)."""
    return tiny.split(tiny.config())


@pytest.fixture(scope="module")
def predict(cap):
    """Function (text, parallel) -> logits, for the images of the batch."""
    encoded = tiny.jitted(cap, lambda learner, images: learner.encode(images))(tiny.images(4))
    logits = tiny.jitted(cap, lambda learner, *args: learner.predict(*args))
    return lambda text, parallel: np.asarray(logits(encoded.tokens, text, parallel))


@pytest.fixture(scope="module")
def batch(predict):
    """Captions of full, short, zero and one-token length, with some correctly predicted tokens."""
    text = tiny.texts([7, 4, 0, 1])
    for parallel, position in ((False, 0), (True, 2)):
        predicted = predict(text, np.full(4, parallel)).argmax(-1)
        assert predicted[:2, position].all()  # no padding in the middle
        text[:2, position] = predicted[:2, position]
    return {"image": tiny.images(4), "text": text}


def loss_with(cap, train, **options):
    """Function (batch, key) -> loss, metrics, for the same captioner with these options."""
    graphdef, _, _ = tiny.abstract(tiny.config(options=options))
    return tiny.jitted((graphdef, *cap[1:]), lambda learner, *args: learner.loss(*args, train))


# Forward


@pytest.mark.parity
@pytest.mark.parametrize("parallel", [MIXED, ~MIXED], ids=["mixed", "the other way"])
def test_logits_are_those_of_torch(cap, predict, parallel):
    from tests import torch_reference

    text = tiny.texts([7, 7, 4, 2])
    expected = torch_reference.captioner(cap[1], tiny.images(4), text, parallel, tiny.HEADS)
    logits = predict(text, parallel)
    assert logits.shape == (4, tiny.LENGTH, tiny.VOCAB) and logits.std() > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_mixed_batch_is_its_two_pure_ones_row_by_row(predict):
    text = tiny.texts([7, 7, 4, 2])
    one, all_of_it = predict(text, np.zeros(4, bool)), predict(text, np.ones(4, bool))
    expected = np.where(MIXED[:, None, None], all_of_it, one)
    np.testing.assert_allclose(predict(text, MIXED), expected, atol=1e-6)
    assert np.abs(one - all_of_it).max() > 0.1


# What a position attends to


def test_parallel_prediction_sees_no_token(predict):
    one, other = tiny.texts([7] * 4, seed=0), tiny.texts([1, 3, 5, 7], seed=1)
    parallel = np.ones(4, bool)
    logits = predict(one, parallel)
    np.testing.assert_array_equal(logits, predict(other, parallel))
    assert np.abs(logits[:, 1:] - logits[:, :-1]).max(-1).min() > 0.01  # positions differ
    assert np.abs(logits[1:] - logits[:-1]).max(-1).min() > 0.01  # images differ


@pytest.mark.parametrize("changed", [0, 3, tiny.LENGTH - 1])
def test_autoregressive_prediction_sees_only_earlier_tokens(predict, changed):
    text = tiny.texts([7] * 4)
    other = text.copy()
    other[:, changed] = 1 + text[:, changed] % (tiny.VOCAB - 1)
    difference = predict(other, np.zeros(4, bool)) - predict(text, np.zeros(4, bool))
    difference = np.abs(difference).max((0, 2))
    assert not difference[: changed + 1].any()
    assert (difference[changed + 1 :] > 1e-3).all()


def test_gradients_show_the_causal_mask_and_its_absence(cap):
    graphdef, params, stats = cap
    image, text = tiny.images(1), tiny.texts([7])
    direction = np.random.default_rng(0).standard_normal(tiny.VOCAB)

    def outputs(positions, parallel):
        learner = nnx.merge(graphdef, {**params, "text_positions": positions}, stats)
        logits = learner.predict(learner.encode(image).tokens, text, parallel)
        return logits[0] @ direction

    jacobian = jax.jit(jax.jacrev(outputs))  # [T, T, D]
    earlier = np.tril(np.ones((tiny.LENGTH, tiny.LENGTH), bool))
    for parallel, allowed in ((False, earlier), (True, np.ones_like(earlier))):
        sees = np.abs(jacobian(params["text_positions"], np.array([parallel]))).max(-1)
        assert not sees[~allowed].any()
        assert (sees[allowed] > 1e-4).all()


# The fraction of parallel examples


def test_share_of_parallel_examples(cap, predict):
    # All examples are identical, so the mean loss reveals how many were predicted in parallel.
    size, keys, fraction = 8, 150, 0.75
    text = tiny.texts([5] * 4)
    sequential, together = (
        caption_loss(predict(text, np.full(4, parallel))[:1], text[:1])
        for parallel in (False, True)
    )
    batch = {"image": tiny.images(4)[:1].repeat(size, 0), "text": text[:1].repeat(size, 0)}
    loss = jax.vmap(loss_with(cap, True, parallel_fraction=fraction), in_axes=(None, 0))
    losses, metrics = jax.device_get(loss(batch, jax.random.split(KEY, keys)))
    counts = size * (losses - sequential) / (together - sequential)
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-2)
    five_deviations = 5 * (fraction * (1 - fraction) / (size * keys)) ** 0.5
    assert abs(counts.mean() / size - fraction) < five_deviations
    # Drawn per example, not per batch: the deviation is that of a binomial, within a third.
    assert counts.std() == pytest.approx((size * fraction * (1 - fraction)) ** 0.5, rel=0.33)
    np.testing.assert_allclose(metrics["parallel_share"], counts / size, atol=1e-3)
    np.testing.assert_allclose(metrics["loss_parallel"][counts > 0.5], together, rtol=1e-4)
    rest = metrics["loss_autoregressive"][counts < size - 0.5]
    np.testing.assert_allclose(rest, sequential, rtol=1e-4)


# Losses


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def average_over(values, text, average):
    """Average over the tokens of each caption, then over captions; or over all tokens."""
    captions = [row[t != PAD] for row, t in zip(values, text, strict=True) if (t != PAD).any()]
    if average == "token":
        return np.concatenate(captions).mean()
    return np.mean([caption.mean() for caption in captions])


def caption_loss(logits, text, average="example", smoothing=0.0):
    """Cross-entropy with (smoothed) one-hot targets."""
    target = (1 - smoothing) * np.eye(logits.shape[-1])[text] + smoothing / logits.shape[-1]
    return average_over(-(target * log_softmax(logits)).sum(-1), text, average)


SOME = np.array([True, False, True, True])


@pytest.mark.parametrize(
    ("average", "fraction", "train", "mask"),
    [
        ("example", 0.0, True, None),
        ("example", 1.0, True, SOME),
        ("example", 1.0, False, SOME),  # evaluation is autoregressive and without label smoothing
        ("token", 0.0, True, SOME),
        ("token", 1.0, False, None),
    ],
)
def test_loss_is_its_formula(cap, batch, predict, average, fraction, train, mask):
    options = dict(average=average, parallel_fraction=fraction, label_smoothing=0.1)
    given = batch if mask is None else batch | {"mask": mask}
    loss, metrics = loss_with(cap, train, **options)(given, KEY)
    logits, text = predict(batch["text"], np.full(4, bool(train and fraction))), batch["text"]
    if mask is not None:  # masked examples do not count
        logits, text = logits[mask], text[mask]
    expected = caption_loss(logits, text, average, 0.1 if train else 0.0)
    assert loss == pytest.approx(expected, rel=1e-5)
    tokens = text != PAD
    assert metrics["loss_weight"] == (tokens if average == "token" else tokens.any(1)).sum()
    right = average_over(logits.argmax(-1) == text, text, average)
    assert 0 < right < 1
    assert metrics["token_accuracy"] == pytest.approx(right)
    assert ("parallel_share" in metrics) == bool(train and fraction)


def test_nothing_to_learn_from_is_a_loss_and_gradients_of_zero(cap, batch):
    graphdef, params, stats = cap
    empty = batch | {"mask": np.zeros(4, bool)}

    def loss(logits_layer):
        decoder = {**params["decoder"], "logits": logits_layer}
        return loss_and_stats(graphdef, {**params, "decoder": decoder}, stats, empty, KEY)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params["decoder"]["logits"])
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


# Size and cost


@pytest.mark.parametrize(
    ("model", "total", "encoder", "decoder"),
    [
        ("S/16", "60.5", "21.7", "38.8"),
        ("M/16", "96.3", "38.3", "58.0"),
        ("B/16", "191.7", "85.8", "105.8"),
        ("L/14", "570.2", "303.2", "266.9"),
    ],
)
def test_parameters_are_those_of_the_paper(model, total, encoder, decoder):
    c = toy.load("pretrain", f"objective=cappa,model={model}")
    counts = plan.count_parameters(tiny.abstract(c, vocab=c.text.vocab_size)[1])
    printed = [f"{counts[part] / 1e6:.1f}" for part in ("total", "encoder", "decoder")]
    assert printed == [total, encoder, decoder]


def test_flops_are_their_closed_form():
    c = tiny.config(remat="full")
    d, mlp, t, n = c.model.width, c.model.mlp, tiny.LENGTH, 16
    patches = 2 * n * (tiny.PATCH**2 * 3) * d
    encoder = 4 * 2 * n * d * d + 2 * 2 * n * n * d + 2 * 2 * n * d * mlp
    self_attention = 4 * 2 * t * d * d + 2 * 2 * t * t * d
    cross_attention = 2 * 2 * t * d * d + 2 * 2 * n * d * d + 2 * 2 * t * n * d
    decoder = self_attention + cross_attention + 2 * 2 * t * d * mlp
    forward = patches + 3 * encoder + 2 * decoder + 2 * t * d * tiny.VOCAB
    counted = plan.flops_per_example(c, tiny.VOCAB)
    assert counted["forward"] == forward
    # The backward pass costs twice the forward pass, but pixels need no gradient. Rematerialization
    # does not count.
    assert counted["training"] == 3 * forward - patches
