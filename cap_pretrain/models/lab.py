"""Colors as CIE L*a*b* and as distributions over bins of the ab plane (Zhang et al. 2016).

L is lightness, from 0 to 100. a (green to red) and b (blue to yellow) are color, both 0 for gray.
Zhang et al. ("Colorful Image Colorization", 1603.08511, section 2.1) divide the ab plane into
squares of side 10 and predict the square of a pixel. Only squares that occur are used: here the 261
that contain any color of sRGB. The authors use 313, which no simple rule reproduces.

The conversions accept numpy and JAX arrays, and compute in that library and in the input precision.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Linear sRGB to CIE XYZ, white of D65 (IEC 61966-2-1).
XYZ = np.array(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ]
)
# XYZ of that white (CIE 1931, 2 degrees).
WHITE = np.array([0.95047, 1.0, 1.08883])
# Below this value, CIE 1976 replaces the cube root by a linear function.
_KNEE = 6 / 29

STEP = 10
"""Side of a bin in ab units (Zhang et al. 2016, section 2.1)."""

BINS = 261
"""Number of bins, Q."""

NEIGHBOURS, SIGMA = 10, 5.0
"""Number of bins of the soft encoding, and its Gaussian's width in ab units (section 2.1)."""

TEMPERATURE = 0.38
"""Temperature of the annealed mean (section 2.3)."""


def decode_srgb(rgb: Any) -> Any:
    """Convert sRGB in [0, 1] to linear RGB in [0, 1] (IEC 61966-2-1)."""
    xp = rgb.__array_namespace__()
    power = ((xp.maximum(rgb, 0.04045) + 0.055) / 1.055) ** 2.4
    return xp.where(rgb <= 0.04045, rgb / 12.92, power)


def encode_srgb(linear: Any) -> Any:
    """Convert linear RGB to sRGB in [0, 1], clipping values outside [0, 1]."""
    xp = linear.__array_namespace__()
    linear = xp.clip(linear, 0, 1)
    root = xp.maximum(linear, 0.0031308) ** (1 / 2.4)
    return xp.where(linear <= 0.0031308, linear * 12.92, 1.055 * root - 0.055)


def lab(rgb: Any) -> Any:
    """Convert sRGB [..., 3] in [0, 1] to L*a*b* [..., 3] under D65 (CIE 1976)."""
    xp = rgb.__array_namespace__()
    # An explicit sum of products: the matrix units of accelerators would round to bfloat16.
    linear = decode_srgb(rgb)[..., None, :]
    xyz = (linear * xp.asarray(XYZ / WHITE[:, None], dtype=rgb.dtype)).sum(-1)
    root = xp.cbrt(xp.maximum(xyz, _KNEE**3))
    f = xp.where(xyz > _KNEE**3, root, xyz / (3 * _KNEE**2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return xp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def rgb(lab: Any) -> Any:
    """Convert L*a*b* [..., 3] to sRGB [..., 3] in [0, 1], clipping colors outside its gamut."""
    xp = lab.__array_namespace__()
    y = (lab[..., 0] + 16) / 116
    f = xp.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = xp.where(f > _KNEE, f**3, 3 * _KNEE**2 * (f - 4 / 29))
    inverse = xp.asarray(np.linalg.inv(XYZ) * WHITE, dtype=lab.dtype)
    return encode_srgb((xyz[..., None, :] * inverse).sum(-1))


def gray(rgb: Any) -> Any:
    """Return the gray of the same lightness L as sRGB [..., 3] in [0, 1], as sRGB [..., 3].

    The result contains only L. A gray image is unchanged.
    """
    xp = rgb.__array_namespace__()
    luminance = (decode_srgb(rgb) * xp.asarray(XYZ[1] / XYZ[1].sum(), dtype=rgb.dtype)).sum(-1)
    return xp.broadcast_to(encode_srgb(luminance)[..., None], rgb.shape)


@functools.cache
def bins() -> np.ndarray:
    """Return the bin centers float32 [Q, 2], multiples of STEP, sorted by a, then b.

    The bins are those nearest to some color of sRGB, of any lightness. It suffices to sample the
    faces of the RGB cube, because a line of constant ab that meets the cube also meets a face.
    Every third of 256 levels suffices: sampling all of them gives the same bins.
    """
    side = np.arange(0, 256, 3) / 255
    free = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    faces = [np.insert(free, axis, value, axis=1) for axis in range(3) for value in (0.0, 1.0)]
    nearest = np.round(lab(np.concatenate(faces))[:, 1:] / STEP)
    return STEP * np.unique(nearest + 0.0, axis=0).astype(np.float32)


def nearest_bin(ab: Any) -> Any:
    """Return the index of the nearest bin, int [...], of colors ab [..., 2]."""
    xp = ab.__array_namespace__()
    return xp.argmin(_squares(ab), axis=-1)


def encode(ab: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the soft encoding of colors ab [..., 2].

    Returns:
        Indices and probabilities of the nearest bins, [..., NEIGHBOURS] each, nearest first. The
        probabilities of a color sum to 1.
    """
    squares, numbers = jax.lax.top_k(-_squares(ab), NEIGHBOURS)
    return numbers, jax.nn.softmax(squares / (2 * SIGMA**2), axis=-1)


def annealed_mean(logits: jax.Array, temperature: float = TEMPERATURE) -> jax.Array:
    """Return the mean color ab [..., 2] of logits [..., Q], sharpened by the temperature."""
    probabilities = jax.nn.softmax(logits / temperature, axis=-1)
    return jnp.matmul(probabilities, bins(), precision="highest")


def weights(counts: np.ndarray, uniform: float = 0.5) -> np.ndarray:
    """Return loss weights of the bins that balance rare and frequent colors (section 2.2).

    The weights are inverse to the empirical distribution, smoothed by the Gaussian of the encoding
    and mixed with the uniform distribution. Their mean under the smoothed distribution is 1.

    Args:
        counts: [Q], number of colors in each bin.
        uniform: Weight of the uniform distribution in the mixture; lambda in the paper.

    Returns:
        float32 [Q].
    """
    kernel = np.exp(-_squares(bins().astype(np.float64)) / (2 * SIGMA**2))
    smoothed = (counts / np.sum(counts)) @ (kernel / kernel.sum(1, keepdims=True))
    inverse = 1 / ((1 - uniform) * smoothed + uniform / len(counts))
    return (inverse / np.sum(smoothed * inverse)).astype(np.float32)


def area_means(side: int, cells: int) -> np.ndarray:
    """Return the matrix float32 [cells, side] that averages `side` numbers over equal cells.

    A number on the border of two cells contributes to both in proportion to its overlap.
    """
    edges = np.arange(cells + 1) * (side / cells)
    ends = np.minimum(edges[1:, None], np.arange(1, side + 1))
    inside = np.maximum(ends - np.maximum(edges[:-1, None], np.arange(side)), 0)
    return (inside * (cells / side)).astype(np.float32)


def _squares(ab: Any) -> Any:
    """Return the squared distances [..., Q] of colors ab [..., 2] to all bins."""
    centers = bins().astype(ab.dtype)
    return (ab[..., None, 0] - centers[:, 0]) ** 2 + (ab[..., None, 1] - centers[:, 1]) ** 2
