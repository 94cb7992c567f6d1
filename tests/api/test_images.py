"""What is taken as images, how it is named, and what is refused with which advice."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cap_pretrain import config as configs
from cap_pretrain import inputs
from cap_pretrain.api import batches
from cap_pretrain.api.images import listed
from cap_pretrain.convert import crops_center
from cap_pretrain.data import views
from cap_pretrain.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture(scope="module")
def view():
    c = configs.default()
    c.data.image_size, c.data.crop = 8, "random"  # so evaluation takes the central square
    return inputs.view(c)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    for name in ("b.png", "a.png", "inner/c.PNG", ".hidden.png"):
        Image.fromarray(RGB).save(tmp_path / "photos" / name, format="PNG")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_all_forms_of_one_image_are_the_same_square(view, folder):
    image = Image.fromarray(RGB)
    turned = Image.Exif()
    turned[0x0112] = 3
    upside_down = encoded(Image.fromarray(RGB[::-1, ::-1]), exif=turned)
    forms = [
        RGB,
        RGB[None],
        jnp.asarray(RGB),
        image,
        Image.open(io.BytesIO(upside_down)),
        encoded(image),
        str(folder / "a.png"),
        folder / "a.png",
        [[RGB], (folder / "a.png",)],
        folder,
    ]
    items = listed(listed(form) for form in forms)  # what is listed is taken again
    assert len(items) == len(forms) + 1 + 2  # the nested list holds two, the folder three
    expected = views.square(RGB, 8, "center")
    for item in items:
        np.testing.assert_array_equal(item.read(view), expected, err_msg=item.name)
    assert [item.name for item in items[-3:]] == [
        str(folder / name) for name in ("a.png", "b.png", "inner/c.PNG")
    ]


def test_gray_and_transparent_images_become_rgb(view):
    gray, clear = Image.fromarray(RGB).convert("L"), Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    (one,), (two,) = listed(gray), listed(clear)
    assert np.ptp(one.read(view), axis=-1).max() == 0
    assert (two.read(view) == 255).all()  # on white, as files are


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (RGB / 255.0, TypeError, r"numpy.ndarray of float64 \[20, 30, 3\]; give the pixels as uin"),
        ([RGB, RGB.astype(np.float32)], TypeError, r"images\[1\]: .* float32 .*\(255 \* x\)"),
        (RGB.astype(np.int64), TypeError, "int64 .*give the pixels as uint8 in 0 to 255"),
        (RGB.transpose(2, 0, 1), ValueError, r"\[3, 20, 30\]; the colors come last: transpose"),
        (RGB[..., 0], ValueError, r"\[20, 30\]; for gray pixels .* PIL.Image.fromarray"),
        (np.zeros((2, 5, 5, 4), np.uint8), ValueError, r"\[2, 5, 5, 4\]; for gray pixels or an al"),
        (np.zeros(12, np.uint8), ValueError, r"\[12\]; give \[H, W, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"\[0, 4, 3\]; give"),
        (7, TypeError, "images: found an int; uint8 arrays"),
        ({"image": RGB}, TypeError, "found a dict"),
        (["a.png", None], TypeError, r"images\[1\]: found a NoneType"),
        ("https://example.org/a.jpg", UserError, "https://example.org/a.jpg: is a URL"),
    ],
)
def test_anything_else_is_refused(given, kind, message):
    with pytest.raises(kind, match=message):
        listed(given)


def test_unreadable_files_raise_with_their_name_or_are_left_out(view, folder, tmp_path):
    broken, gone = tmp_path / "text.jpg", tmp_path / "gone.png"
    broken.write_text("To whom it may concern")
    given = listed([folder / "a.png", broken, folder / "b.png", gone])
    work = batches.Work(view, batches_mesh(), 2, lambda pixels, first: pixels[:, 0, 0] * 0 + first)
    with pytest.raises(UserError, match="text.jpg: not an image$"):
        list(batches.computed(given, work))
    unreadable = {}
    found = list(batches.computed(given, work, unreadable))
    assert unreadable == {str(broken): "not an image", str(gone): "No such file or directory"}
    assert [names for names, _ in found] == [[str(folder / "a.png")], [str(folder / "b.png")]]
    assert [rows[0, 0] for _, rows in found] == [0, 1]  # numbers count the readable images


def batches_mesh():
    import jax

    from cap_pretrain.checkpoints.load import make_mesh

    return make_mesh(jax.devices()[:1])


@pytest.mark.parametrize(
    ("file", "content", "crops"),
    [
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, True),
        ("preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"}, False),
        ("preprocessor_config.json", {"do_center_crop": True}, True),
        ("config.json", {"model_args": {}, "pretrained_cfg": {"crop_mode": "squash"}}, False),
        ("config.json", {"model_args": {}, "pretrained_cfg": {"crop_mode": "center"}}, True),
        ("open_clip_config.json", {"preprocess_cfg": {"resize_mode": "squash"}}, False),
        ("open_clip_config.json", {"model_cfg": {}}, True),
        ("weights.pth", {}, True),
    ],
)
def test_imported_encoders_crop_as_their_files_say(file, content, crops, tmp_path):
    if file == "preprocessor_config.json":
        (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(content))
    assert crops_center(tmp_path) is crops
