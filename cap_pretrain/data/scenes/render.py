"""Fast rendering of scenes from polygons, filled at four times the resolution and area-averaged.

An object is drawn only inside its bounding box, a background is a few tones stretched over the
image, and noise is a window of a table that is drawn once.
"""

import functools
import math

import cv2
import numpy as np

from cap_pretrain.data.scenes.world import Background, Scene, Thing

# Each worker renders one image at a time, so OpenCV's own threads would compete with workers.
cv2.setNumThreads(1)

_RGB = {
    "red": (215, 35, 40),
    "blue": (35, 80, 215),
    "green": (40, 150, 55),
    "yellow": (245, 222, 45),
    "purple": (130, 45, 170),
    "orange": (242, 130, 25),
    "pink": (250, 140, 195),
    "cyan": (60, 205, 215),
}
_INK = 0.45  # brightness of stripes and dots relative to the object; their hue is the same
_RIM = 0.05  # unmarked fraction of the radius, or dark stripes would hide the outline
_THING_TINT, _BACKGROUND_TINT = 12.0, 10.0  # largest change of color, in gray levels

_FINER = 4  # sub-pixels per pixel and axis
_SHIFT = 4  # fractional bits of the polygon corners
_NOISE_WINDOWS = 1 << 16  # positions in the noise table where the noise of an image can start


def render(scene: Scene, size: int, noise: float) -> np.ndarray:
    """Return RGB uint8 [size, size, 3]; `noise` is the largest standard deviation / full scale."""
    image = _backdrop(scene.background, size)
    for thing in scene.things:
        _paint(image, thing)
    table = _noise_table(size)
    start = int(scene.noise_seed * _NOISE_WINDOWS)
    grain = table[start : start + image.size].reshape(image.shape)
    return cv2.addWeighted(image, 1, grain, 255 * noise * scene.noise, 0, dtype=cv2.CV_8U)


def outline(thing: Thing) -> tuple[float, float, float, float]:
    """Return the smallest box around an object's shape: left, top, right and bottom, as shares."""
    corners = thing.radius * (_SHAPE[thing.shape].reshape(-1, 2) @ _turned(thing.angle))
    (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
    x, y = thing.x, thing.y
    return x + float(left), y + float(top), x + float(right), y + float(bottom)


def _turned(angle: float) -> np.ndarray:
    """Return the matrix by which corners are multiplied from the right to turn a shape."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array(((cos, sin), (-sin, cos)))


def _backdrop(background: Background, size: int) -> np.ndarray:
    tones = np.array(background.tones, np.float32).reshape(background.cells, background.cells, 1)
    tones = tones + np.array(background.tint, np.float32) * _BACKGROUND_TINT
    return cv2.resize(tones, (size, size), interpolation=cv2.INTER_LINEAR)


def _paint(image: np.ndarray, thing: Thing) -> None:
    """Blend an object into the float32 image [S, S, 3], in place."""
    size = image.shape[0]
    x, y, radius = thing.x * size, thing.y * size, thing.radius * size
    left, right = max(int(x - radius), 0), min(int(x + radius) + 1, size)
    top, bottom = max(int(y - radius), 0), min(int(y + radius) + 1, size)
    box = (right - left, bottom - top)

    # From the unit circle to fixed-point sub-pixels. OpenCV counts from pixel centers, hence - 0.5.
    scale = radius * _FINER * (1 << _SHIFT)
    cos, sin = scale * math.cos(thing.angle), scale * math.sin(thing.angle)
    turn = np.array(((cos, sin), (-sin, cos)))
    center = (np.array((x - left, y - top)) * _FINER - 0.5) * (1 << _SHIFT)

    fine = _fill(box, _SHAPE[thing.shape] @ turn + center)
    cover = _average(fine, box)
    colour = np.array(_RGB[thing.colour], np.float32)
    colour += np.array(thing.tint, np.float32) * _THING_TINT
    patch = image[top:bottom, left:right]
    patch += cover * (colour - patch)
    if thing.pattern in _PATTERN:
        marks = _fill(box, _PATTERN[thing.pattern] @ turn + center)
        rim = 1 + 2 * round(_RIM * radius * _FINER)
        inside = cv2.erode(fine, np.ones((rim, rim), np.uint8), borderType=cv2.BORDER_REPLICATE)
        patch += _average(cv2.bitwise_and(inside, marks), box) * (colour * (_INK - 1))


def _fill(box: tuple[int, int], polygons: np.ndarray) -> np.ndarray:
    """Return the mask of polygons [n, corners, 2] (even-odd rule), uint8, at fine resolution."""
    mask = np.zeros((box[1] * _FINER, box[0] * _FINER), np.uint8)
    cv2.fillPoly(mask, list(polygons.astype(np.int32)), 255, shift=_SHIFT)
    return mask


def _average(fine: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """Return the covered fraction of each pixel, float32 [h, w, 1]."""
    cover = cv2.resize(fine, box, interpolation=cv2.INTER_AREA)
    return cover[:, :, None] * np.float32(1 / 255)


@functools.cache
def _noise_table(size: int) -> np.ndarray:
    # NumPy guarantees the stream of RandomState, but not that of default_rng.
    count = 3 * size * size + _NOISE_WINDOWS
    return np.random.RandomState(size).standard_normal(count).astype(np.float32)


def _regular(corners: int, *radii: float) -> np.ndarray:
    """Return corners [corners, 2] on circles of alternating `radii`, the first at the top."""
    angle = np.arange(corners) * (2 * np.pi / corners)
    radius = np.resize(radii, corners)
    return np.stack([np.sin(angle) * radius, -np.cos(angle) * radius], axis=-1)


def _rectangle(x: float, y: float, half_width: float, half_height: float) -> np.ndarray:
    corners = np.array(((-1, -1), (1, -1), (1, 1), (-1, 1)))
    return corners * (half_width, half_height) + (x, y)


def _heart() -> np.ndarray:
    # https://mathworld.wolfram.com/HeartCurve.html, equation 6
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 1.5], axis=-1) / 17.6


def _cross() -> np.ndarray:
    long, short = 0.94, 0.31
    corner = np.array(((short, long), (short, short), (long, short)))
    quarter = np.array(((0, -1), (1, 0)))
    arms = [corner @ np.linalg.matrix_power(quarter, k) for k in range(4)]
    return np.concatenate(arms)


# Polygons [n, corners, 2]. Rotated as far as in scenes, they stay within [-1, 1].
_SHAPE = {
    "circle": _regular(48, 0.92)[None],
    "square": _rectangle(0, 0, 0.72, 0.72)[None],
    "triangle": _regular(3, 1.0)[None] + (0, 0.08),
    "star": _regular(10, 1.0, 0.42)[None],
    "cross": _cross()[None],
    "heart": _heart()[None],
    "ring": np.stack([_regular(48, 0.96), _regular(48, 0.52)]),
    "diamond": _regular(4, 1.0, 0.64)[None],
}
_PATTERN = {
    "striped": np.stack([_rectangle(0, k * 0.42, 1.2, 0.1) for k in range(-2, 3)]),
    "dotted": np.stack(
        [
            _regular(12, 0.13) + ((column + row % 2 / 2) * 0.5, row * 0.42)
            for row in range(-2, 3)
            for column in range(-2, 3)
        ]
    ),
    "checkered": np.stack(
        [
            _rectangle(column * 0.36, row * 0.36, 0.18, 0.18)
            for row in range(-3, 4)
            for column in range(-3, 4)
            if (row + column) % 2
        ]
    ),
}
