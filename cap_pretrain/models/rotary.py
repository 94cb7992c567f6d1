"""Rotary position embeddings of patches (Su et al. 2021, 2104.09864), in the form of DINOv3.

Pairs of channels of queries and keys are rotated by angles that grow with the row, or the column,
of a patch, so attention sees differences of positions. Rows and columns are measured in the image,
from -1 to 1, so images of any size and aspect ratio need no resampling (Siméoni et al. 2025,
2508.10104).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Cosines and sines of the angles of tokens, float32 [B | 1, N, 1, d / 2] for heads of d."""

    cos: jax.Array
    sin: jax.Array


def places(rows: jax.Array | int, columns: jax.Array | int, count: int) -> jax.Array:
    """Return the centers of patches, float32 [B, count, 2], as (y, x) from -1 to 1 in an image.

    Args:
        rows: int32 [B, 1], or a number, which is for a batch of one.
        columns: likewise.
        count: number of patches, row by row; those beyond rows * columns are padding.
    """
    sizes = jnp.stack([jnp.reshape(rows, (-1, 1)), jnp.reshape(columns, (-1, 1))], axis=-1)
    index = jnp.arange(count)[None]
    across = sizes[..., 1]
    place = jnp.stack([index // across, index % across], axis=-1).astype(jnp.float32)
    return 2 * (place + 0.5) / sizes - 1


def rotation(places: jax.Array, base: float, dim: int, leading: int) -> Rotation:
    """Return the rotation of tokens whose patches are at these places.

    Args:
        places: float32 [B, N, 2] of `places`.
        base: The wavelengths are base ** (4 k / dim) image halves for k < dim / 4.
        dim: Width of a head, a multiple of 4.
        leading: Number of tokens before those of the patches, which are not rotated.
    """
    wavelengths = base ** (jnp.arange(dim // 4, dtype=jnp.float32) * 4 / dim)
    angles = 2 * math.pi * places[..., None] / wavelengths  # [B, N, 2, dim / 4]
    angles = angles.reshape(*places.shape[:2], dim // 2)
    angles = jnp.pad(angles, ((0, 0), (leading, 0), (0, 0)))[:, :, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, by: Rotation | None) -> jax.Array:
    """Rotate queries or keys [B, N, heads, d]: channel k with channel k + d / 2, in float32."""
    if by is None:
        return x
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
