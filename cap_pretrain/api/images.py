"""Images as callers give them: arrays, images of Pillow, files and folders, one or many.

All become squares, uint8 [S, S, 3], or patches, as the evaluation of a run makes them. Arrays of
anything but uint8 are refused: floats may be in [0, 1], [-1, 1], [0, 255] or standardized, and a
wrong guess gives features that look fine and are wrong.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from cap_pretrain.cli.captioning import image_paths, read_image
from cap_pretrain.data import images
from cap_pretrain.data.views import View
from cap_pretrain.errors import UserError

Images: TypeAlias = Any
"""What the methods of a `Model` take as images.

A uint8 array [H, W, 3] or [N, H, W, 3]; an image of Pillow; an encoded image as bytes; the path of
an image file or of a folder of them; or a list of these.
"""

TAKEN = (
    "uint8 arrays [H, W, 3] or [N, H, W, 3], images of Pillow, paths of image files and folders, "
    "and lists of these"
)
FLOATS = (
    "give the pixels as uint8 in 0 to 255, before any scaling or normalization, which the model "
    "does itself; pixels x in [0, 1] become (255 * x).round().astype('uint8')"
)


class Item(NamedTuple):
    """One image: its name for messages, and a function that returns what is seen or why not."""

    name: str
    read: Callable[[View], np.ndarray | str]


def listed(given: Images) -> list[Item]:
    """Return the images in what the caller gave, in order; those in a folder by name.

    Files are not read yet. Raises TypeError or ValueError for anything that is not taken, and
    UserError for a folder without images or a URL.
    """
    return list(_items(given, "images"))


def _items(given: Any, name: str) -> Iterator[Item]:
    if isinstance(given, Item):
        yield given
    elif isinstance(given, str | os.PathLike):
        yield from _of_path(os.fspath(given))
    elif isinstance(given, bytes | bytearray | memoryview):
        yield Item(name, functools.partial(_of_file, bytes(given)))
    elif isinstance(given, Image.Image):
        yield Item(getattr(given, "filename", "") or name, functools.partial(_of_pillow, given))
    elif hasattr(given, "__array__"):
        array = _checked(given, name)
        many = array if array.ndim == 4 else array[None]
        for index, pixels in enumerate(many):
            own = f"{name}[{index}]" if array.ndim == 4 else name
            yield Item(own, functools.partial(_of_array, pixels))
    elif isinstance(given, Iterable) and not isinstance(given, dict | set):
        for index, one in enumerate(given):
            yield from _items(one, f"{name}[{index}]")
    else:
        raise TypeError(f"{name}: found {_kind(given)}; {TAKEN} are taken.")


def _of_path(text: str) -> Iterator[Item]:
    if "://" in text:
        raise UserError(f"{text}: is a URL; copy the images to a folder and give its path.")
    for file in image_paths([str(Path(text).expanduser())]):
        yield Item(file, functools.partial(read_image, file))


def _checked(given: Any, name: str) -> np.ndarray:
    """Return an array of pixels; raise TypeError or ValueError if it is none."""
    array = np.asarray(given)
    found = f"{name}: found {_kind(given)} of {array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        advice = FLOATS if array.dtype.kind == "f" else "give the pixels as uint8 in 0 to 255"
        raise TypeError(f"{found}; {advice}.")
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape[-3:]:
        advice = "give [H, W, 3] or [N, H, W, 3], colors last"
        if array.ndim in (3, 4) and array.shape[-3] == 3:
            advice = "the colors come last: transpose it to [H, W, 3] or [N, H, W, 3]"
        elif array.ndim == 2 or (array.ndim in (3, 4) and array.shape[-1] in (1, 2, 4)):
            advice = "for gray pixels or an alpha channel, give PIL.Image.fromarray(array)"
        raise ValueError(f"{found}; {advice}.")
    return array


def _kind(given: Any) -> str:
    kind = type(given)
    own = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{'an' if own[0] in 'aeiou' else 'a'} {own}"


def _of_array(pixels: np.ndarray, view: View) -> np.ndarray | str:
    return view(pixels)


def _of_pillow(image: Image.Image, view: View) -> np.ndarray | str:
    try:
        pixels = images.upright(image)(images.rgb(image))
    except Exception as error:  # Pillow raises nearly anything on corrupt files
        return f"cannot be converted to RGB: {error}"
    return _of_array(np.ascontiguousarray(pixels), view)


def _of_file(content: bytes, view: View) -> np.ndarray | str:
    try:
        return view(content)
    except images.ImageError as error:
        return str(error)
