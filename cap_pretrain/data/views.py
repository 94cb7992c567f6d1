"""What a learner sees of an image, and what people see of it."""

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeGuard

import cv2
import numpy as np

from cap_pretrain import naflex
from cap_pretrain.data import images
from cap_pretrain.errors import UserError

RANDOM_CROPS: dict[str, Callable[..., np.ndarray]] = {  # by their name in a config
    "random": images.random_resized_crop,
    "window": images.random_window,
}


@dataclasses.dataclass(frozen=True)
class View:
    """What a learner sees of an image in evaluation.

    Attributes:
        size: Side in pixels of the square.
        crop: "none" squashes the whole image; "center" takes the largest centered square.
        patch: If not 0, the whole image becomes patches of so many pixels a side, in its own aspect
            ratio, at most as many as such a square has (`naflex`).
    """

    size: int
    crop: Literal["none", "center"] = "none"
    patch: int = 0

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """Return an image as uint8 [S, S, 3] or patches [N, W]; errors as for `square`."""
        return prepared(image, self.size, self.crop, patch=self.patch)


def is_features(image: bytes | np.ndarray) -> TypeGuard[np.ndarray]:
    """Return whether an example's `image` holds features of an encoder: float [1 + N, D]."""
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"


def picture(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """Return the whole image as uint8 [size, size, 3], for display.

    Raises ImageError if it does not decode, UserError if it holds features.
    """
    _check_shows(image)
    return square(image, size, "none")


def photo(image: bytes | np.ndarray, longest: int) -> np.ndarray:
    """Return the image as uint8 [H, W, 3] at its own size and aspect, for display.

    It is scaled down if one side has more than `longest` pixels. Raises ImageError if it does not
    decode, UserError if it holds features.
    """
    _check_shows(image)
    pixels = images.decode(image, longest) if isinstance(image, bytes) else np.asarray(image)
    scale = longest / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def _check_shows(image: bytes | np.ndarray) -> None:
    if is_features(image):
        raise UserError(
            "data: the dataset holds features of an encoder, so there are no images to show; "
            "name the dataset they were extracted from."
        )


def square(
    image: bytes | np.ndarray, size: int, crop: str, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Return an image as uint8 [size, size, 3], or features float [1 + N, D] unchanged.

    `crop` is "none" (squash), "center", or "random" or "window", which need `rng`. Raises
    ImageError if an encoded image does not decode.
    """
    if is_features(image):
        return image
    if crop in RANDOM_CROPS:
        assert rng is not None
        return RANDOM_CROPS[crop](image, size, rng)
    return images.center_crop(image, size) if crop == "center" else images.resize(image, size)


def prepared(
    image: bytes | np.ndarray,
    size: int,
    crop: str = "none",
    rng: np.random.Generator | None = None,
    *,
    patch: int = 0,
    mirror: bool = False,
) -> np.ndarray:
    """Return what a learner sees of an image: what `square` returns or, with `patch`, patches.

    Args:
        image: pixels [H, W, 3], an encoded file or features.
        size: side of the square, whose number of patches is also the budget of patches.
        crop: as for `square`; with `patch` "none".
        rng: as for `square`.
        patch: side of the patches in pixels; 0 is a square.
        mirror: whether to mirror the image.

    Raises:
        ImageError: An encoded image does not decode.
    """
    if patch and crop != "none":
        raise ValueError(f"crop {crop!r} makes squares, and images with a patch stay whole")
    if not patch or is_features(image):
        found = square(image, size, crop, rng)
        return images.flip(found) if mirror else found
    budget = (size // patch) ** 2

    def sides(height: int, width: int) -> tuple[int, int]:
        rows, columns = naflex.grid(height, width, budget)
        return rows * patch, columns * patch

    pixels = images.fit(image, sides)
    return naflex.packed(images.flip(pixels) if mirror else pixels, patch, budget)
