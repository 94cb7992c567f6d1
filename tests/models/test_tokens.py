"""Fewer patch tokens in training: which are kept, and that the rest of the model only sees those.

The models are compared with torch's, and with the same layers on tokens that were chosen by hand.
"""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.models import build, tokens
from cap_pretrain.models.layers import normalize_images, run_encoder_blocks
from cap_pretrain.models.vit import Masks
from cap_pretrain.training import plan
from cap_pretrain.validation import validate
from tests import tiny, toy
from tests.models.test_layers import draws, equations

KEY = jax.random.key(3)
BATCH = {"image": tiny.images(4), "text": tiny.texts([7, 4, 1, 7])}
SHARE, KEPT, PATCHES = 0.4, 6, 16  # 0.4 x 16 is 6.4


@functools.cache
def drawn():
    """Return the indices [4, KEPT] of the patches of BATCH that are kept with KEY."""
    with jax.ensure_compile_time_eval():
        return np.asarray(tokens.draw(KEY, 4, PATCHES, SHARE))


# The draw


def test_all_sets_of_the_right_size_are_equally_likely():
    count, total = 12_000, 5
    index = np.asarray(tokens.draw(KEY, count, total, 0.6))
    assert index.dtype == np.int32 and index.shape == (count, 3)
    assert (np.diff(index, axis=1) > 0).all()  # distinct, in ascending order
    sets = collections.Counter(map(tuple, index.tolist()))
    assert sets.keys() == set(itertools.combinations(range(total), 3))
    expected = count / len(sets)
    chi2 = sum((n - expected) ** 2 for n in sets.values()) / expected
    assert chi2 < 33.7  # the 99.99th percentile for 9 degrees of freedom


@pytest.mark.parametrize(
    ("total", "share", "leading", "kept"),
    [
        *((16, 1 / 3, 0, 5), (16, 1 / 3, 1, 5), (4, 0.01, 0, 1), (16, 0.99, 0, 16)),
        # From 32 on, with a class token, a multiple of 8.
        *((96, 0.33, 0, 32), (96, 0.32, 0, 31), (196, 1 / 3, 0, 64), (196, 1 / 3, 1, 63)),
        *((196, 0.5, 0, 96), (196, 0.35, 0, 72), (196, 0.999, 0, 196), (197, 0.995, 0, 192)),
        *((34, 0.97, 0, 32), (38, 0.98, 0, 38)),
    ],
)
def test_the_number_kept_is_rounded_and_at_least_one(total, share, leading, kept):
    assert tokens.number_kept(total, share, leading) == kept


def test_nothing_is_drawn_where_rounding_keeps_all():
    assert tokens.draw(KEY, 2, 16, 0.99) is None
    assert tokens.draw(KEY, 2, 16, 0.9).shape == (2, 14)


def test_taking_tokens_has_the_gradient_of_indexing_without_a_scatter():
    x = jax.random.normal(KEY, (4, PATCHES, 3))
    weight = jax.random.normal(jax.random.key(1), (4, KEPT, 3))

    def total(x, take):
        return jnp.sum(jnp.sin(take(x)) * weight)

    def of_indexing(x):
        return x[np.arange(4)[:, None], drawn()]

    def ours(x):
        return tokens.take(x, drawn())

    np.testing.assert_array_equal(ours(x), of_indexing(x))
    expected, found = (jax.grad(total)(x, take) for take in (of_indexing, ours))
    np.testing.assert_array_equal(found, expected)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: total(x, ours)))(x).jaxpr
    assert not [e for e in equations(jaxpr) if e.primitive.name.startswith("scatter")]


def test_the_log_says_how_many_are_kept():
    assert build.notes(toy.config()) == []
    c = toy.config(model__keep_tokens=1 / 3)
    said = "the encoder reads a share of 0.3333 of the patch tokens (model.keep_tokens)"
    assert build.notes(c) == [f"In training {said}"]
    c.model.keep_tokens_until = 0.8
    assert build.notes(c) == [f"In the first 0.8 of training {said}"]


# Before the encoder


def encode(learner, images, key):
    return learner.encode(images, train=True, key=key)


@pytest.mark.parity
@pytest.mark.parametrize("pool", ["gap", pytest.param("map", marks=pytest.mark.slow)])
def test_kept_patches_are_encoded_as_by_torch(pool):
    from tests import torch_reference

    split = tiny.split(tiny.config(pool=pool, keep_tokens=SHARE))
    out = tiny.jitted(split, encode)(BATCH["image"], KEY)
    index = drawn()
    assert index.shape == (4, KEPT) and len(np.unique(index, axis=0)) == 4
    args = (split[1]["encoder"], BATCH["image"], tiny.HEADS)
    expected = torch_reference.vit(*args, kept=index)
    assert out.tokens.shape == (4, KEPT, 16)
    for found, wanted in zip(out, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
def test_a_class_token_is_kept_and_the_order_of_patches_does_not_matter():
    fields = dict(pool="class", class_token=True, keep_tokens=SHARE)
    split = tiny.split(tiny.config(**fields))

    def both(learner, images, key):
        encoder = learner.encoder
        x = encoder._embed(normalize_images(images, jnp.float32), Masks())
        order = jnp.concatenate([jnp.zeros((4, 1), int), 1 + drawn()[:, ::-1]], axis=1)
        x = x[jnp.arange(4)[:, None], order]
        x = run_encoder_blocks(encoder.blocks, x, None, depth=3, compute=encoder.compute)
        return encode(learner, images, key), encoder.norm(x)

    out, by_hand = tiny.jitted(split, both)(BATCH["image"], KEY)
    assert out.tokens.shape == (4, 1 + KEPT, 16)
    np.testing.assert_allclose(out.tokens[:, 1:], by_hand[:, :0:-1], atol=1e-5)
    np.testing.assert_allclose(out.pooled, by_hand[:, 0], atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"keep_tokens": 0.99}])
def test_nothing_is_drawn_unless_tokens_are_dropped(fields):
    learner = nnx.merge(*tiny.split(tiny.config(**fields)))
    assert not draws(lambda key: learner.loss(BATCH, key, True)[0])


def test_evaluation_and_frozen_encoders_see_all_tokens():
    learner = nnx.merge(*tiny.split(tiny.config(keep_tokens=SHARE)))
    image = BATCH["image"]

    def shape(**kwargs):
        return jax.eval_shape(lambda key: learner.encode(image, key=key, **kwargs), KEY).tokens

    assert shape(train=True).shape == (4, KEPT, 16)
    assert shape(train=False).shape == (4, PATCHES, 16)
    assert not draws(lambda key: learner.loss(BATCH, key, False)[0])
    assert learner.encoder.tokens_at("block_1", image).shape == (4, PATCHES, 16)
    learner.encoder.frozen = True
    assert shape(train=True).shape == (4, PATCHES, 16)


# Before the decoder


def nll(logits, text):
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logits, text[..., None], -1)[..., 0]


@pytest.mark.parity
def test_the_decoder_reads_the_kept_tokens_as_torchs():
    from tests import torch_reference

    split = tiny.split(tiny.config(keep_tokens=SHARE, keep_tokens_at="decoder"))

    def rows(learner, batch, key):
        encoded = learner.encode(batch["image"], train=True, key=learner.encoder_key(key))
        return encoded.tokens, *(learner.rows(encoded, batch, key, train) for train in (0, 1))

    encoded, evaluated, trained = tiny.jitted(split, rows)(BATCH, KEY)
    assert encoded.shape == (4, PATCHES, 16)
    args = (split[1], BATCH["image"], BATCH["text"], np.zeros(4, bool), tiny.HEADS)
    for found, kept in ((evaluated, None), (trained, drawn())):
        expected = nll(torch_reference.captioner(*args, kept=kept).numpy(), BATCH["text"])
        np.testing.assert_allclose(found["nll"], expected, atol=1e-4)
    assert np.abs(trained["nll"] - evaluated["nll"]).max() > 0.01


@pytest.mark.slow
def test_the_decoder_always_reads_a_class_token():
    fields = dict(class_token=True, keep_tokens=SHARE, keep_tokens_at="decoder")
    learner = nnx.merge(*tiny.split(tiny.config(**fields)))
    encoded = np.random.default_rng(0).standard_normal((4, 1 + PATCHES, 16))
    read = learner.read_tokens(jnp.asarray(encoded), KEY)
    order = np.concatenate([np.zeros((4, 1), int), 1 + drawn()], axis=1)
    np.testing.assert_allclose(read, encoded[np.arange(4)[:, None], order], rtol=1e-6)


# Cost


def test_flops_are_those_of_the_kept_tokens():
    d, n, t, depth = 16, PATCHES, tiny.LENGTH, 3

    def counted(**fields):
        c = tiny.config(**fields)
        return plan.flops_per_example(c, tiny.VOCAB, ["training"])["training"]

    def encoder(n):
        return depth * (4 * 2 * n * d * d + 2 * 2 * n * n * d + 2 * 2 * n * d * 40)

    def patches(n):
        return 2 * n * (tiny.PATCH**2 * 3) * d

    def cross(n):  # what depends on the number of tokens in two layers
        return 2 * (2 * 2 * n * d * d + 2 * 2 * t * n * d)

    def training(n):  # the backward pass costs twice the forward pass, but pixels need no gradient
        return 2 * patches(n) + 3 * encoder(n) + 3 * cross(n)

    whole, dropped = counted(), counted(keep_tokens=SHARE)
    positions = 2 * KEPT * n * d  # their gradient is a product with the kept indices
    assert whole - dropped == training(n) - training(KEPT) - positions
    read = counted(keep_tokens=SHARE, keep_tokens_at="decoder")
    assert whole - read == 3 * (cross(n) - cross(KEPT))


# Mistakes

BESIDE = {  # a teacher's part has no decoder that drops tokens
    "parts": {"siglip": {"name": "dual_encoder"}, "distill": {"name": "distillation"}},
    "weights": {"siglip": "1", "distill": "1"},
}


@pytest.mark.parametrize(
    ("learner", "options", "fields", "said"),
    [
        ("captioner", {}, {"keep_tokens": 0.0}, r"model.keep_tokens: 0.0 is not in \(0, 1\]"),
        ("captioner", {}, {"keep_tokens_until": 0.0}, r"model.keep_tokens_until: 0.0 is not in"),
        ("captioner", {}, {"keep_tokens_at": "encode"}, "model.keep_tokens_at: 'encode' is unk"),
        ("captioner", {}, {"name": "resnet18"}, "model.keep_tokens: 0.4 is for a ViT"),
        ("dual_encoder", {}, {"keep_tokens_at": "decoder"}, "does not work with dual_encoder"),
        ("recurrent", {}, {"keep_tokens_at": "decoder"}, "recurrent; set it to encoder"),
        ("colorization", {}, {}, "colorization needs all; set it to 1"),
        ("distillation", {}, {}, "distillation needs all; set it to 1"),
        ("joint", BESIDE, {"keep_tokens_at": "decoder"}, "with joint; set it to encoder"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(learner, options, fields, said):
    c = toy.config(learner, options)
    c.model.update({"keep_tokens": SHARE} | fields)
    with pytest.raises(UserError, match=said) as error:
        validate(c)
    assert len(str(error.value).splitlines()) == 1
