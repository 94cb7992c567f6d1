"""AIMv2: its whole loss against torch, what a token has seen, and decoding with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.training import plan
from tests import tiny
from tests.layouts import on_eight_devices

BATCH = {
    "image": tiny.images(4),
    "text": tiny.texts([7, 4, 2, 5]),
    "prompt": np.array([2, 0, 1, 0], np.int32),
    "mask": np.array([1, 1, 1, 0], bool),
}
PATCHES = (tiny.SIDE // tiny.PATCH) ** 2
PREFIX = np.array([1, 5, 8, 15])


def aim(**options):
    return tiny.split(tiny.config("aimv2", options))


@pytest.fixture(scope="module")
def split():
    """A learner as (graphdef, params, stats)."""
    return aim()


@pytest.fixture(scope="module")
def computed(split):
    """Function (images) -> tokens under prefix attention, the loss in evaluation, and metrics."""

    def compute(learner, images):
        tokens = learner.encode_with_prefix(images, jnp.asarray(PREFIX))
        return tokens, *learner.loss({**BATCH, "image": images}, jax.random.key(0), False)

    return tiny.jitted(split, compute)


@pytest.mark.parity
def test_tokens_and_loss_are_those_of_torch(split, computed):
    from tests import torch_reference

    tokens, loss, metrics = computed(BATCH["image"])
    params, images, text = split[1], BATCH["image"], BATCH["text"]
    expected = torch_reference.aim(params, images, text, PREFIX, tiny.HEADS)[0]
    np.testing.assert_allclose(tokens, expected, atol=1e-4)

    half = np.full(4, PATCHES // 2)
    _, predicted, logits = torch_reference.aim(params, images, text, half, tiny.HEADS)
    side = tiny.SIDE // tiny.PATCH
    patches = images.astype(np.float64).reshape(4, side, tiny.PATCH, side, tiny.PATCH, 3)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(4, PATCHES, -1)
    centred = patches - patches.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).sum(-1, keepdims=True) / (centred.shape[-1] - 1))
    errors = ((predicted.numpy()[:, :-1] - wanted[:, 1:]) ** 2).mean(-1)
    image = errors[:, PATCHES // 2 - 1 :].mean(1)
    nll = -np.asarray(logits.log_softmax(-1))
    own = np.take_along_axis(nll, text[..., None], -1)[..., 0]
    counts = (text > 0) & (np.arange(tiny.LENGTH) >= BATCH["prompt"][:, None])
    caption = np.array([row[t].mean() for row, t in zip(own, counts, strict=True)])
    counted = BATCH["mask"]
    assert image.std() > 0.01 and caption.std() > 0.01
    np.testing.assert_allclose(metrics["loss_image"], image[counted].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_caption"], caption[counted].mean(), rtol=1e-4)
    np.testing.assert_allclose(loss, (caption + 0.4 * image)[counted].mean(), rtol=1e-4)
    assert metrics["loss_weight"] == 3


def test_a_token_after_the_prefix_has_not_seen_later_patches(computed):
    changed = 9
    images = BATCH["image"].copy()
    row, column = divmod(changed, tiny.SIDE // tiny.PATCH)
    there = np.s_[:, row * tiny.PATCH : (row + 1) * tiny.PATCH]
    images[there][:, :, column * tiny.PATCH : (column + 1) * tiny.PATCH] //= 2
    moved = np.abs(computed(images)[0] - computed(BATCH["image"])[0]).max(-1)
    later = np.arange(PATCHES) >= changed
    for example, prefix in enumerate(PREFIX):
        sees = later | (prefix > changed)  # a token of a prefix sees all of the prefix
        assert not moved[example][~sees].any()
        assert (moved[example][sees] > 1e-5).all()


def test_decoding_with_a_cache_predicts_what_is_predicted_at_once(split):
    """Two texts for each image, which share its keys and values."""
    text = tiny.texts([7] * 8)
    inputs = np.pad(text, ((0, 0), (1, 0)))[:, :-1]

    def at_once(learner, images):
        encoded = learner.image_features(images)
        likely = learner.compare(encoded, text.reshape(4, 2, -1))
        weights = learner.attend(images, text[::2])
        return learner.predict(encoded, text), likely, weights

    def one_by_one(learner, images):
        def step(cache, inputs):
            tokens, position = inputs
            logits, cache = learner.decode_step(tokens, position, cache)
            return cache, logits

        cache = learner.init_decoding(images, 2)
        return jax.lax.scan(step, cache, (inputs.T, jnp.arange(tiny.LENGTH)))[1]

    logits, likely, weights = tiny.jitted(split, at_once)(BATCH["image"])
    steps = tiny.jitted(split, one_by_one)(BATCH["image"])
    assert logits.std() > 0.5
    np.testing.assert_allclose(np.swapaxes(steps, 0, 1), logits, atol=1e-4)
    own = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), text[..., None], -1)
    np.testing.assert_allclose(likely.ravel(), own[..., 0].sum(1), rtol=1e-4)
    assert weights.shape == (4, tiny.LENGTH, PATCHES)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_prefixes_are_drawn_from_one_to_all_patches_but_one(split, monkeypatch):
    seen = []
    learner_class = learners.learner_class("aimv2")
    plain = learner_class.encode_with_prefix
    monkeypatch.setattr(
        learner_class,
        "encode_with_prefix",
        lambda self, images, prefix, **kwargs: seen.append(prefix) or plain(self, images, prefix),
    )

    def prefixes(learner, key):
        images, text = np.zeros((500, tiny.SIDE, tiny.SIDE, 3), np.uint8), np.ones((500, 2), int)
        learner.rows(None, {"image": images, "text": text}, key, True)
        return seen.pop()

    drawn = np.asarray(tiny.jitted(split, prefixes)(jax.random.key(0)))
    assert sorted(set(drawn.tolist())) == [*range(1, PATCHES)]


@pytest.mark.slow
def test_all_products_count_as_flops():
    c = tiny.config("aimv2")
    forward = plan.flops_per_example(c, tiny.VOCAB, ["forward"])["forward"]
    n, t, d, mlp, pixels = PATCHES, tiny.LENGTH, 16, 40, 3 * tiny.PATCH**2
    layer = 4 * d * d + 2 * d * mlp  # multiply-adds of the linear layers, for each position
    encoder = n * pixels * d + 3 * (n * layer + 2 * n * n * d)
    decoder = n * d * d + 2 * ((n + t) * layer + 2 * (n * n + t * (n + t)) * d)
    heads = (n - 1) * d * pixels + t * d * tiny.VOCAB
    assert forward == 2 * (encoder + decoder + heads)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.name": "resnet18"}, "model.name: aimv2 predicts the patches of a ViT"),
        ({"model.name": "mu/16"}, "data.image_size: aimv2 predicts patches from earlier"),
        ({"data.first_sizes": "4:0.2+8:0.2"}, "data.first_sizes: .* an image of 4 pixels has one"),
        ({"model.colours": "lightness"}, "model.colours: aimv2 predicts colors"),
    ],
)
def test_what_has_no_patches_to_predict_is_refused(fields, message):
    c = tiny.config("aimv2")
    c.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        tiny.abstract(c)


def loss_on(devices):
    """Return the loss of a batch and the norm of its gradient on one or eight devices."""
    import optax
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    graphdef, params, stats = aim()
    mesh = Mesh(jax.devices()[:devices], "data")
    batch = {"image": tiny.images(16), "text": tiny.texts([1, 3, 5, 7] * 4)}
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

    def loss(params, batch):
        return nnx.merge(graphdef, params, stats).loss(batch, jax.random.key(0), True)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    return float(value), float(optax.tree.norm(gradient))


@pytest.mark.slow
def test_eight_devices_learn_what_one_learns():
    one, eight = on_eight_devices(loss_on, [(1,), (8,)])
    np.testing.assert_allclose(one, eight, rtol=1e-4)
