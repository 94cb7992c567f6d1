"""Positions of patches that are computed: sines and cosines, and rotations.

Both fit images of any size and aspect ratio without resampling.

Rotary position embeddings (Su et al. 2021, 2104.09864) have the form of DINOv3 (Siméoni et al.
2025, 2508.10104): pairs of channels of queries and keys are rotated by angles that grow with the
row, or the column, of a patch, so attention sees differences of positions. Rows and columns are
measured in the image, from -1 to 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

KINDS = ("learned", "sines", "rotary")
"""Kinds of positions of a ViT."""

TEMPERATURE = 10_000.0
"""Ratio of the longest to the shortest wavelength of `sines` (Vaswani et al. 2017, 1706.03762)."""

MAX_BASE = 1e9
"""Largest base of rotary positions; that of published models is 100."""


class Grid(NamedTuple):
    """The patches of images, row by row.

    Attributes:
        rows: int32 [B, 1], or a number, which is for a batch of one.
        columns: likewise.
        patches: number of patches; those beyond rows * columns are padding.
    """

    rows: jax.Array | int
    columns: jax.Array | int
    patches: int

    @property
    def sizes(self) -> jax.Array:
        """Rows and columns, int32 [B, 1, 2]."""
        return jnp.stack([jnp.reshape(n, (-1, 1)) for n in self[:2]], axis=-1)

    @property
    def cells(self) -> jax.Array:
        """Row and column of each patch, int32 [B, patches, 2]."""
        index, across = jnp.arange(self.patches)[None], self.sizes[..., 1]
        return jnp.stack([index // across, index % across], axis=-1)


def sines(grid: Grid, width: int) -> jax.Array:
    """Return positions float32 [B, N, width], the sines and cosines of AIMv2's native models.

    A quarter of the channels each has sines and cosines of the column, then of the row.
    """
    rates = TEMPERATURE ** -(jnp.arange(width // 4) / (width // 4))
    angles = grid.cells[..., ::-1, None] * rates  # [B, N, 2, width / 4]
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=3)
    return both.reshape(*angles.shape[:2], width)


class Rotation(NamedTuple):
    """Cosines and sines of the angles of tokens, float32 [B | 1, N, 1, d / 2] for heads of d."""

    cos: jax.Array
    sin: jax.Array


def centers(grid: Grid) -> jax.Array:
    """Return the centers of patches, float32 [B, N, 2], as (y, x) from -1 to 1 in an image."""
    return 2 * (grid.cells.astype(jnp.float32) + 0.5) / grid.sizes - 1


def rotation(places: jax.Array, base: float, dim: int, leading: int) -> Rotation:
    """Return the rotation of tokens whose patches are at these places.

    Args:
        places: float32 [B, N, 2], as of `centers`.
        base: The wavelengths are base ** (4 k / dim) halves of an image for k < dim / 4.
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
