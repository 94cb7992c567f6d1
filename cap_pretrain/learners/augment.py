"""Augmentations drawn on the device, for pretexts that need several pictures of one image.

Every function of a key and an image is for one float32 image [H, W, 3] in [0, 1] and gives such an
image; `each` applies it to a batch. What is drawn for an example depends on the key and on its
place in the global batch alone, so any layout of the devices draws the same.

Names and numbers are those of torchvision's transforms, with which VISSL and most reproductions of
SimCLR train. dm_pix computes what follows TensorFlow there (contrast around the mean of each
channel, saturation in HSV); used of it is what is the same in both.
"""

import math
from collections.abc import Callable
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp

# Tries at a crop that fits, as many as torchvision's RandomResizedCrop makes.
_TRIES = 10


def keys(key: jax.Array, count: int) -> jax.Array:
    """One key for each of the first `count` places in a batch: [count]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def each(
    function: Callable[..., Any], key: jax.Array, images: jax.Array, *arrays: jax.Array
) -> Any:
    """`function(key, image, *parts)` of every image of a batch, with a key of its own.

    Args:
      function: of one image; it may return any tree of arrays.
      key: the batch's.
      images: [B, H, W, 3].
      *arrays: [B, ...], one part for each image.

    Returns:
      What the function returns, each array with a leading axis B.
    """
    return jax.vmap(function)(keys(key, len(images)), images, *arrays)


def unit_range(images: jax.Array) -> jax.Array:
    """uint8 images of any shape -> float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """A random part of the image, resized to [size, size, 3], bilinear with antialiasing.

    Its box is drawn by `crop_box`. Unlike torchvision, which cuts before it resizes, what is
    computed of the pixels at its edges reads a little of their neighbours outside.
    """
    top, left, height, width = crop_box(key, image.shape[:2], area, ratio)
    scale = size / jnp.stack([height, width])
    resized = jax.image.scale_and_translate(
        image,
        (size, size, image.shape[-1]),
        (0, 1),
        scale,
        -scale * jnp.stack([top, left]),
        method="linear",
        antialias=True,
    )
    return jnp.clip(resized, 0.0, 1.0)


def crop_box(
    key: jax.Array, shape: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws (top, left, height, width) in whole pixels, as torchvision's RandomResizedCrop does.

    The share of the image's area is uniform and the ratio of width to height log-uniform, which may
    give a box that is wider or higher than the image. Of ten draws the first that fits is taken; if
    none does, the largest box in the middle whose ratio is allowed.

    Args:
      key: for the draw.
      shape: height and width of the image.
      area: smallest and largest share.
      ratio: smallest and largest width / height.
    """
    rows, columns = shape
    # One draw of all numbers: each costs the compiler as much as what is made of them.
    drawn = jax.random.uniform(key, (2, _TRIES + 1))
    low, high = jnp.array([area[0], math.log(ratio[0])]), jnp.array([area[1], math.log(ratio[1])])
    shares, logs = low[:, None] + (high - low)[:, None] * drawn[:, :-1]
    pixels, ratios = rows * columns * shares, jnp.exp(logs)
    heights, widths = jnp.round(jnp.sqrt(jnp.stack([pixels / ratios, pixels * ratios])))
    fits = (heights >= 1) & (heights <= rows) & (widths >= 1) & (widths <= columns)
    allowed = min(max(columns / rows, ratio[0]), ratio[1])
    largest = min(rows, round(columns / allowed)), min(columns, round(rows * allowed))
    first = jnp.argmax(fits)
    box = jnp.where(
        jnp.any(fits), jnp.stack([heights[first], widths[first]]), jnp.array(largest, jnp.float32)
    )
    room = jnp.array(shape) - box
    anywhere = jnp.minimum(jnp.floor(drawn[:, -1] * (room + 1)), room)
    top, left = jnp.where(jnp.any(fits), anywhere, jnp.floor(room / 2))
    return top, left, *box


def flip(key: jax.Array, image: jax.Array, probability: float = 0.5) -> jax.Array:
    """Mirrors left and right."""
    return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)


def colour_jitter(
    key: jax.Array,
    image: jax.Array,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
) -> jax.Array:
    """Changes four properties of the colours in a random order, as torchvision's ColorJitter.

    Args:
      key: for all that is drawn.
      image: float32 [H, W, 3] in [0, 1].
      brightness, contrast, saturation: the factor is uniform in [max(0, 1 - x), 1 + x].
      hue: the shift is uniform in [-x, x], 1 being the whole circle.
      probability: of changing anything.
    """
    amounts, order, choice = jnp.split(jax.random.uniform(key, 9), (4, 8))
    reach = jnp.array([brightness, contrast, saturation])
    low = jnp.append(jnp.maximum(0.0, 1 - reach), -hue)
    high = jnp.append(1 + reach, hue)
    amounts = low + (high - low) * amounts
    changes = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)

    def change(image, which):
        return jax.lax.switch(which, changes, image, amounts[which]), None

    # A loop, not four changes one after the other: the program is a quarter as long.
    changed, _ = jax.lax.scan(change, image, jnp.argsort(order))
    return jnp.where(choice < probability, changed, image)


def adjust_brightness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Multiplies; values above 1 are cut, here and below."""
    return _blend(image, jnp.zeros_like(image), factor)


def adjust_contrast(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Moves away from (or to, below 1) the mean of the image in gray."""
    return _blend(image, jnp.mean(luma(image)), factor)


def adjust_saturation(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Moves away from (or to, below 1) each pixel in gray."""
    return _blend(image, luma(image), factor)


def adjust_hue(image: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Turns the hue in HSV by a share of the circle."""
    return jnp.clip(dm_pix.adjust_hue(image, shift), 0.0, 1.0)


def _blend(image: jax.Array, other: jax.Array, factor: jax.Array | float) -> jax.Array:
    return jnp.clip(other + factor * (image - other), 0.0, 1.0)


def luma(image: jax.Array) -> jax.Array:
    """[..., 3] -> [..., 1], weighted .2989, .587, .114 (ITU-R BT.601), as torchvision's gray is."""
    return dm_pix.rgb_to_grayscale(image)


def grayscale(key: jax.Array, image: jax.Array, probability: float = 0.2) -> jax.Array:
    """Replaces the three channels by their luma; with SimCLR's probability (appendix A)."""
    return jnp.where(jax.random.bernoulli(key, probability), luma(image), image)


def gaussian_blur(
    key: jax.Array,
    image: jax.Array,
    sigma: tuple[float, float] = (0.1, 2.0),
    probability: float = 0.5,
) -> jax.Array:
    """Blurs with a Gaussian of random width in pixels and a kernel of a tenth of the side.

    All numbers are SimCLR's (appendix A, for sides of 224).
    """
    share, choice = jax.random.uniform(key, 2)
    width = sigma[0] + (sigma[1] - sigma[0]) * share
    return jnp.where(choice < probability, blur(image, width, image.shape[0] // 10), image)


def blur(image: jax.Array, sigma: jax.Array | float, kernel: int) -> jax.Array:
    """Convolves with a Gaussian; near the edges it is a mean of what there is.

    It is a product with two matrices that hold the kernel in every row, because a convolution with
    a kernel for each image (dm_pix's, in `each`) is one over as many groups, which is slow and is
    not divided over devices.

    Args:
      image: [H, W, 3].
      sigma: standard deviation in pixels.
      kernel: side of the kernel in pixels, taken as the next odd number.
    """
    rows, columns = (_gaussian_rows(side, sigma, kernel // 2) for side in image.shape[:2])
    return jnp.einsum("hi,wj,ijc->hwc", rows, columns, image, precision="highest")


def _gaussian_rows(side: int, sigma: jax.Array | float, radius: int) -> jax.Array:
    """[side, side]: row i weighs pixels around i; the sum of a row is 1."""
    distance = jnp.abs(jnp.arange(side)[:, None] - jnp.arange(side))
    weights = jnp.where(distance <= radius, jnp.exp(-(distance**2) / (2 * sigma**2)), 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)
