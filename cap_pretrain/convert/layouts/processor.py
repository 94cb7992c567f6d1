"""The image processor that an export brings along, with the resizing of `data.images`.

No processor of transformers smooths as we do. Its custom code, which a user may allow, is made of
the source of our own functions, so that it cannot differ from them.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cap_pretrain.data import image_files, images, resampling

FILE = "image_processing_cap.py"
CLASS = "CapImageProcessor"

_HEAD = f'''"""Preprocessing of images as in cap_pretrain, exact to rounding; needs OpenCV."""

import cv2
import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin

_SMOOTHED = 5**0.5
_Box = tuple


class image_files:
    MAX_PIXELS = {image_files.MAX_PIXELS}
'''

_CLASS = '''class CapImageProcessor(ImageProcessingMixin):
    """Resizes images to squares and normalizes them; large JPEGs are decoded at 1/2 to 1/8."""

    model_input_names = ["pixel_values"]

    def __call__(self, images, return_tensors=None, **kwargs):
        images = images if isinstance(images, (list, tuple)) else [images]
        pixels = np.stack([self._pixels(image) for image in images])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    preprocess = __call__

    def _pixels(self, image):
        crop = getattr(self, "do_center_crop", False)
        side = (self.crop_size if crop else self.size)["height"]
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        box = _central(*image.size[::-1]) if crop else (0, 0, *image.size[::-1])
        scale = _scale(min(box[2:]), side)
        whole = image.size
        if scale > 1 and getattr(image, "format", None) in ("JPEG", "MPO"):
            image.draft(None, tuple(length // scale for length in whole))
        scale = round(max(whole) / max(image.size))  # 1 if the pixels were there already
        part = _part(rgb(image), box, scale)
        part = np.asarray(ImageOps.exif_transpose(_like(image, part)))
        pixels = resized(part, side, side).astype(np.float32) * np.float32(self.rescale_factor)
        pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return pixels.transpose(2, 0, 1)


def _like(image, pixels):
    """Return an image with these pixels that a camera turned like `image`."""
    made = Image.fromarray(pixels)
    made.getexif().update(image.getexif())
    return made
'''


def write(folder: Path) -> None:
    """Write the processor's code, and name it in the preprocessor_config.json of `folder`."""
    used: tuple[Callable[..., Any], ...] = (
        images._central,
        images._scale,
        images._part,
        resampling._samples,
        resampling._smoothing,
    )
    used += (images.rgb, images._gray_to_rgb)
    functions = [inspect.getsource(function) for function in (*used, resampling.resized)]
    code = "\n\n".join([_HEAD, *functions, _CLASS])
    (folder / FILE).write_text(code, encoding="utf-8")
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoImageProcessor": f"{FILE.removesuffix('.py')}.{CLASS}"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
