"""Resizing of decoded images by OpenCV, with antialiasing, in few passes over the pixels."""

import cv2
import numpy as np

from cap_pretrain.data import image_files

_SMOOTHED = 5**0.5  # largest downscaling that three taps can smooth: there, their weights are equal


def resized(image: np.ndarray, high: int, wide: int) -> np.ndarray:
    """Resize [H, W, 3] to [high, wide, 3], with antialiasing where it is downscaled.

    For small factors the image is smoothed, then sampled bilinearly. For larger factors it is
    sampled on a grid that is an integer number of times finer, and averaged. Both approximate
    antialiasing as well as exact area averaging (INTER_AREA), which takes 2 to 3 times as long.
    """
    height, width = image.shape[:2]
    if (height, width) == (high, wide):
        return np.ascontiguousarray(image)
    if height <= _SMOOTHED * high and width <= _SMOOTHED * wide:
        if height > high or width > wide:
            kernels = _smoothing(width / wide), _smoothing(height / high)
            image = cv2.sepFilter2D(image, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
        return cv2.resize(image, (wide, high), interpolation=cv2.INTER_LINEAR)
    columns, rows = _samples(width, wide), _samples(height, high)
    if columns * rows * wide * high > 2 * image_files.MAX_PIXELS:  # a line of a million pixels
        return cv2.resize(image, (wide, high), interpolation=cv2.INTER_AREA)
    finer = cv2.resize(image, (columns * wide, rows * high), interpolation=cv2.INTER_LINEAR)
    # OpenCV averages pairs faster as bilinear sampling, which gives the same when halving one side.
    method = cv2.INTER_LINEAR if max(columns, rows) <= 2 else cv2.INTER_AREA
    return cv2.resize(finer, (wide, high), interpolation=method)


def _smoothing(factor: float) -> np.ndarray:
    """Return the three taps that smooth a side before it is downscaled by `factor`, float32 [3].

    Together with bilinear sampling they have the variance of the triangle filter for that factor:
    (factor ** 2 - 1) / 6, in squared pixels of the image, for factors up to `_SMOOTHED`. They are
    multiples of 1 / 256, so OpenCV computes with integers and constant regions stay constant.
    """
    outer = round(256 * max(0.0, factor**2 - 1) / 12) / 256
    return np.array([outer, 1 - 2 * outer, outer], np.float32)


def _samples(side: int, size: int) -> int:
    """Return the number of samples to average along one side for each pixel of the result."""
    return max(2, round(side / size)) if side > size else 1
