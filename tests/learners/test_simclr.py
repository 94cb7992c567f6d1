"""SimCLR: views are drawn independently, and the loss is that of optax on all of them.

tests/test_layouts.py tests that device layouts agree.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.learners.classifier import classification
from cap_pretrain.learners.matching import unit
from cap_pretrain.learners.simclr import SimCLR, choices
from tests import tiny
from tests.collectives import Sent, of_step
from tests.layouts import on_eight_devices
from tests.learners.pixels import Pixels, Seen, learned

SIDE = 8


def simclr(encoder, **options):
    options = SimCLR.Options(outputs=16, **options)
    return SimCLR(encoder, options=options, rngs=nnx.Rngs(1))


def loss_of(vectors, counts, temperature):
    logits = choices(vectors, counts, temperature)
    return classification(logits, jnp.arange(len(vectors)) ^ 1, counts)[0]


def of_optax(vectors, temperature, counts):
    """Return optax's loss of the vectors that count."""
    kept = vectors[np.flatnonzero(counts)]
    return optax.losses.ntxent(kept, jnp.arange(len(kept)) // 2, temperature)


def test_loss_and_gradient_are_those_of_optax_and_masked_examples_are_not_there():
    vectors = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ours = jax.jit(jax.value_and_grad(loss_of))
    for counts in (np.ones(12, bool), np.repeat([True, True, False, True, False, True], 2)):
        for temperature in (0.1, 0.5):
            got, gradient = ours(vectors, counts, temperature)
            expected = jax.jit(
                jax.value_and_grad(functools.partial(of_optax, counts=counts)),
            )(vectors, temperature=temperature)
            np.testing.assert_allclose(got, expected[0], rtol=1e-5)
            # Optax normalizes vectors itself, so its gradient is orthogonal to them.
            along = np.sum(gradient * vectors, axis=1, keepdims=True) * vectors
            np.testing.assert_allclose(gradient - along, expected[1], atol=1e-5)
            assert not np.any(gradient[~counts])
    value, gradient = ours(vectors, np.zeros(12, bool), 0.1)
    assert value == 0 and not np.any(gradient)


@functools.partial(jax.jit, static_argnames=("options",))
def views(images, key, options=()):
    return simclr(Pixels(SIDE), **dict(options)).views(images, key)


def test_views_of_an_image_stand_together_each_drawn_apart_by_its_place():
    images, key = tiny.images(8, SIDE), jax.random.key(0)
    seen = np.asarray(views(images, key))
    assert seen.shape == (16, SIDE, SIDE, 3) and seen.dtype == np.float32
    assert seen.min() >= -1 and seen.max() <= 1
    np.testing.assert_array_equal(views(images, key), seen)
    same = np.asarray(views(images[[0] * 8], key))
    apart = np.abs(same[:, None] - same[None]).max(axis=(2, 3, 4))
    assert (apart + np.eye(16) > 0.01).all()
    np.testing.assert_allclose(same[:2], seen[:2], atol=1e-5)
    assert np.abs(views(images, jax.random.key(1)) - seen).max() > 0.1


def test_options_leave_out_colours_and_blur():
    """Crops and flips of a red image are red."""
    images = np.zeros((8, SIDE, SIDE, 3), np.uint8) + np.array([204, 51, 51], np.uint8)
    plain = views(images, jax.random.key(0), (("colour", 0.0), ("blur", False), ("size", 4)))
    red = [0.6, -0.6, -0.6]
    np.testing.assert_allclose(plain, np.broadcast_to(red, (16, 4, 4, 3)), atol=1e-5)
    coloured = np.concatenate([views(images, jax.random.key(n))[:, 0, 0] for n in range(20)])
    unchanged = np.mean(np.abs(coloured - red).max(axis=1) < 1e-4)
    gray = np.mean(np.ptp(coloured, axis=1) < 1e-4)
    assert abs(unchanged - 0.2 * 0.8) < 0.06 and abs(gray - 0.2) < 0.07  # three deviations
    assert np.abs(coloured - red).max() > 0.5


def test_metrics_and_masks_of_a_batch():
    """An encoder that returns pixels distinguishes images of single colors."""
    learner = simclr(Seen(SIDE), colour=0.0, blur=False)
    learner.project = lambda views, **_: unit(views.mean(axis=(1, 2)))
    loss = jax.jit(lambda batch: learner.loss(batch, jax.random.key(0), False)[1])
    corners = [[int(c) * 255 for c in np.binary_repr(n, 3)] for n in range(8)]
    images = np.broadcast_to(np.array(corners, np.uint8)[:, None, None], (8, SIDE, SIDE, 3))
    for count in (8, 6):
        metrics = loss({"image": images, "mask": np.arange(8) < count})
        assert metrics["accuracy"] == 1 and metrics["loss_weight"] == 2 * count
        assert metrics["chance"] == pytest.approx(1 / (2 * count - 1))
    metrics = loss({"image": images[[0] * 8], "mask": np.ones(8, bool)})
    assert metrics["accuracy"] < 0.4


@pytest.mark.slow
def test_it_learns_to_tell_images_apart():
    """Train on color fields with noise, with crops and flips only."""
    learner = simclr(Pixels(SIDE), colour=0.0, blur=False)

    def loss(learner):
        return learner.loss({"image": held_out}, jax.random.key(0), False)[0]

    held_out = tiny.images(32, SIDE, seed=1000)
    before = loss(learner)
    learner = learned(learner, (tiny.images(32, SIDE, seed=n) for n in range(200)))
    assert loss(learner) < 0.8 * before


def test_from_a_config():
    learner = nnx.merge(*tiny.abstract(tiny.config("simclr", {"outputs": 12, "size": 8})))
    assert learner.hidden.kernel.shape == (16, 16)  # the encoder's width
    assert learner.projection.kernel.shape == (16, 12)
    learner = nnx.merge(*tiny.abstract(tiny.config("simclr", {"hidden": 24})))
    assert learner.hidden.kernel.shape == (16, 24)
    assert learner.projection.kernel.shape == (24, 128)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, "learner.temperature: 0.0 must be positive"),
        ({"outputs": 0}, "learner.outputs: 0 must be at least 1"),
        ({"colour": -1.0}, "learner.colour: -1.0 must not be negative"),
        ({"size": 6}, "learner.size: 6 is not a multiple of the patch size 4"),
    ],
)
def test_mistakes_are_told(options, said):
    with pytest.raises(UserError, match=said):
        tiny.abstract(tiny.config("simclr", options))


@pytest.mark.slow
def test_devices_gather_vectors_and_nothing_else():
    step = Sent(*on_eight_devices(of_step, [("simclr", "data", {"batch_size": 48})])[0])
    assert step.sizes("all-gather") == [2 * 48 * 32]
    assert not step.sizes("all-to-all", "collective-permute")
    assert [96, 96] not in step.computed and [12, 96] in step.computed
