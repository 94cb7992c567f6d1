"""CoCa: both losses against torch, decoding with a cache, what evaluators find in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners.protocols import EmbedsText, ScoresTexts, WritesCaptions
from cap_pretrain.training import plan
from tests import tiny

BATCH = {
    "image": tiny.images(4),
    "text": tiny.texts([7, 4, 2, 5]),
    "prompt": np.array([2, 0, 1, 0], np.int32),
    "mask": np.array([1, 1, 1, 0], bool),
}
PATCHES = (tiny.SIDE // tiny.PATCH) ** 2
QUERIES = 5


def coca(**options):
    return tiny.split(tiny.config("coca", {"queries": QUERIES} | options))


@pytest.fixture(scope="module")
def split():
    """A learner as (graphdef, params, stats)."""
    return coca()


@pytest.mark.parity
@pytest.mark.parametrize("queries", [QUERIES, pytest.param(0, marks=pytest.mark.slow)])
def test_losses_and_vectors_are_those_of_torch(queries):
    from tests import torch_reference

    split, text = coca(queries=queries), BATCH["text"]

    def compute(learner, batch):
        vectors = learner.embed_images(batch["image"]), learner.embed_text(batch["text"])
        return vectors, *learner.loss(batch, jax.random.key(0), False)

    vectors, loss, metrics = tiny.jitted(split, compute)(BATCH)
    logits, *expected = torch_reference.coca(split[1], BATCH["image"], text, tiny.HEADS)
    for ours, theirs in zip(vectors, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)

    nll = -np.asarray(logits.log_softmax(-1))
    own = np.take_along_axis(nll, text[..., None], -1)[..., 0]
    counts = (text > 0) & (np.arange(tiny.LENGTH) >= BATCH["prompt"][:, None])
    caption = np.mean([row[t].mean() for row, t in zip(own[:3], counts[:3], strict=True)])
    images, texts = (part[:3].numpy().astype(np.float64) for part in expected)
    scores = np.exp(float(split[1]["log_scale"])) * images @ texts.T
    rows, columns = (np.log(np.exp(part).sum(1)) - np.diag(part) for part in (scores, scores.T))
    contrast = np.mean(rows + columns) / 2
    np.testing.assert_allclose(metrics["loss_caption"], caption, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_contrast"], contrast, rtol=1e-4)
    np.testing.assert_allclose(loss, 2 * caption + contrast, rtol=1e-4)
    assert metrics["loss_weight"] == 3


@pytest.mark.slow
def test_decoding_with_a_cache_predicts_what_is_predicted_at_once(split):
    """Two texts for each image, which share its keys and values."""
    text = tiny.texts([7] * 8)
    inputs = np.pad(text, ((0, 0), (1, 0)))[:, :-1]

    def at_once(learner, images):
        captioner = learner.parts["captions"]
        encoded = captioner.image_features(images)
        likely = captioner.compare(encoded, text.reshape(4, 2, -1))
        return captioner.predict(encoded, text), likely, learner.attend(images, text[::2])

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


def test_it_is_a_dual_encoder_and_a_captioner():
    c = tiny.config("coca")
    found = [
        learners.able(c, protocol, part)
        for protocol, part in (
            (ScoresTexts, ""),
            (EmbedsText, ""),
            (WritesCaptions, ""),
            (ScoresTexts, "captions"),
            (EmbedsText, "captions"),
        )
    ]
    assert [f and f.name for f in found] == ["", "", "", "captions", None]
    assert not issubclass(found[3].kind, EmbedsText)
    part = learners.defaults("coca").to_dict()
    c = tiny.config("joint", {"parts": {"a": part}, "weights": {"a": "1"}})
    assert learners.able(c, ScoresTexts).name == "a"
    assert learners.able(c, ScoresTexts, "a/captions").name == "a/captions"


def test_all_products_count_as_flops():
    c = tiny.config("coca", {"queries": QUERIES})
    forward = plan.flops_per_example(c, tiny.VOCAB, ["forward"])["forward"]
    n, t, d, mlp, q = PATCHES, tiny.LENGTH, 16, 40, QUERIES
    layer = 4 * d * d + 2 * d * mlp  # multiply-adds of the linear layers, for each position
    encoder = n * 3 * tiny.PATCH**2 * d + 3 * (n * layer + 2 * n * n * d)
    poolers = sum(2 * k * d * d + 2 * n * d * d + 2 * k * n * d for k in (q, 1))
    unimodal = 2 * ((t + 1) * layer + 2 * (t + 1) ** 2 * d)
    multimodal = 2 * (t * (layer + 2 * d * d) + 2 * q * d * d + 2 * t * (t + q) * d)
    contrast = 2 * d * d + c.batch_size * d
    total = encoder + poolers + unimodal + multimodal + contrast + t * d * tiny.VOCAB
    assert forward == 2 * total


def test_options_that_leave_no_loss_are_refused():
    for options, message in (
        ({"caption_weight": -1.0}, "learner.caption_weight: -1.0 is negative"),
        ({"queries": -1}, "learner.queries: -1 is negative"),
        ({"caption_weight": 0.0, "contrast_weight": 0.0}, "caption_weight: is 0, and so is"),
        ({"contrast": "hinge"}, "learner.contrast: 'hinge' is not"),
        ({"average": "word"}, "learner.average: 'word' is neither"),
    ):
        with pytest.raises(UserError, match=message):
            learners.defaults("coca", **options)
