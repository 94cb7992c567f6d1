"""Images in their own aspect ratio become patches within a budget."""

import io

import numpy as np
import pytest
from PIL import Image

from cap_pretrain import naflex
from cap_pretrain.data import images
from cap_pretrain.data.pipeline import ImageOptions, eval_batches, train_dataset
from cap_pretrain.data.views import View, prepared
from tests.data.numbers import Numbers
from tests.parity import require

PATCH, BUDGET = 4, 36
SIDE = 24


def sizes(count, most=900, seed=0):
    return np.random.default_rng(seed).integers(1, most, (count, 2)).tolist()


@pytest.mark.parametrize("budget", [1, 36, 196, 1024])
def test_a_grid_is_the_largest_that_fits(budget):
    for height, width in sizes(300) + [[1, 5000], [5000, 1], [7, 7]]:
        rows, columns = naflex.grid(height, width, budget)
        assert 1 <= rows * columns <= budget and max(rows, columns) <= naflex.MOST
        # Both sides are the smallest whole numbers of patches at one scale …
        scale = max((rows - 1) / height, (columns - 1) / width)
        assert scale < min(rows / height, columns / width) + 1e-9
        # … and at the next larger scale with other numbers there are too many.
        larger = min(rows / height, columns / width) * (1 + 1e-9)
        above = [int(np.ceil(side * larger - 1e-12)) for side in (height, width)]
        assert above[0] * above[1] > budget or max(above) > naflex.MOST
    side = int(budget**0.5)
    assert naflex.grid(37, 37, budget) == (side, side)


@pytest.mark.parity
def test_a_grid_is_that_of_transformers():
    require("torch")
    module = require("transformers.models.siglip2.image_processing_pil_siglip2")
    for budget in (36, 256, 1024):
        for height, width in sizes(200, seed=1):
            theirs = module.get_image_size_for_max_num_patches(height, width, 16, budget)
            ours = naflex.grid(height, width, budget)
            assert max(ours) == naflex.MOST or tuple(16 * n for n in ours) == tuple(theirs)


@pytest.mark.parametrize("shape", [(17, 40), (60, 20), (24, 24), (3, 500)])
def test_a_packed_image_is_the_resized_one(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    packed = prepared(image, SIDE, patch=PATCH)
    rows, columns = naflex.grid(*shape, BUDGET)
    assert packed.shape == (BUDGET, naflex.width_of(PATCH)) and naflex.is_packed(packed)
    assert naflex.grid_of(packed) == (rows, columns)
    whole = images.fit(image, lambda *_: (rows * PATCH, columns * PATCH))
    np.testing.assert_array_equal(naflex.unpacked(packed), whole)
    assert not packed[rows * columns :].any()
    mirrored = prepared(image, SIDE, patch=PATCH, mirror=True)
    np.testing.assert_array_equal(naflex.unpacked(mirrored), whole[:, ::-1])


def test_a_square_image_has_the_patches_of_the_square_layout():
    image = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    square = View(SIDE)(image)
    np.testing.assert_array_equal(naflex.unpacked(View(SIDE, patch=PATCH)(image)), square)


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_turned_file_is_upright(orientation):
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, :60] = 255
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    grid = naflex.grid_of(View(SIDE, patch=PATCH)(file.getvalue()))
    assert grid == naflex.grid(*((40, 120) if orientation == 1 else (120, 40)), BUDGET)
    seen = naflex.unpacked(View(SIDE, patch=PATCH)(file.getvalue()))
    across = seen.mean((0, 2)) if orientation == 1 else seen.mean((1, 2))
    first = across[: len(across) // 2].mean() > across[len(across) // 2 :].mean()
    assert first == (orientation != 8)


class Oblong(Numbers):
    """Images of different shapes."""

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        shape = [*rng.integers(10, 60, 2), 3]
        return super().__getitem__(index) | {"image": rng.integers(0, 256, shape, np.uint8)}


def test_batches_are_functions_of_their_number(tokenizer):
    def batch(number, rows=None):
        options = ImageOptions(SIDE, flip=True, patch=PATCH)
        dataset = train_dataset(
            [(Oblong(30), 1.0)], tokenizer, options, batch_size=8, seed=3, rows=rows
        )
        return dataset[number]["image"]

    whole = batch(5)
    assert whole.shape == (8, BUDGET, naflex.width_of(PATCH))
    np.testing.assert_array_equal(batch(5), whole)
    np.testing.assert_array_equal(batch(5, [2, 7]), whole[[2, 7]])
    assert len({naflex.grid_of(image) for image in whole}) > 2
    source = Oblong(30)
    last = eval_batches(source, tokenizer, view=View(SIDE, patch=PATCH), batch_size=8)[3]
    assert last["mask"].tolist() == [True] * 6 + [False] * 2
    np.testing.assert_array_equal(last["image"][5], View(SIDE, patch=PATCH)(source[29]["image"]))
