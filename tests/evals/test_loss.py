"""The validation loss depends on the split, not on its batches."""

import math
from collections import Counter

import jax
import numpy as np
import pytest

from cap_pretrain import evals, inputs, learners
from cap_pretrain.distributed import sharding
from cap_pretrain.evals.base import Context
from cap_pretrain.evals.loss import Loss
from cap_pretrain.training import step
from tests import toy


def context_of(c, tokenizer_path):
    tokenizer = inputs.open_tokenizer(c, tokenizer_path)
    learner = learners.build(c, tokenizer.vocab_size, jax.random.key(0))
    graphdef, params, stats = step.split_learner(learner)
    # Random, since a new logits layer makes every token equally likely.
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(1), p.shape), params)
    return Context(c, graphdef, tokenizer, sharding.make_mesh(c)), (params, stats)


@pytest.fixture(scope="module")
def captioner(tokenizer_path):
    return context_of(toy.config(model__depth=1, data__scenes__length_val=13), tokenizer_path)


def measured(captioner, **options):
    context, variables = captioner
    return Loss(context, Loss.Options(**options))(variables)


def test_the_batch_size_and_padding_do_not_matter(captioner):
    results = [measured(captioner, batch_size=size) for size in (3, 5, 13)]
    for result in results:
        assert result.metrics.keys() == {"loss", "token_accuracy"}
        assert result.details == {
            "protocol": "the learner's own loss, its mean over examples",
            "dataset": "scenes",
            "split": "val",
            "examples": 13,
        }
        for name, value in result.metrics.items():
            np.testing.assert_allclose(value, results[0].metrics[name], rtol=1e-5, err_msg=name)
    assert not math.isclose(results[0].metrics["loss"], math.log(100), rel_tol=0.01)


def test_a_task_is_averaged_over_its_texts(captioner):
    context, variables = captioner
    loss = Loss(context, Loss.Options(batch_size=5))
    found = iter([(4.0, 1.0, 3.0), (0.0, 2.0, 0.0), (0.0, 3.0, 0.0)])  # loss_box of nothing is 0

    def batch_loss(*_):
        box, of_all, boxes = next(found)
        weights = {"loss_weight": 4, "loss_box_weight": boxes, "loss_no_weight": 0}
        return {"loss": of_all, "loss_box": box, "loss_no": 0, "examples": 4} | weights

    loss._loss = batch_loss
    assert loss(variables).metrics == {"loss": 2.0, "loss_box": 4.0}


def test_limit_takes_the_first_examples(captioner):
    whole, limited = measured(captioner, batch_size=5), measured(captioner, batch_size=5, limit=7)
    assert limited.details["examples"] == 7
    assert limited.metrics["loss"] != whole.metrics["loss"]
    context, variables = captioner
    source = context.source()
    tokenizer = context.tokenizer
    batch = {
        "image": np.stack([source[i]["image"] for i in range(7)]),
        "text": np.stack([tokenizer.encode(source[i]["captions"][0]) for i in range(7)]),
    }
    loss, _ = step.loss_and_stats(context.graphdef, *variables, batch, jax.random.key(0))
    np.testing.assert_allclose(limited.metrics["loss"], loss, rtol=1e-5)


def test_the_unigram_model_counts_the_training_captions(captioner):
    context, _ = captioner
    tokenizer = context.tokenizer

    def tokens(caption):
        return [int(i) for i in tokenizer.encode(caption) if i != 0]

    train, val = context.source("train"), context.source("val")
    counts = Counter(t for i in range(len(train)) for c in train[i]["captions"] for t in tokens(c))
    total = sum(counts.values()) + tokenizer.vocab_size  # add-one smoothing
    nll = [
        np.mean([-math.log((counts[t] + 1) / total) for t in tokens(val[i]["captions"][0])])
        for i in range(13)
    ]
    result = measured(captioner, batch_size=5, unigram=True)
    np.testing.assert_allclose(result.metrics["unigram_loss"], np.mean(nll), rtol=1e-6)


def test_contrastive_learners_are_measured_in_their_batches(tokenizer_path):
    c = toy.config("dual_encoder", model__depth=1, data__scenes__length_val=13)
    result = measured(context_of(c, tokenizer_path), batch_size=13)
    assert {"loss", "image_to_text_accuracy", "text_to_image_accuracy"} <= result.metrics.keys()
    assert 0 <= result.metrics["image_to_text_accuracy"] <= 1
    assert evals.defaults("loss").evaluator == "loss"
