"""Learners of images in their own aspect ratio: padding changes nothing, squares are as ever."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain import naflex
from cap_pretrain.data.views import prepared
from cap_pretrain.errors import UserError
from cap_pretrain.learners import objectives
from cap_pretrain.models import native, readout
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.vit import resample_positions
from cap_pretrain.validation import validate
from tests import tiny, toy
from tests.models.test_positions import MODERN

SHAPES = [(16, 16), (9, 40), (50, 13), (7, 30)]
TEXTS = tiny.texts([7, 3, 5, 2])

OBJECTIVES = {
    "cappa": {},
    "coca": {},
    "locca": {},
    "cap+siglip": {},
    "clip": {"class_token": True, "pool": "class"},
    "siglip": {"pool": "map"},
    "cap": MODERN,
}


def config(objective, **fields):
    c = tiny.config(**fields)
    with c.unlocked():
        c.learner = objectives.section(objective)
    c.data.layout = naflex.NAFLEX
    return c


def packed(shapes, side=tiny.SIDE):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    return np.stack([prepared(image, side, patch=tiny.PATCH) for image in pixels])


def with_padding(images, more=5):
    """More padding, all of it of other bytes than 0."""
    images = np.pad(images, ((0, 0), (0, more), (0, 0)))
    for image in images:
        image[np.prod(naflex.grid_of(image)) :] = 77
    return images


def batch(images):
    boxes = np.tile(np.float32([0.1, 0.2, 0.6, 0.9]), (len(images), 1, 1))
    return {"image": images, "text": TEXTS, "phrases": TEXTS[:, None], "boxes": boxes}


def gradients(split):
    """A function from batches to the loss and its gradient."""
    graphdef, params, stats = split

    @jax.jit
    def compute(batch):
        def loss(params):
            learner = nnx.merge(graphdef, params, stats)
            return learner.loss(batch, jax.random.key(3), True)[0]

        return jax.value_and_grad(loss)(params)

    return compute


@pytest.mark.parametrize(
    "objective", [pytest.param(o, marks=[pytest.mark.slow] * (o == "locca")) for o in OBJECTIVES]
)
def test_padding_changes_neither_loss_nor_gradient(objective):
    split = tiny.split(config(objective, depth=2, decoder_depth=1, **OBJECTIVES[objective]))
    images = packed(SHAPES)
    compute = gradients(split)
    loss, found = compute(batch(images))
    other_loss, other = compute(batch(with_padding(images, more=0)))
    assert other_loss == loss
    jax.tree.map(np.testing.assert_array_equal, found, other)
    if objective == "cappa":  # more of it rounds otherwise
        padded_loss, padded = compute(batch(with_padding(images)))
        np.testing.assert_allclose(padded_loss, loss, rtol=1e-6)
        for own, one in zip(jax.tree.leaves(found), jax.tree.leaves(padded), strict=True):
            np.testing.assert_allclose(one, own, atol=2e-5 * np.abs(own).max() + 1e-7)
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(found["encoder"]["blocks"]))
    other = images.copy()
    other[1, 0, 0] ^= 128  # a real pixel
    assert compute(batch(other))[0] != loss


@pytest.mark.parametrize("pool", ["gap", "map", "class", "modern"])
def test_square_images_have_the_bits_of_the_square_layout(pool):
    fields = MODERN if pool == "modern" else {"pool": pool, "class_token": pool == "class"}
    split = tiny.split(config("cap", **fields))
    squares = tiny.images(4)
    patches = np.stack([prepared(image, tiny.SIDE, patch=tiny.PATCH) for image in squares])
    encode = tiny.jitted(split, lambda learner, images: learner.encode(images))
    plain, found = encode(squares), encode(patches)
    np.testing.assert_array_equal(found.tokens[..., :-1], plain.tokens)
    assert np.all(found.tokens[..., -1] == 1)
    if pool == "map":  # whose attention is another program with a mask
        np.testing.assert_allclose(found.pooled, plain.pooled, atol=1e-6)
    else:
        np.testing.assert_array_equal(found.pooled, plain.pooled)


def test_positions_are_those_of_resampling():
    table = np.random.default_rng(0).standard_normal((4, 4, 8)).astype(np.float32)
    grids = np.array([[4, 4], [2, 7], [8, 1], [1, 16]], np.int32)
    found = jax.jit(native.positions, static_argnums=2)(table, grids, 16)
    for (rows, columns), own in zip(grids.tolist(), found, strict=True):
        expected = resample_positions(table.reshape(16, 8), (4, 4), (rows, columns))
        np.testing.assert_allclose(own[: rows * columns], expected, atol=1e-6)
    np.testing.assert_array_equal(found[0], table.reshape(16, 8))


@pytest.mark.parametrize("objective", ["cap", "coca"])
def test_decoding_with_a_cache_is_decoding_without(objective):
    split = tiny.split(config(objective))
    images = packed(SHAPES)

    def by_steps(learner, images):
        cache, logits = learner.init_decoding(images, 2), []
        texts = jnp.repeat(jnp.pad(TEXTS, ((0, 0), (1, 0))), 2, axis=0)
        for position in range(tiny.LENGTH):
            found, cache = learner.decode_step(texts[:, position], jnp.int32(position), cache)
            logits.append(found[::2])
        return jnp.stack(logits, axis=1)

    def at_once(learner, images):
        return learner.predict(learner.encode(images).tokens, TEXTS)

    expected = tiny.jitted(split, at_once)(images)
    np.testing.assert_allclose(tiny.jitted(split, by_steps)(images), expected, atol=2e-5)
    if objective == "cap":
        attention = tiny.jitted(split, lambda learner, *own: learner.attend(*own))
        weights = np.asarray(attention(images, TEXTS))
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        for (rows, columns), own in zip(map(naflex.grid_of, images), weights, strict=True):
            assert not own[:, rows * columns :].any() and own[:, : rows * columns].all()


def test_means_of_tokens_leave_out_padding():
    split = tiny.split(config("cap"))
    images = packed(SHAPES)

    def means(learner, images):
        images = normalize_images(images, jnp.float32)
        return [readout.read(learner.encoder, name, images) for name in ("tokens", "block_2")]

    compute = tiny.jitted(split, means)
    for own, padded in zip(compute(images), compute(with_padding(images)), strict=True):
        assert own.shape == (4, 16)
        np.testing.assert_array_equal(padded, own)


@pytest.mark.parametrize(
    ("c", "message"),
    [
        (config("aimv2"), "data.layout: 'naflex' does not work with aimv2; use 'square'"),
        (config("cap+distill"), "does not work with distillation .distill.; use 'square'"),
        (toy.config("rotation", data__layout="naflex"), "does not work with rotation"),
        (config("cap", keep_tokens=0.5), "model.keep_tokens: 0.5 does not work with data.layout"),
        (toy.config(data__layout="naflex", data__crop="random"), "data.crop: 'random' makes squ"),
        (toy.config(data__layout="naflex", model__name="resnet50"), "naflex is for a ViT, not for"),
        (toy.config(data__layout="wide"), "data.layout: 'wide'"),
    ],
)
def test_what_needs_squares_is_refused(c, message):
    with pytest.raises(UserError, match=message):
        validate(c)
