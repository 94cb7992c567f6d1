"""The classifier: trainable and frozen parts, loss and accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cap_pretrain import learners
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.accuracy import Accuracy
from cap_pretrain.learners.classifier import Classifier
from cap_pretrain.training import step
from tests import tiny, toy
from tests.evals.labelled import Among, Coloured
from tests.evals.stubs import Numbers

FROZEN = (("encoder/.*", 0.0),)
SOURCE = Coloured(96, 6, clear=90)


def config(classes=6, **fields):
    c = tiny.config("classifier", {"classes": classes})
    with c.unlocked():
        for name, value in fields.items():
            section, _, field = name.rpartition("__")
            (c[section] if section else c)[field] = value
    return c


def batch():
    images = np.stack([SOURCE[i]["image"] for i in range(len(SOURCE))])
    return {"image": images, "label": np.array([SOURCE[i]["label"] for i in range(len(SOURCE))])}


def train(c, steps):
    """Return the states before and after some steps on one batch, and the metrics of each step."""
    c.total_steps, c.batch_size, c.optim.name, c.optim.lr = steps, len(SOURCE), "adamw", 0.02
    c.optim.warmup_share, c.optim.weight_decay = 0.0, 0.0
    init, abstract, graphdef, tx, rate, _ = toy.prepared(c)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    take = step.make_train_step(graphdef, tx, rate, c, shardings)
    first, state, metrics = init(), init(), []
    for _ in range(steps):
        state, found = take(state, batch())
        metrics.append(jax.device_get(found))
    return first, state, metrics, graphdef


def test_the_loop_trains_a_linear_layer_on_a_frozen_encoder():
    c = config(optim__lr_rules=FROZEN, learner__batch_norm=True, learner__layer="tokens")
    first, last, metrics, _ = train(c, 40)
    assert metrics[0]["loss"] == pytest.approx(
        np.log(6), abs=1e-5
    )  # the head is initialized with zeros
    assert metrics[-1]["accuracy"] > metrics[0]["accuracy"] + 0.3
    toy.assert_same(first.params["encoder"], last.params["encoder"])
    for leaf in jax.tree.leaves(last.params["head"]):
        assert (leaf != 0).all()
    assert (last.stats["norm"]["mean"] != first.stats["norm"]["mean"]).all()


@pytest.mark.slow
def test_the_loop_fine_tunes_all_of_it():
    first, last, metrics, _ = train(config(), 3)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), first.params, last.params)
    assert all(jax.tree.leaves(changed))


@pytest.mark.slow
def test_the_loop_trains_attention_pooling_with_and_without_the_encoder():
    c = config(learner__head="map", learner__layer="tokens")
    first, last, metrics, graphdef = train(c, 3)
    assert metrics[0]["loss"] == pytest.approx(np.log(6), abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), first.params, last.params)
    # The bias of the keys changes nothing, as softmax ignores what all tokens have in common.
    changed["pool"]["attention"]["key"].pop("bias")
    assert all(jax.tree.leaves(changed))
    learner = nnx.merge(graphdef, last.params, last.stats)
    tokens = learner.encoder(batch()["image"][:4] / np.float32(127.5) - 1).tokens
    logits = learner.head(learner.pool(tokens))
    np.testing.assert_allclose(learner.classify(batch()["image"][:4]), logits, atol=1e-5)

    c = config(learner__head="map", learner__layer="block_2", optim__lr_rules=FROZEN)
    first, last, metrics, _ = train(c, 40)
    assert metrics[-1]["accuracy"] > metrics[0]["accuracy"] + 0.3
    toy.assert_same(first.params["encoder"], last.params["encoder"])


def test_loss_is_cross_entropy_over_examples_that_have_a_label():
    c = config()
    graphdef, params, stats = tiny.split(c)
    learner = nnx.merge(graphdef, params, stats)
    data = batch()
    some = {k: v[:12] for k, v in data.items()}
    logits = learner.classify(some["image"])
    labels = some["label"].copy()
    labels[3] = -1
    mask = np.arange(12) != 5
    loss, metrics = learner.loss(some | {"label": labels, "mask": mask}, None, train=False)
    counted = mask & (labels >= 0)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(labels, 0))
    np.testing.assert_allclose(loss, nll[counted].mean(), rtol=1e-5)
    assert metrics["loss_weight"] == 10
    right = np.argmax(logits, 1) == labels
    np.testing.assert_allclose(metrics["accuracy"], right[counted].mean(), rtol=1e-6)


def test_label_smoothing_is_of_training_alone():
    graphdef, params, stats = tiny.split(config(learner__label_smoothing=0.2))
    learner = nnx.merge(graphdef, params, stats)
    data = {k: v[:12] for k, v in batch().items()}
    key = jax.random.key(0)
    logits = learner.classify(data["image"])
    smooth = 0.8 * np.eye(6)[data["label"]] + 0.2 / 6
    expected = optax.softmax_cross_entropy(logits, smooth).mean()
    np.testing.assert_allclose(learner.loss(data, key, train=True)[0], expected, rtol=1e-5)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, data["label"]).mean()
    np.testing.assert_allclose(learner.loss(data, key, train=False)[0], plain, rtol=1e-5)


def test_a_batch_norm_before_the_linear_layer_keeps_statistics_of_training_alone():
    c = config(optim__lr_rules=FROZEN, learner__batch_norm=True)
    graphdef, params, stats = tiny.split(c)
    learner = nnx.merge(graphdef, params, stats)
    learner.loss(batch(), jax.random.key(0), train=True)
    assert (learner.norm.mean[...] != 0).all()
    moved = jnp.array(learner.norm.mean[...])
    learner.loss(batch(), jax.random.key(0), train=False)
    assert (learner.norm.mean[...] == moved).all()


@pytest.mark.parametrize(
    ("rules", "frozen"),
    [
        ((), False),
        (FROZEN, True),
        ((("encoder/blocks/.*", 0.0),), False),
        ((("encoder/norm/.*", 0.1), *FROZEN), False),
        (((".*", 0.0),), True),
    ],
)
def test_a_frozen_encoder_is_one_that_no_rule_lets_learn(rules, frozen):
    c = config(optim__lr_rules=rules)
    learner = nnx.eval_shape(lambda: learners.build(c, 0, jax.random.key(0)))
    assert learner.encoder.frozen == frozen


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_drops_nothing(frozen):
    c = config(optim__lr_rules=FROZEN if frozen else (), model__dropout=0.5)
    graphdef, params, stats = tiny.split(c)
    loss = jax.jit(lambda key: nnx.merge(graphdef, params, stats).loss(batch(), key, True)[0])
    assert (loss(jax.random.key(0)) == loss(jax.random.key(1))) == frozen


@pytest.fixture(scope="module")
def classifier():
    """A context for a classifier with random weights."""
    c = config()
    graphdef, *variables = tiny.split(c)
    sources = {"val": Coloured(45, 6, broken=(7, 44)), "more": Coloured(20, 7)}
    mesh = sharding.make_mesh(c)
    return Among(c, graphdef, Numbers(), mesh, sources=sources), tuple(variables)


def test_accuracy_counts_every_image_once(classifier):
    context, variables = classifier
    source = context.sources["val"]
    whole = [i for i in range(45) if i not in (7, 44)]
    images = np.stack([source[i]["image"] for i in whole])
    labels = np.array([source[i]["label"] for i in whole])
    logits = nnx.merge(context.graphdef, *variables).classify(images)
    right = np.argmax(logits, axis=1) == labels
    for batch_size in (1, 64):
        result = Accuracy(context, Accuracy.Options(batch_size=batch_size))(variables)
        assert result.metrics["top1"] == pytest.approx(right.mean())
        by_class = [right[labels == k].mean() for k in range(6)]
        assert result.metrics["mean_per_class"] == pytest.approx(np.mean(by_class))
        ranks = np.sum(logits > np.take_along_axis(logits, labels[:, None], 1), axis=1)
        assert result.metrics["top5"] == pytest.approx(np.mean(ranks < 5))
        assert result.details["images"] == 43 and result.details["split"] == "val"


def test_what_cannot_be_is_told(classifier):
    context, variables = classifier
    with pytest.raises(UserError, match="labels from 0 to 6, and the classifier knows 0 to 5"):
        Accuracy(context, Accuracy.Options(split="more"))(variables)
    captioner = Among(tiny.config(), tiny.abstract(tiny.config())[0], None, context.mesh)
    with pytest.raises(UserError, match="accuracy needs a classifier, and a Captioner is none"):
        Accuracy(captioner, Accuracy.Options())
    with pytest.raises(UserError, match="learner.classes: the dataset does not name"):
        tiny.abstract(config(classes=0))
    with pytest.raises(UserError, match="no layer 'block_9'"):
        train(config(learner__layer="block_9"), 1)
    for options, field in (
        ({"classes": -1}, "classes"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"head": "mpa"}, "head"),
        ({"head": "map"}, "layer"),
    ):
        with pytest.raises(UserError, match=f"learner.{field}"):
            Classifier.Options(**options)
