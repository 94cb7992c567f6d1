"""On-device augmentations match torchvision's, with separate random numbers for each image."""

import colorsys
import functools

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cap_pretrain.learners import augment
from tests.layouts import on_eight_devices

LUMA = np.array([0.2989, 0.587, 0.114])
JITTER = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)


def picture(height=12, width=12, seed=0):
    return np.random.default_rng(seed).random((height, width, 3), np.float32)


def many(function, count, image, seed=0):
    """Apply the function to one image with many keys."""
    images = jnp.broadcast_to(image, (count, *image.shape))
    return np.asarray(
        jax.jit(augment.each, static_argnums=0)(function, jax.random.key(seed), images)
    )


def blended(image, other, factor):
    return np.clip(factor * image + (1 - factor) * other, 0, 1)


def turned(image, shift):
    pixels = [colorsys.rgb_to_hsv(*p) for p in image.reshape(-1, 3).astype(float)]
    turned = [colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in pixels]
    return np.reshape(turned, image.shape)


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.8])
def test_colours_change_as_torchvision_defines_it(factor):
    image = picture()
    gray = (image @ LUMA)[..., None]
    expected = {
        augment.adjust_brightness: blended(image, 0, factor),
        augment.adjust_contrast: blended(image, gray.mean(), factor),
        augment.adjust_saturation: blended(image, gray, factor),
        augment.adjust_hue: turned(image, factor - 1),
    }
    for function, wanted in expected.items():
        found = jax.jit(function)(image, factor)
        np.testing.assert_allclose(found, wanted, atol=2e-6, err_msg=str(function))


def test_jitter_draws_amounts_in_their_ranges():
    flat = np.full((1, 1, 3), 0.5, np.float32)
    brighter = many(lambda k, x: augment.colour_jitter(k, x, brightness=0.8), 400, flat)
    assert 0.1 <= brighter.min() < 0.13 and 0.87 < brighter.max() <= 0.9
    red = np.array([[[1, 0, 0]]], np.float32)
    hues = many(lambda k, x: augment.colour_jitter(k, x, hue=1 / 6), 400, red)[:, 0, 0]
    assert hues[:, 0].min() > 1 - 1e-5  # between magenta and yellow
    np.testing.assert_allclose(hues[:, 1:].max(axis=0), 1, atol=0.03)


def test_what_is_drawn_with_a_probability_happens_as_often():
    image = picture(20, 20)
    cases = {
        0.5: augment.flip,
        0.8: lambda k, x: augment.colour_jitter(k, x, **JITTER, probability=0.8),
        0.2: augment.grayscale,
    }
    for probability, function in cases.items():
        results = many(function, 400, image)
        left = np.mean([np.allclose(x, image, atol=1e-5) for x in results])
        assert abs(left - (1 - probability)) < 3 * (probability * (1 - probability) / 400) ** 0.5
        assert results.min() >= 0 and results.max() <= 1


def test_a_blur_is_the_gaussian_filter_of_dm_pix_but_keeps_the_brightness_of_edges():
    image = picture(12, 16)
    blur = jax.jit(lambda x, sigma: augment.blur(x, sigma, 5))
    theirs = jax.jit(lambda x: dm_pix.gaussian_blur(x, 1.3, 5))(image)
    inside = np.s_[2:-2, 2:-2]
    np.testing.assert_allclose(blur(image, 1.3)[inside], theirs[inside], atol=1e-5)
    np.testing.assert_allclose(blur(np.ones_like(image), 1.3), 1, atol=1e-5)
    np.testing.assert_allclose(blur(image, 0.1), image, atol=1e-5)


def test_boxes_lie_in_the_image_and_are_distributed_as_torchvision_draws_them():
    """Compare with plain Python; in this tall image, no draw fits half of the time."""
    shape = (300, 40)
    area, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    draw = jax.jit(jax.vmap(lambda key: jnp.stack(augment.crop_box(key, shape, area, ratio))))
    top, left, height, width = boxes = np.asarray(draw(augment.keys(jax.random.key(0), 4000))).T
    assert np.all(boxes == np.round(boxes)) and min(top.min(), left.min()) >= 0
    assert np.all(top + height <= shape[0]) and np.all(left + width <= shape[1])
    expected = np.array([torchvision_box(np.random.default_rng(n), *shape) for n in range(4000)]).T
    for ours, theirs in zip(boxes, expected, strict=True):
        error = (ours.var() / 4000 + theirs.var() / 4000) ** 0.5
        assert abs(ours.mean() - theirs.mean()) < 4 * error
        np.testing.assert_allclose([ours.min(), ours.max()], [theirs.min(), theirs.max()], atol=5)


def torchvision_box(rng, rows, columns):
    """Reimplement RandomResizedCrop.get_params with its defaults."""
    for _ in range(10):
        pixels = rows * columns * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round((pixels * ratio) ** 0.5), round((pixels / ratio) ** 0.5)
        if 0 < width <= columns and 0 < height <= rows:
            top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            return top, left, height, width
    height, width = rows, columns
    if columns / rows < 3 / 4:
        height = round(columns / (3 / 4))
    elif columns / rows > 4 / 3:
        width = round(rows * (4 / 3))
    return (rows - height) // 2, (columns - width) // 2, height, width


def test_a_crop_shows_its_box():
    """Crop an image whose pixel values encode their positions."""
    rows, columns = np.meshgrid(np.arange(40), np.arange(60), indexing="ij")
    image = np.stack([rows / 40, columns / 60, rows * 0], axis=-1).astype(np.float32)
    key = jax.random.key(3)
    area, ratio = (0.3, 0.4), (3 / 4, 4 / 3)
    top, left, height, width = jax.jit(lambda k: augment.crop_box(k, (40, 60), area, ratio))(key)
    crop = jax.jit(lambda k, x: augment.random_resized_crop(k, x, 16, area=area))(key, image)
    assert crop.shape == (16, 16, 3)
    places = (np.arange(16) + 0.5) / 16
    inside = slice(2, -2)
    np.testing.assert_allclose(
        crop[inside, 8, 0], (top + places[inside] * height - 0.5) / 40, atol=5e-3
    )
    np.testing.assert_allclose(
        crop[8, inside, 1], (left + places[inside] * width - 0.5) / 60, atol=5e-3
    )


def test_an_images_draws_depend_on_its_place_alone():
    images = np.stack([picture(20, 20, seed) for seed in range(6)])
    apply = jax.jit(augment.each, static_argnums=0)
    crop = functools.partial(augment.random_resized_crop, size=8)
    six, four = (apply(crop, jax.random.key(0), images[:n]) for n in (6, 4))
    np.testing.assert_allclose(six[:4], four, atol=1e-6)
    same = apply(crop, jax.random.key(0), np.stack([images[0]] * 6))
    assert all(np.abs(same[0] - other).max() > 0.01 for other in same[1:])


def everything(key, image):
    image = augment.random_resized_crop(key, image, 16)
    for function in (augment.flip, augment.grayscale, augment.gaussian_blur):
        image = function(key, image)
    return augment.colour_jitter(key, image, **JITTER)


def on_some_devices(count):
    """Augment sixteen images, sharded over the given number of devices."""
    mesh = Mesh(jax.devices()[:count], "data")
    images = np.stack([picture(20, 20, seed) for seed in range(16)])
    images = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    apply = jax.jit(augment.each, static_argnums=0)
    return np.asarray(apply(everything, jax.random.key(0), images)).tolist()


@pytest.mark.slow
def test_eight_devices_draw_and_compute_what_one_does():
    one, eight = on_eight_devices(on_some_devices, [(1,), (8,)])
    np.testing.assert_allclose(one, eight, atol=1e-6)
