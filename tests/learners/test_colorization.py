"""Colorization: targets, weights, and the lightness input of its encoder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cap_pretrain import inputs, train
from cap_pretrain.convert.export import form
from cap_pretrain.errors import UserError
from cap_pretrain.learners import colorization
from cap_pretrain.learners.colorization import Colorization, count_colours
from cap_pretrain.models import lab
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.encoder import COLOURS, ImageEncoder
from cap_pretrain.models.layers import EncoderOutput
from cap_pretrain.validation import validate
from tests import tiny, toy
from tests.learners.pixels import learned

SIDE, GRID = 16, 2
KEY = jax.random.key(0)


class Patches(ImageEncoder):
    """An encoder of one layer on each of GRID x GRID patches, with `before` tokens in front."""

    layers = {}

    def __init__(self, width: int = 24, before: int = 0):
        self.width, self.before, self.patch = width, before, SIDE // GRID
        self.linear = nnx.Linear(self.patch**2 * 3, width, rngs=nnx.Rngs(0))

    def _encode(self, images, *, train, key):
        x = images.reshape(-1, GRID, self.patch, GRID, self.patch, 3).swapaxes(2, 3)
        x = nnx.relu(self.linear(x.reshape(len(x), GRID**2, -1)))
        before = jnp.full((len(x), self.before, self.width), 7.0)
        return EncoderOutput(jnp.concatenate([before, x], axis=1), x.mean(1))


def colorization_of(encoder=None, seed=0, **options):
    """A learner with a random head."""
    options = Colorization.Options(**{"upsample": 2} | options)
    learner = Colorization(encoder or Patches(), options=options, rngs=nnx.Rngs(0))
    noise = np.random.default_rng(seed).standard_normal(learner.head.kernel.shape)
    learner.head.kernel[...] = jnp.asarray(0.3 * noise, jnp.float32)
    return learner


_loss = nnx.jit(lambda learner, batch: learner.loss(batch, KEY, False))
_predict = nnx.jit(lambda learner, images: learner.predict(images))


def loss(learner, images, counts=True):
    """Return loss and metrics over images; `counts` is the mask."""
    return _loss(learner, {"image": images, "mask": np.broadcast_to(counts, len(images))})


IMAGES = tiny.images(6)


@pytest.fixture(scope="module")
def whole():
    """A learner, its logits for IMAGES, and the colors of their parts, [6, 4, 4, 2]."""
    learner = colorization_of()
    logits = np.asarray(_predict(learner, IMAGES))
    ab = lab.lab(IMAGES / 255)[..., 1:].reshape(6, 4, 4, 4, 4, 2).mean((2, 4))
    return learner, logits, ab


def test_the_loss_is_cross_entropy_with_soft_targets(whole):
    learner, logits, ab = whole
    assert logits.shape == (6, 4, 4, lab.BINS)
    squares = ((ab[..., None, :] - lab.bins()) ** 2).sum(-1)
    tenth = np.sort(squares, axis=-1)[..., 9:10]
    shares = np.where(squares <= tenth, np.exp(-squares / 50), 0)
    shares /= shares.sum(-1, keepdims=True)
    expected = optax.softmax_cross_entropy(logits, shares)
    found, metrics = loss(learner, IMAGES)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["cross_entropy"], found, rtol=1e-6)
    right = squares.argmin(-1)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == right).mean(), atol=1e-6)
    gray = int(lab.nearest_bin(np.zeros(2)))
    np.testing.assert_allclose(metrics["chance"], (right == gray).mean(), atol=1e-6)
    told = lab.annealed_mean(jnp.asarray(logits))
    error = np.linalg.norm(told - ab, axis=-1).mean()
    np.testing.assert_allclose(metrics["ab_error"], error, rtol=1e-4)
    expected = np.linalg.norm(ab, axis=-1).mean()
    np.testing.assert_allclose(metrics["ab_error_gray"], expected, rtol=1e-4)
    assert metrics["loss_weight"] == 6


def test_rare_bins_count_more(whole):
    _, logits, ab = whole
    right = np.asarray(lab.nearest_bin(ab))
    counts = np.bincount(right.ravel(), minlength=lab.BINS)
    learner = colorization_of(prior=" ".join(map(str, counts)))
    found, metrics = loss(learner, IMAGES)
    numbers, shares = lab.encode(jnp.asarray(ab, jnp.float32))
    logs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(numbers), -1)
    expected = -(shares * logs).sum(-1) * lab.weights(counts)[right]
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-3)
    assert found != pytest.approx(float(metrics["cross_entropy"]), rel=1e-3)
    share = (right == counts.argmax()).mean()
    np.testing.assert_allclose(metrics["chance"], share, atol=1e-6)


def test_the_encoder_sees_lightness_alone(whole):
    learner, logits, _ = whole
    recoloured = np.asarray(255 * lab.gray(IMAGES / 255)).round().astype(np.uint8)
    assert np.abs(IMAGES.astype(int) - recoloured).max() > 20
    np.testing.assert_allclose(_predict(learner, recoloured), logits, atol=0.05)
    assert np.ptp(logits) > 1


def test_gray_and_masked_images_do_not_count(whole):
    learner, *_ = whole
    gray = np.asarray(255 * lab.gray(IMAGES / 255)).astype(np.uint8)
    noisy = gray + np.array([0, 3, 0], np.uint8)  # a and b below 5, as JPEG noise may cause
    first = np.arange(6) < 3
    expected, of_first = loss(learner, IMAGES, first)
    mixed = np.concatenate([IMAGES[:3], gray[3:4], noisy[4:5], 255 - IMAGES[5:]])
    found, metrics = loss(learner, mixed, np.arange(6) < 5)
    assert metrics["loss_weight"] == of_first["loss_weight"] == 3
    for name, value in of_first.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    nothing, metrics = loss(learner, gray)
    assert nothing == 0 and metrics["loss_weight"] == 0


def test_a_batch_may_be_computed_in_parts(whole):
    learner, *_ = whole
    expected, _ = loss(learner, IMAGES)
    first = np.arange(6) < 2
    parts = [loss(learner, IMAGES, some) for some in (first, ~first)]
    total = sum(metrics["loss_weight"] * part for part, metrics in parts)
    np.testing.assert_allclose(total / 6, expected, rtol=1e-5)


def test_its_gradient_has_no_scatter_which_gpus_add_up_in_any_order():
    graphdef, params = nnx.split(colorization_of())

    def of_params(params, images):
        return nnx.merge(graphdef, params).loss({"image": images}, KEY, True)[0]

    program = jax.make_jaxpr(jax.grad(of_params))(params, tiny.images(2))
    assert "dot_general" in str(program) and "scatter" not in str(program)


def test_predictions_lie_where_their_pixels_are():
    learner = colorization_of(upsample=2)
    head = np.zeros((24, 2, 2, lab.BINS), np.float32)
    head[:, 1, 0, 5] = 1  # the part below left of each token
    learner.head.kernel[...] = jnp.asarray(head.reshape(24, -1))
    images = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    images[0, :8, 8:] = 200  # the patch of the upper right token
    learner.encoder.linear.kernel[...] = jnp.ones_like(learner.encoder.linear.kernel[...])
    logits = np.asarray(_predict(learner, images))[0, :, :, 5]
    assert np.unravel_index(logits.argmax(), logits.shape) == (1, 2)


def test_the_token_of_the_class_has_no_place(whole):
    _, logits, _ = whole
    found = _predict(colorization_of(Patches(before=1)), IMAGES)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="the 6 tokens of this encoder do not form a square grid"):
        nnx.eval_shape(lambda: colorization_of(Patches(before=2)).predict(IMAGES))


def dull_and_bright(count, seed):
    """Return images whose patches are either dark and blue or light and yellow."""
    rng = np.random.default_rng(seed)
    bright = rng.integers(0, 2, (count, GRID, GRID, 1))
    pixels = np.where(bright, [230, 220, 60], [30, 30, 140])
    pixels = pixels.repeat(SIDE // GRID, axis=1).repeat(SIDE // GRID, axis=2)
    return (pixels + rng.integers(-15, 16, pixels.shape)).astype(np.uint8)


def test_it_learns_that_light_is_yellow():
    fresh = Colorization(Patches(), options=Colorization.Options(upsample=1), rngs=nnx.Rngs(0))
    held_out = dull_and_bright(32, 99)
    before, _ = loss(fresh, held_out)
    np.testing.assert_allclose(before, np.log(lab.BINS), rtol=1e-5)
    batches = [dull_and_bright(32, n) for n in range(40)]
    for images in batches:
        images[:8] = images[:8, ..., :1]  # gray, which must be ignored
    learner = learned(fresh, batches, rate=2e-2)
    after, metrics = loss(learner, held_out)
    assert after < before - 2 and metrics["accuracy"] > 0.5 > metrics["chance"]
    assert metrics["ab_error"] < 15 and metrics["ab_error_gray"] > 50
    found = np.asarray(jax.jit(learner.colourize)(held_out))
    assert found.dtype == np.uint8 and found.shape == held_out.shape
    np.testing.assert_allclose(
        lab.lab(found / 255)[..., 0], lab.lab(held_out / 255)[..., 0], atol=6
    )
    middle = (slice(None), slice(2, 6), slice(2, 6))
    off = np.abs(found[middle].astype(int) - held_out[middle]).mean()
    assert off < 30 < np.abs(255 * lab.gray(held_out / 255) - held_out)[middle].mean()


class Numbered:
    """Images of a single color, and some that do not decode or are gray."""

    def __init__(self, colour, count, odd=()):
        self.image = np.full((20, 30, 3), colour, np.uint8)
        self.count, self.odd, self.seen = count, odd, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.seen.append(index)
        if index in self.odd:
            return {"image": [b"broken", np.full((20, 30, 3), 77, np.uint8)][index % 2]}
        return {"image": self.image}


def test_colours_of_the_training_images_are_counted(monkeypatch):
    monkeypatch.setattr(colorization, "PRIOR_IMAGES", 20)
    red, blue = Numbered((250, 0, 0), 150, odd=(10, 11, 20, 21)), Numbered((0, 0, 250), 3)
    counts = count_colours([(red, 0.75), (blue, 0.25)])
    bins = lab.nearest_bin(lab.lab(np.array([[250, 0, 0], [0, 0, 250]]) / 255)[:, 1:])
    assert np.flatnonzero(counts).tolist() == sorted(bins)
    assert red.seen == list(range(0, 150, 10)) and blue.seen == [0, 1, 2]
    assert counts[bins].tolist() == [13 * 16**2, 3 * 16**2]


def pretext(**fields):
    c = toy.load("pretext", "task=colorization,data=scenes")
    toy.shrink(c, model__depth=1, **fields)
    c.evals.loss.limit = c.evals.loss.batch_size = 8
    return c


def test_what_is_counted_becomes_part_of_the_config(monkeypatch):
    monkeypatch.setattr(colorization, "PRIOR_IMAGES", 12)
    c = pretext()
    mixture = inputs.open_sources(c)
    settled = inputs.completed(c, mixture)
    prior = np.array(settled.learner.prior.split(), int)
    assert prior.shape == (lab.BINS,) and 0 < prior.sum() <= 12 * 16**2
    assert inputs.completed(c, mixture).learner == settled.learner
    assert inputs.completed(settled, []).learner == settled.learner
    c.learner.prior = "uniform"
    assert inputs.completed(c, mixture).learner.prior == "uniform"
    assert Colorization.Options(prior="uniform").counts is None


def test_the_recipe_is_the_papers():
    c = toy.load("pretext", "task=colorization,encoder=vit,data=scenes")
    validate(c)
    assert (c.data.image_size, c.model.colours, c.batch_size) == (176, "lightness", 40)
    assert (c.optim.lr, c.optim.b1, c.optim.b2, c.optim.weight_decay) == (3e-5, 0.9, 0.99, 1e-3)


@pytest.mark.slow
def test_a_run_of_two_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(colorization, "PRIOR_IMAGES", 12)
    c = pretext()
    validate(c)
    train.run(c, tmp_path)
    one, two = toy.losses(tmp_path)
    assert one["train/cross_entropy"] == pytest.approx(np.log(lab.BINS), rel=1e-4)
    assert two["train/loss"] != one["train/loss"]
    kept = json.loads((tmp_path / "config.json").read_text())
    assert len(kept["learner"]["prior"].split()) == lab.BINS
    train.run(c, tmp_path)  # the same counts, otherwise the config would be rejected
    assert "ab_error" in json.loads((tmp_path / "evals" / "loss" / "2.json").read_text())


def seen_by(encoder, images):
    """Return features of a lightness encoder, and of a color encoder on color and gray images.

    The features are the pooled vectors and those of the first layer.
    """
    layer = next(iter(encoder.layers), None)
    gray = 2 * lab.gray((images + 1) / 2) - 1

    @jax.jit
    def outputs(images):
        tokens = () if layer is None else (encoder.tokens_at(layer, images),)
        return encoder(images).pooled, *tokens

    of_gray, of_images = outputs(gray), outputs(images)
    outputs.clear_cache()
    encoder.colours = "lightness"
    return outputs(images), of_gray, of_images


def test_an_encoder_of_lightness_sees_no_colour():
    images = 2 * jnp.asarray(IMAGES, jnp.float32) / 255 - 1
    (found,), (of_gray,), (of_images,) = seen_by(Patches(), images)
    np.testing.assert_allclose(found, of_gray, atol=1e-5)
    assert np.abs(found - of_images).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mu/8", "alexnet"])
def test_so_do_all_of_its_layers(name):
    c = toy.config(data__image_size=64)
    c.model.name = name
    images = 2 * jnp.asarray(tiny.images(2, 64), jnp.float32) / 255 - 1
    for found, of_gray, of_images in zip(
        *seen_by(build_encoder(c, nnx.Rngs(0)), images), strict=True
    ):
        np.testing.assert_allclose(found, of_gray, atol=2e-4)
        assert np.abs(found - of_images).max() > 2e-3


def test_the_config_says_what_the_encoder_sees():
    for seen in COLOURS:
        c = toy.config(model__colours=seen)
        assert nnx.eval_shape(lambda c=c: build_encoder(c, nnx.Rngs(0))).colours == seen


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match="takes lightness only.*cannot be exported"):
        form(tiny.config(colours="lightness"))
    with pytest.raises(UserError, match="model.colours: 'grey' is unknown"):
        validate(toy.config(model__colours="grey"))
    with pytest.raises(UserError, match="model.colours: 'lightness' is for images"):
        validate(toy.config(model__name="stored", model__colours="lightness"))
    for wrong in ("1 2 3", "x " * lab.BINS, "0 " * lab.BINS, "-1 " * lab.BINS):
        with pytest.raises(UserError, match="learner.prior: .* is not 261 counts of bins"):
            Colorization.Options(prior=wrong)
    with pytest.raises(UserError, match="learner.upsample: 0 must be at least 1"):
        dataclasses.replace(Colorization.Options(), upsample=0)
