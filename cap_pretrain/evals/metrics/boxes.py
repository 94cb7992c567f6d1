"""Overlap of boxes: left, top, right and bottom, in any unit."""

import numpy as np


def intersection_over_union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the area that boxes share divided by the area that they cover together.

    Args:
        a: [..., 4]. A box whose right is not beyond its left, or bottom beyond its top, is empty.
        b: [..., 4], likewise; the shapes broadcast.

    Returns:
        float64 [...], in [0, 1]; 0 for two empty boxes.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    shared = _area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]))
    together = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - shared
    shared, together = np.broadcast_arrays(shared, together)
    return np.divide(shared, together, out=np.zeros(shared.shape), where=together > 0)


def _area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the areas [...] of boxes from their corners [..., 2]."""
    return np.prod(np.maximum(high - low, 0), axis=-1)
