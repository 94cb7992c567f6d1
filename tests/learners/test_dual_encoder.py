"""CLIP and SigLIP: forward pass against torch, losses against NumPy, masks, parameter counts."""

import math

import jax
import numpy as np
import pytest

from cap_pretrain import learners
from cap_pretrain.learners.pairs import LOSSES
from cap_pretrain.training import plan
from cap_pretrain.training.step import split_learner
from tests import tiny, toy

KEY = jax.random.key(0)


def clip_loss(logits):
    def cross_entropy(rows):
        return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(rows)])

    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def siglip_loss(logits):
    signs = np.where(np.eye(len(logits)), 1, -1)
    return np.log1p(np.exp(-signs * logits)).sum() / len(logits)


FORMULAS = {"softmax": clip_loss, "sigmoid": siglip_loss}
SOME = np.array([True, True, False, True, False, True])


@pytest.fixture(scope="module", params=FORMULAS)
def dual(request):
    """The loss formula, the split learner, the batch, and a function of the mask."""
    split = tiny.split(tiny.config("dual_encoder", {"contrast": request.param}))
    batch = {"image": tiny.images(6), "text": tiny.texts([7, 4, 0, 1, 6, 7])}

    def forward(learner, batch):
        images, texts = learner.embed_images(batch["image"]), learner.embed_text(batch["text"])
        return (images, texts, learner.logits(images, texts)), learner.loss(batch, KEY, False)

    jitted = tiny.jitted(split, forward)
    return FORMULAS[request.param], split, batch, lambda mask: jitted(batch | {"mask": mask})


@pytest.mark.parity
def test_embeddings_and_logits_are_those_of_torch(dual):
    from tests import torch_reference

    _, split, batch, forward = dual
    expected = torch_reference.dual_encoder(split[1], batch["image"], batch["text"], tiny.HEADS)
    expected = [part.numpy() for part in expected]
    for ours, theirs in zip(forward(SOME)[0], expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("mask", [np.ones(6, bool), SOME], ids=["all", "some"])
def test_loss_is_its_formula_over_the_examples_that_are_not_masked(dual, mask):
    formula, *_, forward = dual
    (_, _, logits), (loss, metrics) = forward(mask)
    logits = np.asarray(logits)  # the parity test compares them with torch's
    logits = logits[np.ix_(mask, mask)].astype(np.float64)
    assert loss == pytest.approx(formula(logits), rel=1e-4)
    assert metrics["loss_weight"] == mask.sum()
    for name, axis in (("image_to_text_accuracy", 1), ("text_to_image_accuracy", 0)):
        accuracy = (logits.argmax(axis) == np.arange(len(logits))).mean()
        assert metrics[name] == pytest.approx(accuracy)


def loss_of(name):
    """Function (logits, valid) -> sum of the loss over a batch."""
    return lambda logits, valid: LOSSES[name](
        logits, np.eye(len(logits), dtype=bool), valid[:, None] & valid
    )


@pytest.mark.parametrize("contrast", LOSSES)
def test_masked_logits_have_no_gradient_and_valid_ones_do(contrast):
    logits = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    valid = np.array([True, False, True, True])
    gradient = np.asarray(jax.grad(loss_of(contrast))(logits, valid))
    assert not gradient[1].any() and not gradient[:, 1].any()
    assert gradient[np.ix_(valid, valid)].all()
    nothing = jax.value_and_grad(loss_of(contrast))(logits, np.zeros(4, bool))
    assert not any(np.any(x) for x in nothing)


@pytest.mark.parametrize("contrast", LOSSES)
def test_sure_and_right_costs_nothing_sure_and_wrong_is_finite(contrast):
    valid = np.ones(3, bool)
    right = 1000 * (2 * np.eye(3, dtype=np.float32) - 1)
    assert loss_of(contrast)(right, valid) == 0
    assert 1500 < loss_of(contrast)(-right, valid) < 30_000


@pytest.mark.parametrize(
    ("contrast", "scale", "bias"), [("softmax", 1 / 0.07, None), ("sigmoid", 10, -10)]
)
def test_initial_scale_and_bias(contrast, scale, bias):
    c = tiny.config("dual_encoder", {"contrast": contrast})

    def scalars():
        params = split_learner(learners.build(c, tiny.VOCAB, KEY))[1]
        return {name: leaf for name, leaf in params.items() if name in ("log_scale", "bias")}

    params = jax.jit(scalars)()
    assert math.exp(params["log_scale"]) == pytest.approx(scale, rel=1e-5)
    assert params.get("bias") == bias


@pytest.mark.parametrize(
    ("model", "pool", "total"),
    [("B/16", "gap", "196.7"), ("B/16", "map", "203.7"), ("L/14", "gap", "640.4")],
)
def test_parameters_are_those_of_the_paper(model, pool, total):
    c = toy.load("pretrain", f"objective=clip,model={model}")
    c.model.pool = pool
    counts = plan.count_parameters(tiny.abstract(c, vocab=c.text.vocab_size)[1])
    assert f"{counts['total'] / 1e6:.1f}" == total
