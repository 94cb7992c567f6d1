"""On-device image augmentations, for pretext tasks that need several views of one image.

A function of a key and an image takes one float32 image [H, W, 3] in [0, 1] and returns another;
`each` applies it to a batch. The random numbers of an example depend only on the key and on its
index in the global batch, so they do not depend on the device layout.

Names and numbers are those of torchvision's transforms, which VISSL and most reproductions of
SimCLR use. dm_pix follows TensorFlow where the two differ (contrast around the mean of each
channel, saturation in HSV), so only functions that agree are used from it.
"""

import math
from collections.abc import Callable
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp

# Attempts to draw a crop that fits, as in torchvision's RandomResizedCrop.
_TRIES = 10

# Strengths of SimCLR's color jitter (Chen et al. 2020, 2002.05709, appendix A).
SIMCLR_JITTER = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)


def keys(key: jax.Array, count: int) -> jax.Array:
    """Return one key for each of the first `count` indices of a batch: [count]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def each(
    function: Callable[..., Any], key: jax.Array, images: jax.Array, *arrays: jax.Array
) -> Any:
    """Apply `function(key, image, *parts)` to every image of a batch, with separate keys.

    Args:
        function: Function of one image that returns a tree of arrays.
        key: Random key of the batch.
        images: [B, H, W, 3].
        *arrays: [B, ...], further arguments, one row per image.

    Returns:
        The results of the function, with a leading axis B.
    """
    return jax.vmap(function)(keys(key, len(images)), images, *arrays)


def unit_range(images: jax.Array) -> jax.Array:
    """Convert uint8 images of any shape to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """Resize a random crop to [size, size, 3], bilinear with antialiasing.

    `crop_box` draws the crop. torchvision crops before it resizes; here, pixels at the edges of the
    result also read a little of the image outside the crop.
    """
    rows, columns = image.shape[:2]
    top, left, height, width = crop_box(key, (rows, columns), area, ratio)
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
    """Draw a crop in whole pixels, as torchvision's RandomResizedCrop does.

    The fraction of the image's area is uniform and the aspect ratio log-uniform. The box may then
    be wider or higher than the image. The first of ten draws that fits is used; if none fits, the
    largest centered box with an allowed ratio.

    Args:
        key: Random key.
        shape: Height and width of the image.
        area: Smallest and largest fraction of the area.
        ratio: Smallest and largest width / height.

    Returns:
        top, left, height, width.
    """
    rows, columns = shape
    # One draw for all numbers: each draw takes as long to compile as the code that uses it.
    drawn = jax.random.uniform(key, (2, _TRIES + 1))
    low, high = jnp.array([area[0], math.log(ratio[0])]), jnp.array([area[1], math.log(ratio[1])])
    fractions, logs = low[:, None] + (high - low)[:, None] * drawn[:, :-1]
    pixels, ratios = rows * columns * fractions, jnp.exp(logs)
    heights, widths = jnp.round(jnp.sqrt(jnp.stack([pixels / ratios, pixels * ratios])))
    fits = (heights >= 1) & (heights <= rows) & (widths >= 1) & (widths <= columns)
    allowed = min(max(columns / rows, ratio[0]), ratio[1])
    largest = min(rows, round(columns / allowed)), min(columns, round(rows * allowed))
    first = jnp.argmax(fits)
    box = jnp.where(
        jnp.any(fits), jnp.stack([heights[first], widths[first]]), jnp.array(largest, jnp.float32)
    )
    margin = jnp.array(shape) - box
    anywhere = jnp.minimum(jnp.floor(drawn[:, -1] * (margin + 1)), margin)
    top, left = jnp.where(jnp.any(fits), anywhere, jnp.floor(margin / 2))
    return top, left, *box


def flip(key: jax.Array, image: jax.Array, probability: float = 0.5) -> jax.Array:
    """Flip the image horizontally with the given probability."""
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
    """Change four properties of the colors in random order, as torchvision's ColorJitter does.

    Args:
        key: Random key.
        image: float32 [H, W, 3] in [0, 1].
        brightness: Strength x; the factor is uniform in [max(0, 1 - x), 1 + x].
        contrast: Strength, as for brightness.
        saturation: Strength, as for brightness.
        hue: The shift is uniform in [-hue, hue], where 1 is the full circle.
        probability: Probability of changing the image at all.
    """
    amounts, order, choice = jnp.split(jax.random.uniform(key, (9,)), (4, 8))
    reach = jnp.array([brightness, contrast, saturation])
    low = jnp.append(jnp.maximum(0.0, 1 - reach), -hue)
    high = jnp.append(1 + reach, hue)
    amounts = low + (high - low) * amounts
    changes = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)

    def change(image, which):
        return jax.lax.switch(which, changes, image, amounts[which]), None

    # A loop makes the program a quarter as long as four unrolled changes.
    changed, _ = jax.lax.scan(change, image, jnp.argsort(order))
    return jnp.where(choice < probability, changed, image)


def adjust_brightness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Multiply the image by `factor`; this and the functions below clip to [0, 1]."""
    return _blend(image, jnp.zeros_like(image), factor)


def adjust_contrast(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Scale the difference from the mean luma of the image by `factor`."""
    return _blend(image, jnp.mean(luma(image)), factor)


def adjust_saturation(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Scale the difference of each pixel from its luma by `factor`."""
    return _blend(image, luma(image), factor)


def adjust_hue(image: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Rotate the hue in HSV by `shift`, a fraction of the circle."""
    return jnp.clip(dm_pix.adjust_hue(image, shift), 0.0, 1.0)


def _blend(image: jax.Array, other: jax.Array, factor: jax.Array | float) -> jax.Array:
    return jnp.clip(other + factor * (image - other), 0.0, 1.0)


def luma(image: jax.Array) -> jax.Array:
    """Return the luma [..., 1] of [..., 3]: .2989, .587, .114 (ITU-R BT.601), as torchvision."""
    return dm_pix.rgb_to_grayscale(image)


def grayscale(key: jax.Array, image: jax.Array, probability: float = 0.2) -> jax.Array:
    """Replace the channels by their luma; default: SimCLR's probability (appendix A)."""
    return jnp.where(jax.random.bernoulli(key, probability), luma(image), image)


def gaussian_blur(
    key: jax.Array,
    image: jax.Array,
    sigma: tuple[float, float] = (0.1, 2.0),
    probability: float = 0.5,
) -> jax.Array:
    """Blur with a Gaussian of random `sigma` in pixels and a kernel of a tenth of the side.

    All numbers are SimCLR's (appendix A, for images of 224 pixels).
    """
    draw, choice = jax.random.uniform(key, (2,))
    width = sigma[0] + (sigma[1] - sigma[0]) * draw
    return jnp.where(choice < probability, blur(image, width, image.shape[0] // 10), image)


def blur(image: jax.Array, sigma: jax.Array | float, kernel: int) -> jax.Array:
    """Convolve with a Gaussian, renormalized at the edges over the pixels inside the image.

    The convolution is a product with two matrices that hold the kernel in every row. A convolution
    with one kernel per image (dm_pix's, in `each`) would be a grouped convolution, which is slow
    and is not partitioned over devices.

    Args:
        image: [H, W, 3].
        sigma: Standard deviation in pixels.
        kernel: Side of the kernel in pixels, rounded up to an odd number.
    """
    rows, columns = (_gaussian_rows(side, sigma, kernel // 2) for side in image.shape[:2])
    return jnp.einsum("hi,wj,ijc->hwc", rows, columns, image, precision="highest")


def _gaussian_rows(side: int, sigma: jax.Array | float, radius: int) -> jax.Array:
    """Return weights [side, side]: row i is the kernel around pixel i and sums to 1."""
    distance = jnp.abs(jnp.arange(side)[:, None] - jnp.arange(side))
    weights = jnp.where(distance <= radius, jnp.exp(-(distance**2) / (2 * sigma**2)), 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)
