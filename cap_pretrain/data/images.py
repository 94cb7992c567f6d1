"""Encoded images in, RGB uint8 [H, W, 3] out, and the geometry done on the host.

Nearly every file of a captioning dataset is a plain JPEG; it goes through OpenCV (libjpeg-turbo;
measured by tools/bench_decode.py). Everything else (PNG, WebP, GIF, CMYK, alpha, palettes,
16 bits, EXIF rotation) goes through Pillow, which is slower and right.
"""

import io

import cv2
import numpy as np
from PIL import Image, ImageOps

# One image is one task of one worker: OpenCV's own thread pool would only fight with the others.
cv2.setNumThreads(0)

MAX_PIXELS = Image.MAX_IMAGE_PIXELS
"""Larger images are refused before anything is decoded: Pillow's limit, 2**30 // 4 // 3 pixels."""

_EXIF_ORIENTATION = 0x0112  # Exif 2.32, table 4
_CV_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_JPEG = ("JPEG", "MPO")  # MPO: what some cameras write, a JPEG with further JPEGs behind it
_LOSSLESS = ("PNG", "GIF", "BMP", "TIFF")


class ImageError(ValueError):
    """The bytes are not an image, a broken one, or one that is refused for its size."""


def decode(data: bytes, min_size: int = 0) -> np.ndarray:
    """Decodes any common image file.

    Args:
        data: the bytes of the file.
        min_size: when positive, a large JPEG may come out at 1/2, 1/4 or 1/8 of its size as long as
            both sides keep at least this many pixels: much faster when it is shrunk anyway.

    Returns:
        uint8 [H, W, 3], RGB, upright; transparency is composited on white, an animation gives its
        first frame.

    Raises:
        ImageError: not an image, broken, truncated, or more than MAX_PIXELS pixels.
    """
    with _open(data) as image:
        if _is_plain_jpeg(image) and not _is_rotated(image):
            return _decode_jpeg(data, _scale(image.size, min_size))
        return _decode_carefully(image)


def to_plain(data: bytes) -> bytes:
    """Returns the picture in a form that every decoder, TFDS's included, reads alike.

    An 8-bit RGB or grey JPEG, or a PNG without transparency, is returned as it is (the same
    object). Anything else is encoded again: as PNG where nothing was lost so far, else as JPEG.

    Raises:
        ImageError: as `decode`; the whole image is decoded to find out.
    """
    pixels = decode(data)
    with _open(data) as image:
        if _is_plain_jpeg(image) or _is_plain_png(image, data):
            return data
        lossless = image.format in _LOSSLESS
    encoded = io.BytesIO()
    if lossless:
        Image.fromarray(pixels).save(encoded, "PNG")
    else:
        Image.fromarray(pixels).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] -> [size, size, 3], ignoring the aspect ratio; antialiased when it shrinks."""
    return _resize(image, size, size)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] -> [size, size, 3]: the largest central square, resized."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size)


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """[H, W, 3] -> [size, size, 3]: a random part of the image, resized.

    Args:
        image: uint8 [H, W, 3].
        size: side of the result, pixels.
        rng: where the randomness comes from; equal generators give equal crops.
        area: range of the share of the image that is kept. Defaults: Szegedy et al., "Going deeper
            with convolutions" (arXiv 1409.4842), section 6, with the range everybody uses.
        ratio: range of width / height of the part, drawn uniformly in its logarithm.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        kept = height * width * rng.uniform(*area)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        crop_width, crop_height = round(np.sqrt(kept * aspect)), round(np.sqrt(kept / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = rng.integers(height - crop_height + 1)
            left = rng.integers(width - crop_width + 1)
            return resize(image[top : top + crop_height, left : left + crop_width], size)
    return center_crop(image, size)  # an extreme panorama, in which no such part fits


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrors [H, W, 3] left to right."""
    return np.ascontiguousarray(image[:, ::-1])


def _open(data: bytes) -> Image.Image:
    """Reads the header, and refuses before anything is decoded what is no image or too large."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError(f"refused: {error}") from error
    except Exception as error:  # on garbage, Pillow's plug-ins raise nearly everything
        raise ImageError("not an image" if data else "empty file") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"refused: {width} x {height} pixels, the limit is {MAX_PIXELS} in all")
    return image


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in _JPEG and image.mode in ("RGB", "L")


def _is_plain_png(image: Image.Image, data: bytes) -> bool:
    if image.format != "PNG" or image.has_transparency_data:
        return False
    bit_depth = data[24]  # in IHDR, always the first chunk
    return bit_depth <= 8 and image.mode in ("RGB", "L", "P")


def _is_rotated(image: Image.Image) -> bool:
    return "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) != 1


def _scale(size: tuple[int, int], min_size: int) -> int:
    """The largest of 1, 2, 4, 8 by which both sides can be divided and keep `min_size` pixels."""
    if min_size <= 0:
        return 1
    return next((scale for scale in (8, 4, 2) if min(size) >= scale * min_size), 1)


def _decode_jpeg(data: bytes, scale: int) -> np.ndarray:
    flags = _CV_FLAGS[scale] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"broken JPEG: {error.err}") from error
    if image is None:  # also for a file that lacks its last byte
        raise ImageError("broken or truncated JPEG")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_carefully(image: Image.Image) -> np.ndarray:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
            return _grey_to_rgb(np.asarray(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.array(image.convert("RGB"))
    except Exception as error:  # truncated and damaged files: again, nearly everything
        raise ImageError(f"broken or truncated {image.format}: {error}") from error


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """[H, W] of 16-bit values -> uint8 [H, W, 3]."""
    high_byte = (np.clip(grey, 0, 65535) >> 8).astype(np.uint8)
    return np.repeat(high_byte[..., None], 3, axis=-1)


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    shrinks = width * height < image.shape[0] * image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=method)
