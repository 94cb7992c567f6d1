"""Rotation: pixels are only moved, and only the content reveals the angle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.learners.rotation import Rotation, rotate
from tests import tiny
from tests.learners.pixels import Pixels, Seen, accuracy, learned

SIDE = 8


def rotation(encoder, **options):
    return Rotation(encoder, options=Rotation.Options(**options), rngs=nnx.Rngs(1))


def noise(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_turn_is_that_of_numpy_and_turning_back_gives_the_very_pixels(dtype):
    image = noise(1, 0)[0].astype(dtype)
    for turns in range(4):
        got = np.asarray(rotate(image, turns))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.rot90(image, turns))
        np.testing.assert_array_equal(rotate(got, -turns % 4), image)


@functools.partial(jax.jit, static_argnames=("copies", "train"))
def shown(images, key, copies, train):
    """Return the encoder's uint8 inputs, and the metrics."""
    seen = []

    class Watched(Seen):
        def _encode(self, images, **kwargs):
            seen.append(images)
            return super()._encode(images, **kwargs)

    _, metrics = rotation(Watched(SIDE), copies=copies).loss({"image": images}, key, train)
    return jnp.round((seen[0] + 1) * 127.5).astype(jnp.uint8), metrics


def test_four_copies_are_the_four_turns_of_each_image():
    images = noise(3, 1)
    for copies, train in (("four", True), ("one", False)):
        seen, metrics = shown(images, jax.random.key(3), copies, train)
        for n, image in enumerate(images):
            for turns in range(4):
                np.testing.assert_array_equal(seen[4 * n + turns], np.rot90(image, turns))
        assert metrics["loss_weight"] == 12 and metrics["chance"] == 0.25


def test_one_copy_is_turned_at_random_by_its_place_in_the_batch():
    images = noise(64, 2)
    seen, metrics = jax.device_get(shown(images, jax.random.key(3), "one", True))
    assert metrics["loss_weight"] == 64 and seen.shape == images.shape
    turns = [
        [k for k in range(4) if (np.rot90(i, k) == s).all()]
        for i, s in zip(images, seen, strict=True)
    ]
    assert all(len(found) == 1 for found in turns)
    assert np.bincount(np.ravel(turns), minlength=4).min() >= 8
    others = np.concatenate([images[:10], noise(54, 5)])
    again, _ = shown(others, jax.random.key(3), "one", True)
    np.testing.assert_array_equal(again[:10], seen[:10])
    assert (shown(images, jax.random.key(4), "one", True)[0] != seen).any()


def test_masked_examples_do_not_count():
    learner = rotation(Pixels(SIDE))
    graphdef, state = nnx.split(learner)
    images = noise(6, 3)

    @jax.jit
    def loss(mask):
        batch = {"image": images, "mask": mask}
        return nnx.merge(graphdef, state).loss(batch, jax.random.key(0), False)

    alone = [loss(np.arange(6) == n) for n in range(6)]
    value, metrics = loss(np.arange(6) < 4)
    np.testing.assert_allclose(value, np.mean([a[0] for a in alone[:4]]), rtol=1e-5)
    right = np.mean([a[1]["accuracy"] for a in alone[:4]])
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-5)
    assert metrics["loss_weight"] == 16


def lit_from_above(count, seed):
    """Return noise that is brighter in its upper half."""
    images = noise(count, seed) // 2
    images[:, : SIDE // 2] += 100
    return images


def test_noise_without_a_direction_is_told_by_chance_and_with_one_it_is_learned():
    """Noise would reveal artifacts of the rotation, such as bars or blur."""
    for images, low, high in ((noise, 0.2, 0.3), (lit_from_above, 0.99, 1.0)):
        batches = (images(64, 10 + n) for n in range(60))
        learner = learned(rotation(Pixels(SIDE), copies="one"), batches)
        assert low <= accuracy(learner, images(400, 9)) <= high


def test_from_a_config():
    learner = nnx.merge(*tiny.abstract(tiny.config("rotation", {"copies": "one"})))
    assert learner.head.kernel.shape == (learner.encoder.width, 4)
    assert learner.options.copies == "one"
    with pytest.raises(UserError, match="learner.copies: 'fuor' is unknown. Did you mean 'four'"):
        Rotation.Options(copies="fuor")
