"""Computed positions of patches, and ViTs with them, RMSNorm, gated MLPs and no biases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.models import positions, tokens
from cap_pretrain.models.elementwise import RMSNorm, silu
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.vit import Masks
from cap_pretrain.training.step import split_learner
from cap_pretrain.validation import validate
from tests import tiny

MODERN = dict(
    positions="rotary", patch_norm=True, gated=True, activation="silu", bias=False, norm="rms"
)


def rotated(x, rows, columns, leading=0):
    places = positions.centers(positions.Grid(rows, columns, rows * columns))
    return positions.rotate(x, positions.rotation(places, 100.0, x.shape[-1], leading))


def test_products_depend_on_the_distance_of_patches_alone():
    query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 2, 8)).astype(np.float32)
    query, key = (rotated(np.tile(x, (1, 12, 1, 1)), 3, 4) for x in (query, key))
    products = np.einsum("bthd,bshd->hts", query, key).reshape(2, 3, 4, 3, 4)
    for row, column in ((1, 0), (0, 1), (2, 3)):  # the same step from several patches
        steps = products[:, : 3 - row, : 4 - column]
        steps = np.stack(
            [steps[:, i, j, i + row, j + column] for i in range(3 - row) for j in range(4 - column)]
        )
        np.testing.assert_allclose(steps, np.broadcast_to(steps[:1], steps.shape), atol=1e-5)
    assert np.abs(products[:, 0, 0, 1, 0] - products[:, 0, 0, 0, 1]).min() > 1e-3


def test_lengths_and_leading_tokens_stay_as_they_are():
    x = np.random.default_rng(0).standard_normal((2, 8, 3, 4)).astype(np.float32)
    out = rotated(x, 2, 3, leading=2)
    np.testing.assert_array_equal(out[:, :2], x[:, :2])
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    assert np.abs(out[:, 2:] - x[:, 2:]).max() > 0.1


def test_places_are_the_centers_of_patches_in_any_grid():
    places = positions.centers(positions.Grid(2, 4, 8))[0]
    np.testing.assert_allclose(places[0], [-0.5, -0.75])
    np.testing.assert_allclose(places[-1], [0.5, 0.75])
    grids = np.array([[2, 4], [8, 1]], np.int32)
    many = positions.Grid(grids[:, :1], grids[:, 1:], 8)
    for one, (rows, columns) in enumerate(grids.tolist()):
        own = positions.Grid(rows, columns, 8)
        np.testing.assert_array_equal(positions.centers(many)[one], positions.centers(own)[0])
        np.testing.assert_array_equal(positions.sines(many, 8)[one], positions.sines(own, 8)[0])


def test_kept_patches_have_their_own_places():
    split = tiny.split(tiny.config(keep_tokens=0.4, **MODERN))
    images, key = tiny.images(4), jax.random.key(3)
    with jax.ensure_compile_time_eval():
        kept = np.asarray(tokens.draw(key, 4, 16, 0.4))
    seen = np.zeros((4, 1, 1, 16), bool)
    np.put_along_axis(seen, kept[:, None, None], True, axis=-1)
    seen = np.broadcast_to(seen, (4, 1, 16, 16))

    def both(learner, images):
        all_of_them = learner.encoder.masked(normalize_images(images, jnp.float32), Masks(seen))
        return learner.encode(images, train=True, key=key).tokens, all_of_them.tokens

    found, expected = tiny.jitted(split, both)(images)
    expected = np.take_along_axis(np.asarray(expected), kept[..., None], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_all_of_its_parameters_learn_and_none_is_a_bias_or_a_learned_position():
    graphdef, params, stats = tiny.split(tiny.config(**MODERN))
    batch = {"image": tiny.images(4), "text": tiny.texts([7, 4, 1, 7])}

    def loss(params):
        learner = nnx.merge(graphdef, params, stats)
        return learner.loss(batch, jax.random.key(0), True)[0]

    found = jax.jit(jax.grad(loss))(params)["encoder"]
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(found))
    assert "positions" not in found and "bias" not in found["blocks"]["mlp"]["up"]
    assert found["blocks"]["mlp"].keys() == {"up", "gate", "down"}
    assert found["blocks"]["norm1"].keys() == found["patch_norm"].keys() == {"scale"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "rotary", "heads": 8}, "model.positions: heads have 2 channels, .* of 4"),
        ({"positions": "sines", "width": 18, "heads": 2}, "model.positions: the width is 18, .* 4"),
        ({"positions": "rotary", "rope_base": 0.5}, "model.rope_base: 0.5 is not from 1 to 1e.09"),
        ({"positions": "sine"}, "model.positions: .*sine.*"),
    ],
)
def test_positions_that_cannot_be_computed_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        validate(tiny.config(**fields))


@pytest.mark.parametrize("fields", [{}, {"positions": "rotary"}, MODERN])
def test_the_mask_token_does_not_outweigh_all_other_gradients(fields):
    """Clipping the gradient would else stop all other parameters."""
    c = tiny.config("masked_patches", **fields)
    graphdef, params, stats = split_learner(learners.build(c, tiny.VOCAB, jax.random.key(0)))
    batch = {"image": tiny.images(8), "progress": jnp.ones(8)}

    def loss(params):
        return nnx.merge(graphdef, params, stats).loss(batch, jax.random.key(1), True)[0]

    found = jax.jit(jax.grad(loss))(params)
    token = optax.tree.norm(found.pop("mask_token"))
    assert 0 < token < 3 * optax.tree.norm(found)


def test_rms_norm_is_the_formula_and_so_is_its_gradient():
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    scale = 1 + 0.3 * x[0, 0]

    def normalized(x, scale, epsilon=1e-3, dtype=jnp.float32):
        graphdef, _ = nnx.split(RMSNorm(8, epsilon=epsilon, dtype=dtype, rngs=nnx.Rngs(0)))
        return nnx.merge(graphdef, {"scale": scale})(x)

    def plain(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3) * scale

    ours, theirs = (
        jax.value_and_grad(lambda x, scale, f=f: jnp.sum(jnp.sin(f(x, scale))), (0, 1))(x, scale)
        for f in (normalized, plain)
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    half = jnp.arange(1, 9, dtype=jnp.bfloat16)
    few, more = (normalized(half, jnp.full(8, n), dtype=jnp.bfloat16) for n in (1.0, 1.003))
    assert few.dtype == jnp.bfloat16 and np.any(few != more)  # bfloat16 has no number between


def test_silu_has_its_gradient():
    x = jnp.linspace(-6, 6, 50)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(silu))(x), jax.vmap(jax.grad(nnx.silu))(x), atol=1e-6
    )
