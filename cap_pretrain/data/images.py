"""Decode images to RGB uint8 [H, W, 3], and resize and crop them on the host.

Nearly every file of a captioning dataset is a plain JPEG. These are decoded with simplejpeg
(libjpeg-turbo), the fastest decoder and the only one that reports files that lack the data of some
pixels. Everything else (PNG, WebP, GIF, CMYK, alpha, palettes, 16 bits) is decoded with Pillow.
tools/bench_decode.py measures the choice.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from cap_pretrain.data import image_files
from cap_pretrain.data.image_files import ImageError, UnsupportedError
from cap_pretrain.data.resampling import resized

# Each worker decodes one image at a time, so OpenCV's own threads would compete with workers.
cv2.setNumThreads(0)

# Pillow warns of corrupt EXIF, which is frequent in photographs from the web, and of its size
# limit, for which this module raises ImageError.
warnings.filterwarnings("ignore", module=r"PIL\.")

# The formats to be read by Pillow. Not EPS and the like, for which Pillow starts other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_EXIF_ORIENTATION = 0x0112  # Exif 2.32, table 4
_UPRIGHT = {  # EXIF orientation -> function that makes [H, W, 3] upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
_COLOR_SPACES = ("YCbCr", "RGB", "Gray")  # simplejpeg's names of those of plain JPEGs
_EXIF = b"Exif\0\0"  # start of the segment that may hold a JPEG's orientation (Exif 2.32, 4.7.2)
_JPEG = ("JPEG", "MPO")  # MPO: written by some cameras, a JPEG followed by further JPEGs
_LOSSLESS = ("PNG", "GIF", "BMP", "TIFF", "PPM")

_Box = tuple[int, int, int, int]  # top, left, height, width of a part of an image, in pixels
_Sides = Callable[[int, int], tuple[int, int]]  # maps height and width to those of the result
_Turn = Callable[[np.ndarray], np.ndarray]


_STRIP = 2**20  # pixels that are converted at a time, to save memory


def decode(data: bytes, min_size: int = 0) -> np.ndarray:
    """Decode an image file of any common format to RGB uint8 [H, W, 3], upright.

    If `min_size` is positive, a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is
    much faster, as long as both sides keep at least that many pixels. Transparency is composited on
    white; of an animation, the first frame is returned. Raises ImageError if the file is not an
    image, is corrupt or truncated, or exceeds the limits of `image_files`.
    """
    return image_files.mending(lambda own: _decode(own, min_size), data)


def size(data: bytes) -> tuple[int, int]:
    """Return (width, height) as stored, before EXIF turns it; raises ImageError."""
    return image_files.mending(lambda own: _open(own).size, data)


def to_plain(data: bytes) -> bytes:
    """Return the image in a form that all decoders, including that of TFDS, read alike.

    RGB or gray JPEGs (even with an EXIF orientation) and 8-bit PNGs without transparency are
    returned as the same object. Anything else is encoded again: as PNG if the file was lossless,
    otherwise as JPEG of quality 95. The whole image is decoded to check it, which raises ImageError
    as `decode` does.
    """
    return image_files.mending(_to_plain, data)


def _to_plain(data: bytes) -> bytes:
    with _open(data) as image, _memory(data, image):
        pixels = _pixels(data, image)  # closes the image
        with _open(data) as header:
            if _is_plain_jpeg(header) or _is_plain_png(header, data):
                return data
            lossless = header.format in _LOSSLESS
        plain = Image.fromarray(pixels)
        del pixels
        encoded = io.BytesIO()
        if lossless:
            plain.save(encoded, "PNG")
        else:
            plain.save(encoded, "JPEG", quality=95)
        return encoded.getvalue()


def resize(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """Resize the whole image to [size, size, 3], ignoring its aspect ratio, with antialiasing.

    Like all functions here that resize, it takes pixels [H, W, 3] or an encoded file. A file is
    decoded at no higher resolution than needed, and raises ImageError as `decode` does.
    """
    return _resize_part(image, _square(size), _whole)


def fit(image: bytes | np.ndarray, sides: _Sides) -> np.ndarray:
    """Resize the whole upright image to the height and width that `sides(height, width)` gives."""
    return _resize_part(image, sides, _whole)


def center_crop(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """Resize the largest central square to [size, size, 3]."""
    return _resize_part(image, _square(size), _central)


def random_resized_crop(
    image: bytes | np.ndarray,
    size: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Resize a random part of the image to [size, size, 3]; equal generators give equal crops.

    The part keeps a fraction of the area in the range `area`, with a width / height in the range
    `ratio`, drawn log-uniformly. That is from Szegedy et al., "Going deeper with convolutions"
    (arXiv 1409.4842), section 6; the default range of areas is the one in common use.
    """
    narrowest, widest = map(math.log, ratio)

    def draw(height: int, width: int) -> _Box:
        for _ in range(10):
            kept = height * width * rng.uniform(*area)
            aspect = math.exp(rng.uniform(narrowest, widest))
            crop_width, crop_height = (
                round(math.sqrt(kept * aspect)),
                round(math.sqrt(kept / aspect)),
            )
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(rng.integers(height - crop_height + 1))
                left = int(rng.integers(width - crop_width + 1))
                return top, left, crop_height, crop_width
        return _central(height, width)  # no such part fits into an extreme panorama

    return _resize_part(image, _square(size), draw)


def random_window(
    image: bytes | np.ndarray, size: int, rng: np.random.Generator, share: float = 224 / 256
) -> np.ndarray:
    """Resize a square at a random position to [size, size, 3]; equal generators give equal windows.

    Its side is `share` of the image's shorter side; the default, 224 of 256, is that of AlexNet
    (Krizhevsky et al. 2012, section 4.1).
    """

    def draw(height: int, width: int) -> _Box:
        side = max(1, round(share * min(height, width)))
        top, left = (int(rng.integers(whole - side + 1)) for whole in (height, width))
        return top, left, side, side

    return _resize_part(image, _square(size), draw)


def flip(image: np.ndarray) -> np.ndarray:
    """Mirror [H, W, 3] left to right."""
    return cv2.flip(image, 1)  # NumPy copies pixel by pixel, 40 times slower


def _open(data: bytes) -> Image.Image:
    """Read the header and reject files that are not images, or too large ones, before decoding."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"refused: {error}") from error
    except Exception as error:  # Pillow's plug-ins raise nearly anything on garbage
        if image_files.unsupported(data):
            raise UnsupportedError("HEIC, JPEG XL or the like; convert it to JPEG") from error
        raise ImageError("not an image" if data else "empty file") from error
    width, height = image.size
    limit = image_files.max_pixels(image.format)
    if width * height > limit:
        raise ImageError(f"refused: {width} x {height} pixels, the limit is {limit} in all")
    if image.format in _JPEG and image_files.has_too_many_scans(data):
        raise ImageError(f"refused: more than {image_files.MAX_SCANS} scans")
    return image


def _memory(data: bytes, image: Image.Image, scale: int = 1) -> contextlib.AbstractContextManager:
    """Wait for the memory that decoding an open file takes, at 1 / scale of its size."""
    kind = None if _is_plain_jpeg(image) else image.format
    return image_files.memory(data, image.width * image.height, kind, scale)


def _square(size: int) -> _Sides:
    return lambda *_: (size, size)


def _whole(height: int, width: int) -> _Box:
    return 0, 0, height, width


def _resize_part(
    image: bytes | np.ndarray, sides: _Sides, choose: Callable[[int, int], _Box]
) -> np.ndarray:
    """Resize the part `choose(height, width)` of the upright image to `sides` of that part.

    If a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the edges of the part are rounded to its
    pixels, so no edge moves by more than half a pixel of the result.
    """
    if isinstance(image, bytes):
        return image_files.mending(lambda data: _resize_file(data, sides, choose), image)
    box = choose(*image.shape[:2])
    return resized(_part(image, box), *sides(*box[2:]))


def _resize_file(data: bytes, sides: _Sides, choose: Callable[[int, int], _Box]) -> np.ndarray:
    if whole := _size_of_common_jpeg(data):
        box = choose(whole[1], whole[0])
        new = sides(*box[2:])
        scale = min(map(_scale, box[2:], new))
        with image_files.memory(data, whole[0] * whole[1], scale=scale):
            return resized(_part(_decode_jpeg(data, whole, scale), box, scale), *new)
    with _open(data) as file:
        if not _is_plain_jpeg(file):
            with _memory(data, file):
                return _resize_part(_decode_with_pillow(file), sides, choose)
        turn = _turn_of_jpeg(file)
        box = _chosen(choose, file.size, turn)
        upright_sides = turn(np.broadcast_to(np.uint8(0), box[2:])).shape
        new = sides(*upright_sides)
        scale = min(map(_scale, upright_sides, new))
        with _memory(data, file, scale):
            part = _part(_decode_jpeg(data, file.size, scale), box, scale)
            return resized(turn(part), *new)


def _size_of_common_jpeg(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a common JPEG, else None, ten times faster than Pillow opens it."""
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    plain = color_space in _COLOR_SPACES and _EXIF not in data  # not CMYK, and upright
    allowed = width * height <= image_files.MAX_PIXELS and not image_files.has_too_many_scans(data)
    return (width, height) if plain and allowed else None


def _part(image: np.ndarray, box: _Box, scale: int = 1) -> np.ndarray:
    """Return a view of `box`, chosen at full size, in an image of 1 / scale of that size."""
    top, left, height, width = box
    rows, columns = (
        slice(round(begin / scale), round((begin + length) / scale))
        for begin, length in ((top, height), (left, width))
    )
    return image[rows, columns]


def _chosen(choose: Callable[[int, int], _Box], size: tuple[int, int], turn: _Turn) -> _Box:
    """Choose a box of the image that `turn` makes upright; return it in stored coordinates."""
    width, height = size
    # The stored row and column of each upright pixel. These are views, so large files cost no more.
    rows, columns = (
        turn(np.broadcast_to(line, (height, width)))
        for line in (np.arange(height)[:, None], np.arange(width))
    )
    box = choose(*rows.shape)
    begin, end = box[:2], (box[0] + box[2] - 1, box[1] + box[3] - 1)  # opposite corners
    (top, bottom), (left, right) = (
        sorted((int(where[begin]), int(where[end]))) for where in (rows, columns)
    )
    return top, left, bottom + 1 - top, right + 1 - left


def _central(height: int, width: int) -> _Box:
    """Return the largest central square."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in _JPEG and image.mode in ("RGB", "L")


def _is_plain_png(image: Image.Image, data: bytes) -> bool:
    if image.format != "PNG" or image.has_transparency_data:
        return False
    bit_depth = data[24]  # in IHDR, always the first chunk
    return bit_depth <= 8 and image.mode in ("RGB", "L", "P")


def upright(image: Image.Image) -> _Turn:
    """Return the function that makes the pixels upright, as EXIF says unless it is damaged."""
    try:
        return _UPRIGHT.get(image.getexif()[_EXIF_ORIENTATION], _as_stored)
    except Exception:  # Pillow raises nearly anything on damaged EXIF, which is frequent
        return _as_stored


def _turn_of_jpeg(image: Image.Image) -> _Turn:
    return upright(image) if "exif" in image.info else _as_stored


def _as_stored(pixels: np.ndarray) -> np.ndarray:
    return pixels


def _scale(side: int, min_size: int) -> int:
    """Return the largest of 1, 2, 4, 8 by which `side` can shrink to at least `min_size`."""
    if min_size <= 0:
        return 1
    return next((scale for scale in (8, 4, 2) if side >= scale * min_size), 1)


def _decode(data: bytes, min_size: int) -> np.ndarray:
    with _open(data) as image:
        scale = _scale(min(image.size), min_size) if _is_plain_jpeg(image) else 1
        with _memory(data, image, scale):
            return np.ascontiguousarray(_pixels(data, image, scale))


def _pixels(data: bytes, image: Image.Image, scale: int = 1) -> np.ndarray:
    """Return the upright pixels of an open file; a plain JPEG at 1 / scale of its size."""
    if not _is_plain_jpeg(image):
        return _decode_with_pillow(image)
    return _turn_of_jpeg(image)(_decode_jpeg(data, image.size, scale))


def _decode_jpeg(data: bytes, size: tuple[int, int], scale: int) -> np.ndarray:
    width, height = (-(-side // scale) for side in size)
    try:
        # strict: otherwise libjpeg fills missing data with gray and only warns.
        return simplejpeg.decode_jpeg(data, min_width=width, min_height=height, strict=True)
    except ValueError as error:
        raise ImageError(f"broken or truncated JPEG: {error}") from error


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    """Return the upright pixels of an open file, which is closed, in strips to save memory."""
    try:
        image.load()
        turn, (width, height) = upright(image), image.size
        rows = max(1, _STRIP // width)
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            strip = (
                image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
            )
            pixels[top : top + rows] = rgb(strip)
        image.close()
        return turn(pixels)
    except Exception as error:  # again, Pillow raises nearly anything on corrupt files
        raise ImageError(f"broken or truncated {image.format}: {error}") from error


def rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image as uint8 [H, W, 3]; transparency is composited on white."""
    if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip at 255
        return _gray_to_rgb(np.asarray(image))
    if image.mode == "F":
        raise ValueError("floating point pixels have no defined range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _gray_to_rgb(gray: np.ndarray) -> np.ndarray:
    """Convert [H, W] of 16-bit values to uint8 [H, W, 3]."""
    high_byte = (np.clip(gray, 0, 65535) >> 8).astype(np.uint8)
    return np.repeat(high_byte[..., None], 3, axis=-1)
