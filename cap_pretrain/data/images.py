"""Encoded images in, RGB uint8 [H, W, 3] out, and the geometry done on the host.

Nearly every file of a captioning dataset is a plain JPEG; it goes through simplejpeg, which is the
fastest (libjpeg-turbo) and the only one to tell when a file lacks the data of some of its pixels.
Everything else (PNG, WebP, GIF, CMYK, alpha, palettes, 16 bits) goes through Pillow.
tools/bench_decode.py measures the choice.
"""

import io
import math
import warnings
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

# One image is one task of one worker: OpenCV's own thread pool would only fight with the others.
cv2.setNumThreads(0)

MAX_PIXELS = Image.MAX_IMAGE_PIXELS
"""Larger images are refused before anything is decoded: Pillow's limit, 2**30 // 4 // 3 pixels."""

# Pillow remarks on damaged EXIF, which photographs from the web often have, and on its own limit,
# for which an ImageError follows here.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Of what Pillow reads. Not EPS and the like, for which it starts other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_EXIF_ORIENTATION = 0x0112  # Exif 2.32, table 4
_UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
"""What makes [H, W, 3] upright, by EXIF orientation."""
_COLOURS = ("YCbCr", "RGB", "Gray")  # as simplejpeg calls those of plain JPEGs
_EXIF = b"Exif\0\0"  # begins the segment that may say how to turn a JPEG (Exif 2.32, 4.7.2)
_JPEG = ("JPEG", "MPO")  # MPO: what some cameras write, a JPEG with further JPEGs behind it
_LOSSLESS = ("PNG", "GIF", "BMP", "TIFF", "PPM")

_SMOOTHED = 5**0.5
"""How many times a side may shrink for three weights to smooth it: then they are all alike."""

_Box = tuple[int, int, int, int]
"""Top, left, height, width of a part of an image, pixels."""


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
        return np.ascontiguousarray(_decode(data, image, _scale(min(image.size), min_size)))


def to_plain(data: bytes) -> bytes:
    """Returns the picture in a form that every decoder, TFDS's included, reads alike.

    An RGB or grey JPEG (even if EXIF wants it rotated) and an 8-bit PNG without transparency are
    returned as they are, the same object. Anything else is encoded again: as PNG where nothing was
    lost so far, else as JPEG of quality 95.

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


def resize(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """The whole image -> [size, size, 3], ignoring the aspect ratio; antialiased where it shrinks.

    As all functions that resize, it takes pixels [H, W, 3] or a file, of which it decodes no more
    than it needs (see `decode`), and then raises ImageError as `decode` does.
    """
    return _resize_part(image, size, lambda height, width: (0, 0, height, width))


def center_crop(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """An image -> [size, size, 3]: the largest central square, resized."""
    return _resize_part(image, size, _central)


def random_resized_crop(
    image: bytes | np.ndarray,
    size: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """An image -> [size, size, 3]: a random part of the image, resized.

    Args:
        image: uint8 [H, W, 3], or a file.
        size: side of the result, pixels.
        rng: where the randomness comes from; equal generators give equal crops.
        area: range of the share of the image that is kept. Defaults: Szegedy et al., "Going deeper
            with convolutions" (arXiv 1409.4842), section 6, with the range everybody uses.
        ratio: range of width / height of the part, drawn uniformly in its logarithm.
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
        return _central(height, width)  # an extreme panorama, in which no such part fits

    return _resize_part(image, size, draw)


def random_window(
    image: bytes | np.ndarray, size: int, rng: np.random.Generator, share: float = 224 / 256
) -> np.ndarray:
    """An image -> [size, size, 3]: a square at a random place, resized.

    Args:
        image: uint8 [H, W, 3], or a file.
        size: side of the result, pixels.
        rng: where the randomness comes from; equal generators give equal windows.
        share: of the shorter side. Default: 224 of 256, the augmentation of AlexNet (Krizhevsky et
            al. 2012, section 4.1).
    """

    def draw(height: int, width: int) -> _Box:
        side = max(1, round(share * min(height, width)))
        top, left = (int(rng.integers(whole - side + 1)) for whole in (height, width))
        return top, left, side, side

    return _resize_part(image, size, draw)


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrors [H, W, 3] left to right."""
    return cv2.flip(image, 1)  # NumPy would copy pixel by pixel, forty times slower


def _open(data: bytes) -> Image.Image:
    """Reads the header, and refuses before anything is decoded what is no image or too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"refused: {error}") from error
    except Exception as error:  # on garbage, Pillow's plug-ins raise nearly everything
        raise ImageError("not an image" if data else "empty file") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"refused: {width} x {height} pixels, the limit is {MAX_PIXELS} in all")
    return image


def _resize_part(
    image: bytes | np.ndarray, size: int, choose: Callable[[int, int], _Box]
) -> np.ndarray:
    """Returns [size, size, 3], the part that `choose(height, width)` names of the upright image.

    Of a JPEG that is decoded at 1/2, 1/4 or 1/8 of its size, the part begins and ends at the
    nearest pixel of that, so that no edge moves by more than half a pixel of the result.
    """
    if not isinstance(image, bytes):
        return _resize(_part(image, choose(*image.shape[:2])), size)
    if whole := _size_of_common(image):
        box = choose(whole[1], whole[0])
        scale = _scale(min(box[2:]), size)
        return _resize(_part(_decode_jpeg(image, whole, scale), box, scale), size)
    with _open(image) as file:
        if not _is_plain_jpeg(file):
            return _resize_part(_decode_carefully(file), size, choose)
        turn = _UPRIGHT.get(_orientation(file), lambda pixels: pixels)
        box = _chosen(choose, file.size, turn)
        scale = _scale(min(box[2:]), size)
        part = _part(_decode_jpeg(image, file.size, scale), box, scale)
        return _resize(turn(part), size)


def _size_of_common(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG as nearly all are, for which Pillow need not be asked: it opens a
    file ten times slower. None for any other, as a CMYK one, or one that may want to be turned.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    plain = colours in _COLOURS and _EXIF not in data
    return (width, height) if plain and width * height <= MAX_PIXELS else None


def _part(image: np.ndarray, box: _Box, scale: int = 1) -> np.ndarray:
    """A view of a box in an image of 1 / scale of the size that the box was chosen for."""
    top, left, height, width = box
    rows, columns = (
        slice(round(begin / scale), round((begin + length) / scale))
        for begin, length in ((top, height), (left, width))
    )
    return image[rows, columns]


def _chosen(choose: Callable[[int, int], _Box], size: tuple[int, int], turn: Callable) -> _Box:
    """The box of a file of `size` (width, height) that `turn` makes the one chosen."""
    width, height = size
    # Where in the file the upright pixels are. These are views: large files take no longer.
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
    """The largest central square."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] -> [size, size, 3], antialiased where it shrinks.

    What shrinks little is smoothed before it is sampled bilinearly. What shrinks more is sampled on
    a grid that is a whole number of times finer, and averaged. Both are as near to an antialiasing
    filter as averaging exact areas (INTER_AREA), which takes two to three times as long.
    """
    height, width = image.shape[:2]
    if height == width == size:
        return np.ascontiguousarray(image)
    if max(height, width) <= _SMOOTHED * size:
        if max(height, width) > size:
            kernels = _smoothing(width / size), _smoothing(height / size)
            image = cv2.sepFilter2D(image, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    columns, rows = _samples(width, size), _samples(height, size)
    finer = cv2.resize(image, (columns * size, rows * size), interpolation=cv2.INTER_LINEAR)
    # To halve one side only, OpenCV averages pairs faster if it is called bilinear.
    how = cv2.INTER_LINEAR if max(columns, rows) <= 2 else cv2.INTER_AREA
    return cv2.resize(finer, (size, size), interpolation=how)


def _smoothing(shrinks: float) -> np.ndarray:
    """Three weights that, with bilinear sampling, have the variance of the triangle filter that
    shrinks a side so many times, up to `_SMOOTHED`: (shrinks ** 2 - 1) / 6, in pixels of the image.

    They are whole numbers of 256ths, so that OpenCV computes with integers and equal pixels stay.
    """
    outer = round(256 * max(0.0, shrinks**2 - 1) / 12) / 256
    return np.array([outer, 1 - 2 * outer, outer], np.float32)


def _samples(side: int, size: int) -> int:
    """How many samples to average along one side for each pixel of the result."""
    return max(2, round(side / size)) if side > size else 1


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in _JPEG and image.mode in ("RGB", "L")


def _is_plain_png(image: Image.Image, data: bytes) -> bool:
    if image.format != "PNG" or image.has_transparency_data:
        return False
    bit_depth = data[24]  # in IHDR, always the first chunk
    return bit_depth <= 8 and image.mode in ("RGB", "L", "P")


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8."""
    return image.getexif().get(_EXIF_ORIENTATION, 1) if "exif" in image.info else 1


def _scale(side: int, min_size: int) -> int:
    """The largest of 1, 2, 4, 8 by which a side can be divided and keep `min_size` pixels."""
    if min_size <= 0:
        return 1
    return next((scale for scale in (8, 4, 2) if side >= scale * min_size), 1)


def _decode(data: bytes, image: Image.Image, scale: int) -> np.ndarray:
    """Returns the upright pixels of an open file, of a plain JPEG at 1 / scale of its size."""
    if not _is_plain_jpeg(image):
        return _decode_carefully(image)
    pixels = _decode_jpeg(data, image.size, scale)
    return _UPRIGHT.get(_orientation(image), lambda pixels: pixels)(pixels)


def _decode_jpeg(data: bytes, size: tuple[int, int], scale: int) -> np.ndarray:
    width, height = (-(-side // scale) for side in size)
    try:
        # strict: libjpeg otherwise fills what is missing with grey, and only warns.
        return simplejpeg.decode_jpeg(data, min_width=width, min_height=height, strict=True)
    except ValueError as error:
        raise ImageError(f"broken or truncated JPEG: {error}") from error


def _decode_carefully(image: Image.Image) -> np.ndarray:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
            return _grey_to_rgb(np.asarray(image))
        if image.mode == "F":
            raise ValueError("floating point pixels have no defined range")
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
