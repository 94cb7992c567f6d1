import contextlib
import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from cap_pretrain.data import images

HEIGHT, WIDTH = 48, 64


def picture() -> np.ndarray:
    """Return uint8 [48, 64, 3], smooth, with a different value in every corner and channel."""
    y, x = np.mgrid[0:1:48j, 0:1:64j]
    return (np.stack([x, y, (x + y) / 2], -1) * 200 + 20).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, file_format: str, **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def rotated_jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(), "JPEG", quality=95, exif=exif)


def png_16_bit(channels: int) -> bytes:
    pixels = picture()[..., :channels].astype(np.uint16) * 257
    return cv2.imencode(".png", pixels[..., ::-1] if channels > 1 else pixels)[1].tobytes()


GREY = picture()[..., 1]
FILES = {
    "jpeg": (encode(picture(), "JPEG", quality=95), picture()),
    "progressive": (encode(picture(), "JPEG", quality=95, progressive=True), picture()),
    "grey jpeg": (encode(GREY, "JPEG", quality=95), GREY),
    "cmyk jpeg": (encode(Image.fromarray(picture()).convert("CMYK"), "JPEG"), picture()),
    "png": (encode(picture(), "PNG"), picture()),
    "grey png": (encode(GREY, "PNG"), GREY),
    "webp": (encode(picture(), "WEBP", quality=95), picture()),
    "gif": (encode(Image.fromarray(GREY), "GIF"), GREY),
    "bmp": (encode(picture(), "BMP"), picture()),
    "16-bit grey": (png_16_bit(1), picture()[..., 0]),
    "16-bit rgb": (png_16_bit(3), picture()),
    "palette": (encode(Image.fromarray(picture()).quantize(256), "PNG"), picture()),
    "1-bit": (encode(Image.fromarray(GREY > 120), "PNG"), (GREY > 120) * np.uint8(255)),
}


@pytest.mark.parametrize("name", FILES)
def test_decode_gives_rgb_of_the_same_picture(name):
    data, expected = FILES[name]
    image = images.decode(data)
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert np.abs(image.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_turns_as_exif_asks_exactly_once(orientation):
    upright = picture()
    if orientation in (2, 4, 5, 7):  # mirrored, per Exif 2.32
        upright = upright[:, ::-1]
    upright = np.rot90(upright, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation])
    image = images.decode(rotated_jpeg(orientation))
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 3


@pytest.mark.filterwarnings("ignore:::PIL")
def test_corrupt_exif_is_ignored():
    data = rotated_jpeg(6)
    start = data.index(b"Exif\0\0") + 6
    end = start - 8 + int.from_bytes(data[start - 8 : start - 6])  # the length of the segment
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for position in rng.integers(start, end, size=3):
            damaged[position] = rng.integers(256)
        assert sorted(images.decode(bytes(damaged)).shape) == [3, HEIGHT, WIDTH]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_composited_on_white(mode):
    solid = Image.new("RGBA", (4, 4), (10, 10, 10, 255))
    solid.paste((10, 10, 10, 0), (0, 0, 2, 4))
    if mode == "RGB":  # one color is declared transparent
        image = Image.new("RGB", (4, 4), (10, 10, 10))
        image.paste((1, 2, 3), (0, 0, 2, 4))
        data = encode(image, "PNG", transparency=(1, 2, 3))
    elif mode == "P":
        image = Image.new("P", (4, 4), 1)
        image.putpalette([200, 0, 0, 10, 10, 10])
        image.paste(0, (0, 0, 2, 4))
        data = encode(image, "GIF", transparency=0)
    else:
        data = encode(solid.convert(mode), "PNG")
    decoded = images.decode(data)
    assert (decoded[:, :2] == 255).all() and (decoded[:, 2:] == 10).all()


def test_half_transparency_is_a_mixture():
    data = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")
    assert abs(int(images.decode(data)[0, 0, 0]) - 127) <= 1


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert images.decode(data)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_broken_never_half_a_picture(name):
    data = FILES[name][0]
    whole = images.decode(data)
    for length in np.linspace(0, len(data) - 1, 60).astype(int):
        try:
            image = images.decode(data[:length])
        except images.ImageError:
            continue
        # All pixels are present; only an end marker or a checksum was cut off.
        assert len(data) - length < 40 and (image == whole).all()


@pytest.mark.parametrize("min_size", [0, 12])
@pytest.mark.parametrize("name", ["jpeg", "progressive", "grey jpeg"])
def test_a_cut_jpeg_is_broken_at_any_scale(name, min_size):
    data = FILES[name][0]
    with pytest.raises(images.ImageError, match="truncated"):
        images.decode(data[:-80], min_size=min_size)


def test_a_jpeg_without_the_data_of_its_lower_half_is_broken():
    """For a truncated file with an end marker, libjpeg would fill the rest with gray."""
    data = FILES["jpeg"][0]
    with pytest.raises(images.ImageError, match="broken"):
        images.decode(data[: (data.index(b"\xff\xda") + len(data)) // 2] + b"\xff\xd9")


@pytest.mark.parametrize("name", FILES)
def test_damage_gives_an_image_or_an_image_error(name):
    rng = np.random.default_rng(0)
    for _ in range(30):
        data = bytearray(FILES[name][0])
        for position in rng.integers(len(data), size=3):
            data[position] = rng.integers(256)
        with contextlib.suppress(images.ImageError):
            assert images.decode(bytes(data)).shape[-1] == 3


def test_a_broken_image_that_was_turned_is_called_by_its_format():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("F", (8, 8)), "TIFF", exif=exif)
    with pytest.raises(images.ImageError, match="broken or truncated TIFF: floating"):
        images.decode(data)


@pytest.mark.parametrize("data", [b"", b"a text named .jpg\n" * 50, b"\xff\xd8\xff", bytes(1000)])
def test_data_that_is_not_an_image_raises(data):
    with pytest.raises(images.ImageError):
        images.decode(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 60_000])  # just above the limit, and far above
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_bombs_are_refused_by_their_header(file_format, side):
    data = bytearray(encode(Image.new("L", (8, 8)), file_format))
    if file_format == "PNG":
        data[16:24] = side.to_bytes(4) * 2
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4)
    else:
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = side.to_bytes(2) * 2
    with pytest.raises(images.ImageError, match="refused"):
        images.decode(bytes(data))


@pytest.mark.parametrize(
    ("min_size", "expected"), [(0, 48), (48, 48), (25, 48), (24, 24), (12, 12), (1, 6)]
)
def test_min_size_is_never_undercut(min_size, expected):
    image = images.decode(FILES["jpeg"][0], min_size=min_size)
    assert image.shape == (expected, expected * WIDTH // HEIGHT, 3)
    small = cv2.resize(picture(), image.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(image.astype(int) - small).mean() < 3


def test_to_plain_keeps_what_every_decoder_reads_alike():
    for name in ("jpeg", "progressive", "grey jpeg", "png", "grey png", "palette"):
        data = FILES[name][0]
        assert images.to_plain(data) is data


@pytest.mark.parametrize("name", ["cmyk jpeg", "webp", "gif", "bmp", "16-bit grey", "16-bit rgb"])
def test_to_plain_encodes_the_rest_again(name):
    data, _ = FILES[name]
    plain = images.to_plain(data)
    with Image.open(io.BytesIO(plain)) as image:
        assert image.mode == "RGB" and image.format in ("JPEG", "PNG")
        lossless = image.format == "PNG"
    difference = np.abs(images.decode(plain).astype(int) - images.decode(data))
    assert difference.max() == 0 if lossless else difference.mean() < 3
    assert lossless == (name not in ("cmyk jpeg", "webp"))


def test_to_plain_refuses_broken_files():
    with pytest.raises(images.ImageError):
        images.to_plain(FILES["jpeg"][0][:-100])


@pytest.mark.parametrize("shape", [(48, 64), (300, 20), (20, 300), (7, 7), (32, 32)])
def test_resize_squashes_to_a_square(shape):
    y, x = np.mgrid[0 : 1 : shape[0] * 1j, 0 : 1 : shape[1] * 1j]
    image = (np.stack([x, y, x], -1) * 255).astype(np.uint8)
    result = images.resize(image, 32)
    assert result.shape == (32, 32, 3)
    y, x = np.mgrid[0:1:32j, 0:1:32j]
    assert np.abs(result - np.stack([x, y, x], -1) * 255).mean() < 12


@pytest.mark.parametrize("shape", [(256, 256), (16, 256), (256, 16)])
def test_resize_is_antialiased_where_it_shrinks(shape):
    rows, columns = np.indices(shape)
    stripes = (rows if shape[0] > shape[1] else columns) % 2 * 255
    image = np.repeat(stripes[..., None], 3, -1).astype(np.uint8)
    assert np.abs(images.resize(image, 32).astype(int) - 127.5).max() < 2


def test_center_crop_takes_the_central_square():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 255
    assert (images.center_crop(image, 16) == 255).all()
    assert (images.center_crop(image.swapaxes(0, 1), 16) == 255).all()


SQUARES = {
    "whole": images.resize,
    "center": images.center_crop,
    "random": lambda image, size: images.random_resized_crop(image, size, crop_rng()),
    "window": lambda image, size: images.random_window(image, size, crop_rng()),
}


def crop_rng() -> np.random.Generator:
    """Return a generator with which the crop of `photograph` can be decoded at half its size."""
    return np.random.default_rng(5)


def photograph(height: int, width: int) -> np.ndarray:
    """Return uint8 [height, width, 3] with coarse and fine shapes."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3), np.float32)
    for cells, contrast in ((4, 50), (30, 15), (height, 2)):
        noise = rng.normal(scale=contrast, size=(cells, cells * width // height, 3))
        image += cv2.resize(noise.astype(np.float32), (width, height))
    return np.clip(image + 128, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", SQUARES)
@pytest.mark.parametrize("kind", FILES)
def test_a_file_gives_the_square_that_its_pixels_give(name, kind):
    data = FILES[kind][0]
    np.testing.assert_array_equal(
        SQUARES[name](data, 40),
        SQUARES[name](images.decode(data), 40),  # too large for decoding at reduced size
    )


@pytest.mark.parametrize("name", SQUARES)
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_a_file_decoded_at_half_its_size_gives_nearly_that_square(name, orientation, monkeypatch):
    """The mean difference is below 3 gray levels, where the image varies by 50."""
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    data = encode(photograph(375, 501), "JPEG", quality=95, exif=exif)
    exact = SQUARES[name](images.decode(data), 80)
    scales = []
    decode = images._decode_jpeg
    monkeypatch.setattr(
        images, "_decode_jpeg", lambda *args: scales.append(args[-1]) or decode(*args)
    )
    square = SQUARES[name](data, 80)
    assert scales in ([2], [4]) and square.shape == (80, 80, 3)
    difference = np.abs(square.astype(int) - exact)
    assert difference.mean() < 3 and difference.max() < 30
    assert exact.std() > 20


def test_a_crop_smaller_than_its_square_is_decoded_in_full(monkeypatch):
    data = encode(photograph(375, 501), "JPEG", quality=95)
    whole = images.decode(data)
    for seed in range(30):
        small, large = (
            images.random_resized_crop(image, 150, np.random.default_rng(seed), area=(0.08, 0.3))
            for image in (data, whole)
        )
        np.testing.assert_array_equal(small, large)  # 300 x 300 is half of the image


@pytest.mark.parametrize("shape", [(30, 64), (64, 30), (64, 64)])
def test_resize_is_close_to_exact_antialiasing(shape):
    """Compare with Pillow's bilinear filter, also where one side shrinks and the other grows."""
    image = photograph(*shape)
    exact = Image.fromarray(image).resize((40, 40), Image.Resampling.BILINEAR)
    assert np.abs(images.resize(image, 40).astype(int) - exact).mean() < 3


@pytest.mark.parametrize("side", [44, 60, 88, 100, 160])
def test_even_noise_is_resized_as_by_an_antialiasing_filter(side):
    """Smoothing is used for factors up to 2.2, averaging on a finer grid above."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    exact = np.asarray(Image.fromarray(noise).resize((40, 40), Image.Resampling.BILINEAR), int)
    ours, aliased = (
        np.abs(result.astype(int) - exact).mean()
        for result in (images.resize(noise, 40), cv2.resize(noise, (40, 40)))
    )
    assert ours < 11 and ours < 0.75 * aliased


@pytest.mark.parametrize("shape", [(45, 45), (89, 50), (30, 80), (300, 200)])
def test_one_colour_stays_as_it_is(shape):
    image = np.full((*shape, 3), (3, 130, 255), np.uint8)
    assert (images.resize(image, 40) == (3, 130, 255)).all()


@pytest.mark.parametrize("name", SQUARES)
def test_resizing_a_broken_file_raises(name):
    with pytest.raises(images.ImageError):
        SQUARES[name](FILES["jpeg"][0][:-80], 12)
    with pytest.raises(images.ImageError):
        SQUARES[name](b"no image", 12)


def test_flip_mirrors_left_to_right():
    assert (images.flip(picture()) == picture()[:, ::-1]).all()


def test_random_resized_crop_depends_on_the_generator_alone():
    crops = [
        images.random_resized_crop(picture(), 16, np.random.default_rng(seed)) for seed in (1, 1, 2)
    ]
    assert (crops[0] == crops[1]).all() and (crops[0] != crops[2]).any()


def test_random_resized_crop_keeps_the_requested_area_and_ratio():
    y, x = np.mgrid[0:100, 0:200].astype(np.float32)
    image = np.stack([x, y, y], -1)  # pixel values are coordinates
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(300):
        crop = images.random_resized_crop(image, 50, rng, area=(0.1, 0.5), ratio=(0.5, 2))
        width, height = (np.ptp(crop[..., c]) * 50 / 49 for c in (0, 1))
        areas.append(width * height / 20_000)
        ratios.append(width / height)
    assert 0.08 < min(areas) < 0.15 and 0.42 < max(areas) < 0.53
    assert 0.45 < min(ratios) < 0.65 and 1.6 < max(ratios) < 2.1


def test_random_windows_are_squares_of_seven_eighths_of_the_shorter_side_anywhere():
    y, x = np.mgrid[0:96, 0:200].astype(np.float32)
    image = np.stack([x, y, y], -1)
    rng = np.random.default_rng(0)
    windows = np.array([images.random_window(image, 84, rng) for _ in range(300)])
    for channel, whole in ((0, 200), (1, 96)):
        first, last = windows[:, 0, 0, channel], windows[:, -1, -1, channel]
        np.testing.assert_array_equal(last - first, 83)  # 84 of 96
        assert first.min() == 0 and last.max() == whole - 1
    thread = np.full((1, 9, 3), 7, np.uint8)
    assert (images.random_window(thread, 4, rng) == 7).all()


def test_random_resized_crop_of_an_extreme_panorama_is_its_center():
    image = np.zeros((4, 900, 3), np.uint8)
    image[:, 448:452] = 255
    rng = np.random.default_rng(0)
    assert (images.random_resized_crop(image, 8, rng, area=(0.9, 1)) == 255).all()
