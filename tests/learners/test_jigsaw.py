"""Jigsaw: positions and augmentation of tiles, and whether the order can be learned."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.learners import permutations
from cap_pretrain.learners.jigsaw import Jigsaw, cut_tiles
from cap_pretrain.models.convnet import MEAN, STD
from tests import tiny
from tests.learners.pixels import Pixels, Seen, accuracy, learned

SIDE, CROP, CELL, TILE = 34, 30, 10, 6
SMALL = dict(crop=CROP, cell=CELL, tile=TILE, permutations=10, hidden=(24,), dropout=0.0)
PLAIN = dict(normalize=False, gray=0.0, colour=0.0, shift=0)
ORDER = np.array([3, 1, 4, 0, 5, 8, 2, 6, 7])


def jigsaw(encoder, **options):
    options = Jigsaw.Options(**SMALL | options)
    orders = permutations.greedy(options.permutations)
    return Jigsaw(encoder, options=options, orders=orders, rngs=nnx.Rngs(1))


@functools.cache
def cutting(train, **options):
    options = Jigsaw.Options(**SMALL | PLAIN | options)
    return jax.jit(functools.partial(cut_tiles, options=options, train=train))


def noise(count, seed, side=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def starts(key, **options):
    """Return the position of each channel of each training tile, [9, 3, 2], from pixel values."""
    places = np.indices((SIDE, SIDE))[..., None].repeat(3, axis=-1) / 100
    found = [cutting(True, **options)(key, p.astype(np.float32), ORDER) for p in places]
    tiles = np.round(100 * np.stack(found, axis=-1)).astype(int)
    inside = np.indices((TILE, TILE)).transpose(1, 2, 0)[None, :, :, None]
    begin = tiles - inside
    assert (begin == begin[:, :1, :1]).all()  # each tile is contiguous
    return begin[:, 0, 0]


def test_in_evaluation_crop_and_tiles_are_central():
    image = noise(1, 0)[0].astype(np.float32) / 255
    options = dict(gray=1.0, colour=0.5, shift=2)
    tiles = cutting(False, **options)(jax.random.key(0), image, ORDER)
    for tile, cell in zip(tiles, ORDER, strict=True):
        top, left = (2 + CELL * n + 2 for n in divmod(cell, 3))
        np.testing.assert_array_equal(tile, image[top : top + TILE, left : left + TILE])


def test_in_training_each_tile_lies_anywhere_in_its_cell():
    drawn = np.stack([starts(jax.random.key(n)) for n in range(40)])
    assert (drawn == drawn[:, :, :1]).all()  # all channels alike
    cells = CELL * np.stack(np.divmod(ORDER, 3), axis=1)
    inside = drawn[:, :, 0] - cells
    room, loose = SIDE - CROP, CELL - TILE
    assert inside.min() == 0 and inside.max() == room + loose
    # The tiles of an image share its crop, but each has its own position in its cell.
    assert np.ptp(inside, axis=1).max() == loose


def test_channels_are_shifted_by_themselves_and_stay_in_their_cells():
    cells = CELL * np.stack(np.divmod(ORDER, 3), axis=1)[:, None]
    drawn = np.stack([starts(jax.random.key(n), shift=1, crop=33, cell=11) for n in range(20)])
    inside = drawn - cells * 11 // 10
    assert inside.min() == 0 and inside.max() == 1 + 5
    assert set(np.ptp(drawn, axis=2).ravel()) == {0, 1, 2}


def test_tiles_are_normalised_each_by_itself():
    image = noise(1, 1)[0].astype(np.float32) / 255
    image[:CELL] *= 0.2
    image[:, -2 * CELL // 3 :] = 0.5
    tiles = cutting(False, normalize=True)(jax.random.key(0), image, np.arange(9))
    np.testing.assert_allclose(np.mean(tiles, axis=(1, 2)), [MEAN] * 9, atol=1e-5)
    varied = np.std(tiles, axis=(1, 2))[np.array([0, 1, 3, 4])]
    np.testing.assert_allclose(varied, [STD] * 4, rtol=1e-4)


def test_gray_images_have_no_colour_in_training():
    image = noise(1, 2)[0].astype(np.float32) / 255
    tiles = cutting(True, gray=1.0)(jax.random.key(0), image, ORDER)
    np.testing.assert_allclose(tiles, tiles[..., :1].repeat(3, axis=-1), atol=1e-6)


def test_colour_jitter_moves_no_pixel():
    image = np.full((SIDE, SIDE, 3), (0.2, 0.5, 0.6), np.float32)
    tiles = np.asarray(cutting(True, colour=0.5)(jax.random.key(0), image, ORDER))
    np.testing.assert_allclose(tiles, np.broadcast_to(tiles[0, 0, 0], tiles.shape), atol=1e-6)
    assert abs(tiles[0, 0, 0] - image[0, 0]).max() > 0.01


def test_one_tower_sees_all_tiles_and_what_it_says_of_nine_is_one_vector():
    images = noise(2, 3)
    learner = jigsaw(Seen(TILE), **PLAIN, hidden=())
    got = np.asarray(jax.jit(learner.features)(images)).reshape(2, 9, TILE, TILE, 3)
    for image, tiles in zip(images, got, strict=True):
        expected = cutting(False)(jax.random.key(0), image.astype(np.float32) / 255, np.arange(9))
        np.testing.assert_allclose(tiles, 2 * expected - 1, atol=1e-6)


def test_features_are_what_the_last_layer_reads():
    learner = jigsaw(Pixels(TILE), hidden=(24, 20), tower=5)
    assert jax.eval_shape(learner.features, noise(3, 4)).shape == (3, 20)
    assert learner.tower.kernel.shape == (32, 5) and learner.hidden_1.kernel.shape == (45, 24)


def test_masked_examples_do_not_count():
    graphdef, state = nnx.split(jigsaw(Pixels(TILE)))
    images = noise(4, 5)

    @jax.jit
    def loss(mask):
        batch = {"image": images, "mask": mask}
        return nnx.merge(graphdef, state).loss(batch, jax.random.key(0), False)

    alone = [loss(np.arange(4) == n) for n in range(4)]
    value, metrics = loss(np.arange(4) < 3)
    np.testing.assert_allclose(value, np.mean([a[0] for a in alone[:3]]), rtol=1e-5)
    assert metrics["loss_weight"] == 3 and np.isclose(metrics["chance"], 0.1)


def shaded(count, seed):
    """Return noise that becomes brighter downwards and to the right."""
    light = np.add.outer(np.arange(SIDE), np.arange(SIDE))[..., None] * (180 / (2 * SIDE))
    return (noise(count, seed) * 0.2 + light).astype(np.uint8)


@pytest.mark.slow
def test_the_order_is_learned_where_there_is_one_and_of_noise_it_is_not():
    for images, low, high in ((noise, 0.05, 0.16), (shaded, 0.9, 1.0)):
        batches = (images(64, 10 + n) for n in range(60))
        learner = learned(jigsaw(Pixels(TILE), **PLAIN), batches)
        assert low <= accuracy(learner, images(400, 9)) <= high


def test_orders_are_the_seeds_or_those_of_a_file(tmp_path):
    path = tmp_path / "orders.txt"
    permutations.write(path, permutations.greedy(12, "min", 5))
    c = tiny.config("jigsaw", SMALL | {"tile": 8})
    c.data.image_size, c.seed = 32, 3
    learner = nnx.merge(*tiny.abstract(c))
    assert learner.orders == permutations.greedy(10, "mean", 3)
    c.learner.file = str(path)
    learner = nnx.merge(*tiny.abstract(c))
    assert learner.orders == permutations.greedy(10, "min", 5)
    assert learner.head.kernel.shape == (24, 10)
    c.learner.permutations = 13
    with pytest.raises(UserError, match="learner.permutations: 13 is more than the 12 in"):
        tiny.abstract(c)


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.slow), "alexnet"])
def test_convolutional_towers(name):
    options = dict(crop=225, cell=75, tile=64) if name == "alexnet" else dict(crop=60, cell=20)
    c = tiny.config("jigsaw", SMALL | {"tile": 16} | options)
    c.model.update(dict(width=0, depth=0, mlp=0, heads=0, name=name))
    c.data.image_size = 256 if name == "alexnet" else 64
    graphdef, params, stats = tiny.abstract(c)
    batch = {"image": jax.ShapeDtypeStruct((2, *(c.data.image_size,) * 2, 3), np.uint8)}

    def loss(params, stats, batch, key):
        return nnx.merge(graphdef, params, stats).loss(batch, key, True)

    value, metrics = jax.eval_shape(loss, params, stats, batch, jax.random.key(0))
    assert value.shape == () and metrics.keys() >= {"accuracy", "chance"}


@pytest.mark.parametrize(
    ("options", "model", "side", "told"),
    [
        (dict(crop=64), "", 64, "learner.crop: 64 is not 3 cells of learner.cell=10; set it to 30"),
        (dict(tile=11), "", 64, "learner.tile: 11 is not from 1 to learner.cell=10"),
        (dict(gray=1.5), "", 64, "learner.gray: 1.5"),
        (dict(dropout=1.0), "", 64, "learner.dropout: 1.0"),
        (dict(shift=-1), "", 64, "learner.shift: -1 is negative"),
        (dict(hidden=(4, 0)), "", 64, "learner.hidden"),
        (dict(rule="men"), "", 64, "learner.rule: 'men' is unknown. Did you mean 'mean'"),
        (dict(permutations=1), "mu/2", 64, "permutations: 1 is not from 2 to 362,880"),
        (dict(), "mu/2", 16, "learner.crop: 30 is larger than data.image_size=16"),
        (dict(), "mu/4", 32, "learner.tile: 6 is not a multiple of the patch size of mu/4"),
        (dict(), "alexnet", 64, "learner.tile: 6 is too small for alexnet, which needs 63"),
    ],
)
def test_mistakes_are_told(options, model, side, told):
    def build():
        c = tiny.config("jigsaw", SMALL | options)
        c.model.name, c.data.image_size = model, side
        tiny.abstract(c)

    with pytest.raises(UserError) as error:
        build()
    assert told in str(error.value)
