"""Accumulation gives the gradient of the whole batch, also where examples are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.learners.contrastive import Contrastive
from cap_pretrain.learners.dual_encoder import DualEncoder
from cap_pretrain.learners.simclr import SimCLR
from cap_pretrain.models.convnet import BatchNorm
from cap_pretrain.models.layers import Compute, dropout
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.text_tower import TextTower
from cap_pretrain.training import step
from tests import tiny
from tests.layouts import SMALL, Training, config, on_eight_devices
from tests.learners.pixels import Pixels

KEY = jax.random.key(5)
BATCH = {
    "image": tiny.images(8),
    "text": tiny.texts([7, 4, 6, 1, 3, 5, 2, 7]),
    "mask": np.array([1, 1, 0, 1, 1, 1, 0, 1], bool),
}
in_parts = jax.jit(step.accumulated_gradients, static_argnums=(0, 5))


def assert_same(found, expected):
    """Gradients, metrics and other variables; the first relative to the largest."""
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[0]))
    assert largest > 1e-3
    for a, b in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)
    assert found[1].keys() == expected[1].keys()
    for a, b in zip(*map(jax.tree.leaves, (found[1:], expected[1:])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("contrast", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_image_text_pairs_in_parts_learn_what_the_whole_batch_does(contrast):
    rngs, options = nnx.Rngs(0), DualEncoder.Options(contrast=contrast)
    size = Size(16, 1, 16, 2)
    tower = TextTower(size, vocab_size=23, length=tiny.LENGTH, compute=Compute(), rngs=rngs)
    learner = DualEncoder(Pixels(tiny.SIDE), tower, options=options, rngs=rngs)
    split = step.split_learner(learner)
    assert_same(in_parts(*split, BATCH, KEY, 4), in_parts(*split, BATCH, KEY, 1))


class Plain(SimCLR):
    """One whose views are not drawn."""

    def views(self, images, key):
        images = images.astype(jnp.float32) / 255
        return jnp.stack([images, images[:, ::-1] ** 2], axis=1).reshape(-1, *images.shape[1:])


def test_views_in_parts_learn_what_the_whole_batch_does():
    learner = Plain(Pixels(tiny.SIDE), options=Plain.Options(outputs=8), rngs=nnx.Rngs(0))
    split = step.split_learner(learner)
    assert_same(in_parts(*split, BATCH, KEY, 2), in_parts(*split, BATCH, KEY, 1))


class Tasks(nnx.Module):
    """A loss of all examples, and one of some of them, which has another weight."""

    def __init__(self):
        self.scale = nnx.Param(jnp.float32(2))

    def loss(self, batch, key, train):
        values, some = self.scale[...] * batch["value"], batch["some"]
        count = jnp.sum(some)
        metrics = {"task": jnp.sum(values * some) / jnp.maximum(count, 1), "task_weight": count}
        return jnp.mean(values**2), metrics | {"other": jnp.mean(values)}


def test_a_metric_of_some_examples_is_their_mean():
    split = step.split_learner(Tasks())
    batch = {"value": jnp.arange(8.0), "some": jnp.float32([1, 0, 0, 0, 1, 0, 1, 0])}
    grads, metrics, stats = in_parts(*split, batch, KEY, 1)
    assert metrics.pop("task_weight") == 3
    assert_same(in_parts(*split, batch, KEY, 4), (grads, metrics, stats))


class Neighbours(Contrastive):
    """Nothing but the two methods; random, and with statistics."""

    def __init__(self):
        self.linear = nnx.Linear(12, 6, rngs=nnx.Rngs(0))
        self.norm = BatchNorm(6, rngs=nnx.Rngs(0))
        self.sharpness = nnx.Param(jnp.float32(2))

    def embed(self, batch, key, train):
        x = self.norm(self.linear(batch["image"]), train=train)
        return {"vectors": dropout(x, 0.5, key), "place": batch["place"]}

    def contrast(self, embedded):
        near = jax.nn.log_softmax(self.sharpness[...] * jnp.cos(embedded["vectors"]), axis=0)
        loss = -jnp.mean(near * embedded["place"][:, None])
        return loss, {"places": jnp.sum(embedded["place"])}


def test_both_passes_draw_the_same_and_statistics_move_once():
    """Against the loss of parts that are embedded by hand, all of them kept."""
    graphdef, params, stats = step.split_learner(Neighbours())
    image = np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32)
    batch, parts = {"image": image, "place": np.arange(12)}, 3

    def by_hand(params):
        embedded, seen = [], []
        for n in range(parts):
            learner = nnx.merge(graphdef, params, stats)
            part = {name: array[n::parts] for name, array in batch.items()}
            embedded.append(learner.embed(part, jax.random.fold_in(KEY, n), train=True))
            seen.append(step.split_learner(learner)[2])
        together = jax.tree.map(
            lambda *x: jnp.stack(x, axis=1).reshape(12, *x[0].shape[1:]), *embedded
        )
        loss, metrics = nnx.merge(graphdef, params, stats).contrast(together)
        return loss, (metrics, jax.tree.map(lambda *x: sum(x) / parts, *seen))

    (loss, (metrics, seen)), grads = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params)
    expected = grads, {"loss": loss, **metrics}, seen
    assert_same(in_parts(graphdef, params, stats, batch, KEY, parts), expected)
    mean = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), seen, stats))
    assert min(mean) > 1e-3


def losses_on(objective, layout, accumulate):
    fields = SMALL | {"model__dropout": 0.0, "optim__ema": 0.0, "batch_size": 48}
    c = config(objective, **fields, accumulate=accumulate)
    c.learner.ring = objective == "siglip"
    training = Training(c, layout)
    return training.go_on(training.init(), 3)[1]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_steps_in_parts_on_eight_devices_are_those_of_one_in_one(objective):
    calls = [(objective, "one", 1), (objective, "one", 3), (objective, "data", 3)]
    calls.append((objective, "all", 2))
    one, *others = on_eight_devices(losses_on, calls)
    assert len(set(one)) == 3
    for losses in others:
        np.testing.assert_allclose(losses, one, rtol=1e-5)
