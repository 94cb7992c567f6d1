"""Images in their own aspect ratio: their patches, positions and padding.

`naflex` makes them one array of bytes a batch; `separate` parts it. An encoder marks which of
its tokens are padding in one more channel, `marked`, which attention over the tokens and their mean
leave out. So tokens remain one array, whether there is padding or not.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain.naflex import GRID


class Patches(NamedTuple):
    """Images as patches, of which the first rows * columns are real.

    Attributes:
        pixels: [B, N, P * P * 3] in [-1, 1].
        grid: int32 [B, 2], rows and columns.
    """

    pixels: jax.Array
    grid: jax.Array

    @property
    def real(self) -> jax.Array:
        """Which patches are no padding, bool [B, N]."""
        return jnp.arange(self.pixels.shape[1]) < jnp.prod(self.grid, axis=1, keepdims=True)


def is_packed(images: jax.Array | np.ndarray) -> bool:
    """Return whether a batch of images is of `naflex.packed`, uint8 [B, N, W]."""
    return images.ndim == 3 and images.dtype == jnp.uint8


def separate(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the pixels uint8 [B, N, P * P * 3] and the grid int32 [B, 2] of packed images.

    Rows of zeros, which fill a batch, are images of one patch.
    """
    return images[..., :-GRID], jnp.maximum(images[:, 0, -GRID:].astype(jnp.int32), 1)


@functools.partial(jax.checkpoint, static_argnums=2)
def positions(table: jax.Array, grid: jax.Array, count: int) -> jax.Array:
    """Resample position embeddings to the grid of each image.

    They are those of `jax.image.resize` ("bilinear", antialiased), and exactly those of the table
    where the grids are equal. The backward pass computes the weights again, float32 [B, N, G * G],
    so that they need no memory in between.

    Args:
        table: [G, G, D].
        grid: int32 [B, 2], rows and columns of each image.
        count: N, number of patches with padding.

    Returns:
        float32 [B, N, D]. At padding they are those of the first patch.
    """
    side, _, width = table.shape
    sizes = grid.astype(jnp.float32)[:, None]  # [B, 1, 2]
    index = jnp.arange(count)[None] * (jnp.arange(count) < jnp.prod(grid, axis=1, keepdims=True))
    columns = grid[:, 1:]
    place = jnp.stack([index // columns, index % columns], axis=-1).astype(jnp.float32)
    scale = side / sizes
    center = (place + 0.5) * scale - 0.5  # in the table, [B, N, 2]
    away = jnp.abs(jnp.arange(side) - center[..., None]) / jnp.maximum(scale, 1)[..., None]
    weights = jnp.maximum(1 - away, 0)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    both = weights[:, :, 0, :, None] * weights[:, :, 1, None, :]  # [B, N, G, G]
    return jnp.matmul(
        both.reshape(len(grid), count, side * side),
        table.reshape(side * side, width).astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def marked(tokens: jax.Array, real: jax.Array) -> jax.Array:
    """Return tokens [B, N, D + 1]: the last channel is 1 where `real`, bool [B, N], and else 0."""
    return jnp.concatenate([tokens, real[..., None].astype(tokens.dtype)], axis=-1)


def unmarked(tokens: jax.Array, width: int) -> tuple[jax.Array, jax.Array | None]:
    """Return tokens [B, N, width], and which are no padding, bool [B, N], or None if all are.

    Raises ValueError if the tokens have another width and no mark either.
    """
    if tokens.shape[-1] == width:
        return tokens, None
    if tokens.shape[-1] != width + 1:
        raise ValueError(f"tokens {tokens.shape} have a width of neither {width} nor {width + 1}")
    return tokens[..., :-1], tokens[..., -1] > 0


def mean(tokens: jax.Array, width: int) -> jax.Array:
    """Return the mean [B, D] of tokens [B, N, D] that are no padding."""
    tokens, real = unmarked(tokens, width)
    return jnp.mean(tokens, axis=1, where=None if real is None else real[..., None])
