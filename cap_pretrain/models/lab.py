"""Colours as CIE L*a*b* and as a distribution over bins of the ab plane (Zhang et al. 2016).

L is lightness, 0 to 100; a (green to red) and b (blue to yellow) are colour, both 0 for gray. Zhang
et al. ("Colorful Image Colorization", 1603.08511, section 2.1) cut the ab plane into squares of
side 10 and predict which of them a pixel is in. Of these there are as many as occur: here those in
which there is any colour of sRGB, 261. They count 313; which those are, no simple rule gives.

Conversions take arrays of numpy or JAX and compute in that library and in the precision they get.
"""

import functools

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
# Where the cube root of CIE 1976 becomes a straight line.
_KNEE = 6 / 29

STEP = 10
"""Side of a bin (Zhang et al. 2016, section 2.1)."""

BINS = 261
"""How many bins there are, Q."""

NEIGHBOURS, SIGMA = 10, 5.0
"""A colour is shared out to so many bins, by a Gaussian of so many units (section 2.1)."""

TEMPERATURE = 0.38
"""Of the annealed mean (section 2.3)."""


def decode_srgb(rgb):
    """sRGB in [0, 1] -> linear, in [0, 1] (IEC 61966-2-1)."""
    xp = rgb.__array_namespace__()
    power = ((xp.maximum(rgb, 0.04045) + 0.055) / 1.055) ** 2.4
    return xp.where(rgb <= 0.04045, rgb / 12.92, power)


def encode_srgb(linear):
    """Linear in [0, 1] -> sRGB in [0, 1]; what lies outside is cut."""
    xp = linear.__array_namespace__()
    linear = xp.clip(linear, 0, 1)
    root = xp.maximum(linear, 0.0031308) ** (1 / 2.4)
    return xp.where(linear <= 0.0031308, linear * 12.92, 1.055 * root - 0.055)


def lab(rgb):
    """sRGB [..., 3] in [0, 1] -> L*a*b* [..., 3] under D65 (CIE 1976)."""
    xp = rgb.__array_namespace__()
    # Three products and two sums: matrix units of accelerators would round to bfloat16.
    linear = decode_srgb(rgb)[..., None, :]
    xyz = (linear * xp.asarray(XYZ / WHITE[:, None], dtype=rgb.dtype)).sum(-1)
    root = xp.cbrt(xp.maximum(xyz, _KNEE**3))
    f = xp.where(xyz > _KNEE**3, root, xyz / (3 * _KNEE**2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return xp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def rgb(lab):
    """L*a*b* [..., 3] -> sRGB [..., 3] in [0, 1]; colours that sRGB has not are cut to it."""
    xp = lab.__array_namespace__()
    y = (lab[..., 0] + 16) / 116
    f = xp.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = xp.where(f > _KNEE, f**3, 3 * _KNEE**2 * (f - 4 / 29))
    inverse = xp.asarray(np.linalg.inv(XYZ) * WHITE, dtype=lab.dtype)
    return encode_srgb((xyz[..., None, :] * inverse).sum(-1))


def gray(rgb):
    """sRGB [..., 3] in [0, 1] -> the gray of the same lightness L, as sRGB [..., 3].

    It holds L and nothing else, and a gray image stays as it is.
    """
    xp = rgb.__array_namespace__()
    luminance = (decode_srgb(rgb) * xp.asarray(XYZ[1] / XYZ[1].sum(), dtype=rgb.dtype)).sum(-1)
    return xp.broadcast_to(encode_srgb(luminance)[..., None], rgb.shape)


@functools.cache
def bins() -> np.ndarray:
    """The centres of the bins: float32 [Q, 2], multiples of STEP, in the order of a, then b.

    Those to which a colour of sRGB is nearest, of any lightness. It is enough to look at the faces
    of the cube of RGB, as a line of equal ab that meets the cube also meets a face, and there at
    every third of 256 levels: all of them give the same.
    """
    side = np.arange(0, 256, 3) / 255
    free = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    faces = [np.insert(free, axis, value, axis=1) for axis in range(3) for value in (0.0, 1.0)]
    nearest = np.round(lab(np.concatenate(faces))[:, 1:] / STEP)
    return STEP * np.unique(nearest + 0.0, axis=0).astype(np.float32)


def nearest_bin(ab):
    """ab [..., 2] -> int [...], the number of the nearest bin."""
    xp = ab.__array_namespace__()
    return xp.argmin(_squares(ab), axis=-1)


def encode(ab: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ab [..., 2] -> numbers and shares of its nearest bins, [..., NEIGHBOURS], nearest first.

    The shares of a colour add up to 1.
    """
    squares, numbers = jax.lax.top_k(-_squares(ab), NEIGHBOURS)
    return numbers, jax.nn.softmax(squares / (2 * SIGMA**2), axis=-1)


def annealed_mean(logits: jax.Array, temperature: float = TEMPERATURE) -> jax.Array:
    """Logits [..., Q] -> ab [..., 2]: the mean of the distribution after it is sharpened."""
    shares = jax.nn.softmax(logits / temperature, axis=-1)
    return jnp.matmul(shares, bins(), precision="highest")


def weights(counts: np.ndarray, uniform: float = 0.5) -> np.ndarray:
    """How much a colour of each bin counts, so that rare ones are learned, too (section 2.2).

    Inverse to its share, smoothed by the Gaussian of the encoding and mixed with even shares, and 1
    on average.

    Args:
      counts: [Q], how many colours were seen of each bin.
      uniform: how much of the mixture are even shares; lambda in the paper.

    Returns:
      float32 [Q].
    """
    kernel = np.exp(-_squares(bins().astype(np.float64)) / (2 * SIGMA**2))
    shares = (counts / np.sum(counts)) @ (kernel / kernel.sum(1, keepdims=True))
    found = 1 / ((1 - uniform) * shares + uniform / len(counts))
    return (found / np.sum(shares * found)).astype(np.float32)


def area_means(side: int, cells: int) -> np.ndarray:
    """float32 [cells, side]: the matrix that averages `side` numbers over cells of equal length.

    A number on the border of two cells counts for both by how much of it is in each.
    """
    edges = np.arange(cells + 1) * (side / cells)
    ends = np.minimum(edges[1:, None], np.arange(1, side + 1))
    inside = np.maximum(ends - np.maximum(edges[:-1, None], np.arange(side)), 0)
    return (inside * (cells / side)).astype(np.float32)


def _squares(ab):
    """ab [..., 2] -> squared distances to all bins, [..., Q]."""
    centres = bins().astype(ab.dtype)
    return (ab[..., None, 0] - centres[:, 0]) ** 2 + (ab[..., None, 1] - centres[:, 1]) ** 2
