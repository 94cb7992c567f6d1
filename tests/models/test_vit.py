"""The ViT against torch, and on images of other sizes than its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.vit import resample_positions
from tests import tiny


def encode(learner, images):
    return learner.encode(images)


@pytest.mark.parity
@pytest.mark.parametrize("pool", ["gap", "map"])
def test_tokens_and_pooled_vector_are_those_of_torch(pool):
    from tests import torch_reference

    split = tiny.split(tiny.config(pool=pool))
    images = tiny.images(4)
    out = tiny.jitted(split, encode)(images)
    tokens, pooled = torch_reference.vit(split[1]["encoder"], images, tiny.HEADS)
    assert out.tokens.shape == (4, 16, 16) and out.pooled.shape == (4, 16)
    np.testing.assert_allclose(out.tokens, tokens, atol=1e-4)
    np.testing.assert_allclose(out.pooled, pooled, atol=1e-4)


def test_the_class_token_comes_first_and_is_no_part_of_the_mean():
    images = tiny.images(4)
    out = {
        pool: tiny.jitted(tiny.split(tiny.config(pool=pool, class_token=True)), encode)(images)
        for pool in ("gap", "class")
    }
    tokens = out["gap"].tokens
    assert tokens.shape == (4, 17, 16)
    np.testing.assert_array_equal(out["class"].tokens, tokens)
    np.testing.assert_allclose(out["gap"].pooled, tokens[:, 1:].mean(1), atol=1e-6)
    np.testing.assert_array_equal(out["class"].pooled, tokens[:, 0])


def test_pixels_are_normalised_to_minus_one_and_one():
    images = np.array([0, 51, 255], np.uint8)[:, None, None, None]
    np.testing.assert_allclose(normalize_images(images, jnp.float32).ravel(), [-1, -0.6, 1], 1e-6)
    assert normalize_images(images, jnp.bfloat16).dtype == jnp.bfloat16


def test_a_layers_tokens_are_those_that_the_blocks_up_to_it_make():
    graphdef, params, stats = tiny.split(tiny.config())
    images = tiny.images(4)

    def tokens_at(learner, images):
        encoder = learner.encoder
        return {name: encoder.tokens_at(name, images) for name in encoder.layers}

    whole = (graphdef, params, stats)
    pixels = normalize_images(images, jnp.float32)
    layers = tiny.jitted(whole, tokens_at)(pixels)
    assert list(layers) == ["block_1", "block_2", "block_3"]
    last = tiny.jitted(whole, lambda learner, x: learner.encoder.norm(x))(layers["block_3"])
    np.testing.assert_allclose(last, tiny.jitted(whole, encode)(images).tokens, atol=1e-5)
    # The output of the second block depends on the blocks below it, not on those above.
    for block, changed in ((2, ["block_3"]), (1, ["block_2", "block_3"])):
        other = jax.tree.map(lambda p, n=block: p.at[n].add(0.1), params["encoder"]["blocks"])
        split = (graphdef, params | {"encoder": params["encoder"] | {"blocks": other}}, stats)
        found = tiny.jitted(split, tokens_at)(pixels)
        assert [name for name in layers if (found[name] != layers[name]).any()] == changed


def test_positions_resampled_to_their_own_grid_do_not_change():
    grid = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    np.testing.assert_allclose(resample_positions(grid, (3, 4), (3, 4)), grid, atol=1e-6)


def test_constant_positions_stay_constant():
    grid = np.tile(np.float32([1, -2, 3]), (16, 1))
    out = resample_positions(grid, (4, 4), (8, 8))
    np.testing.assert_allclose(out, np.tile(grid[:1], (64, 1)), rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("new", [(8, 8), (3, 3), (6, 2)])
def test_positions_are_resampled_as_torch_resizes_an_image(new):
    from tests import torch_reference

    grid = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
    image = torch_reference.tensor(grid).reshape(1, 4, 4, 5).permute(0, 3, 1, 2)
    expected = torch_reference.F.interpolate(image, new, mode="bilinear", antialias=True)
    expected = expected.permute(0, 2, 3, 1).reshape(-1, 5)
    np.testing.assert_allclose(resample_positions(grid, (4, 4), new), expected, atol=1e-5)


def test_a_vit_for_32_pixels_runs_on_48_as_one_made_for_48_would():
    c = tiny.config()
    c.data.image_size = 32
    graphdef, params, _ = tiny.split(c)
    c.data.image_size = 48
    larger, _, _ = tiny.abstract(c)
    row = params["encoder"]["positions"][:1]
    images = tiny.images(2, side=48)

    def tokens(graphdef, patches):
        params["encoder"]["positions"] = jnp.tile(row, (patches, 1))
        return tiny.jitted((graphdef, params, {}), encode)(images).tokens

    out = tokens(graphdef, 64)
    assert out.shape == (2, 144, 16)
    np.testing.assert_allclose(out, tokens(larger, 144), atol=1e-5)
