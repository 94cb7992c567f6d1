"""Images in their own aspect ratio, as sequences of patches (`data.layout=naflex`).

As in the NaFlex models of SigLIP 2 (Tschannen et al. 2025, 2502.14786), an image is resized to as
many whole patches as a budget allows, with its aspect ratio kept up to a part of a patch, and
padded to the budget. A batch stays one array, so that all that reads batches is the same: each
patch is a row of bytes, its pixels in row-major order and then the grid of its image.
"""

import numpy as np

LAYOUTS = SQUARE, NAFLEX = ("square", "naflex")
"""Values of `data.layout`."""

GRID = 2
"""Bytes after the pixels of a patch: the rows and columns of patches of its image."""

MOST = 255
"""Most patches along a side of an image, so that they fit into a byte."""


def grid(height: int, width: int, budget: int) -> tuple[int, int]:
    """Return into how many rows and columns of patches an image of this size is resized.

    They are those of the largest scale at which the image, rounded up to whole patches, has at most
    `budget` of them. So a square image with a square budget fills it. The image processor of SigLIP
    2 in `transformers` does the same by bisection to 1e-5, which finds the next smaller grid for a
    few of 10,000 sizes, but it enlarges images at most 100 times and has no limit of MOST.
    """
    rows = _most(height, width, budget)
    columns = _most(width, height, budget)
    # Of the two, the larger scale: rows / height against columns / width.
    if rows * width >= columns * height:
        return rows, _beside(rows, height, width)
    return _beside(columns, width, height), columns


def _beside(count: int, side: int, other: int) -> int:
    """Return how many patches the other side has if `side` has exactly `count`, rounded up."""
    return -(-count * other // side)


def _most(side: int, other: int, budget: int) -> int:
    """Return the most patches along a side, such that both sides fit; 0 if none do."""
    low, high = 0, min(budget, MOST)
    while low < high:
        middle = (low + high + 1) // 2
        across = _beside(middle, side, other)
        fits = middle * across <= budget and across <= MOST
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def width_of(patch: int) -> int:
    """Return the bytes of a patch of `patch` pixels a side, its grid included."""
    return patch * patch * 3 + GRID


def packed(pixels: np.ndarray, patch: int, budget: int) -> np.ndarray:
    """Return an image as patches, uint8 [budget, W]; those beyond the image are 0.

    Args:
        pixels: uint8 [rows * patch, columns * patch, 3].
        patch: Side of a patch in pixels.
        budget: N, at least rows * columns.

    Returns:
        uint8 [N, patch * patch * 3 + 2].
    """
    rows, columns = (side // patch for side in pixels.shape[:2])
    found = np.zeros((budget, width_of(patch)), np.uint8)
    cells = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    found[: rows * columns, :-GRID] = cells.reshape(rows * columns, -1)
    found[: rows * columns, -GRID:] = rows, columns
    return found


def is_packed(image: np.ndarray) -> bool:
    """Return whether an image is of `packed`, and not pixels [H, W, 3] or features."""
    return image.ndim == 2 and image.dtype == np.uint8


def grid_of(image: np.ndarray) -> tuple[int, int]:
    """Return the rows and columns of patches of a packed image."""
    rows, columns = image[0, -GRID:].tolist()
    return rows, columns


def unpacked(image: np.ndarray) -> np.ndarray:
    """Return the pixels uint8 [H, W, 3] of a packed image."""
    rows, columns = grid_of(image)
    patch = round(((image.shape[1] - GRID) / 3) ** 0.5)
    cells = image[: rows * columns, :-GRID].reshape(rows, columns, patch, patch, 3)
    return cells.swapaxes(1, 2).reshape(rows * patch, columns * patch, 3)
