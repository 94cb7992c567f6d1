"""Recurrent captioners: losses by their formula, decoding against exhaustive search, learning."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.learners.recurrent import Recurrent, attention_penalty, sampled_inputs
from cap_pretrain.models.decoding import CaptionSpec, beam_search, greedy
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import Compute, EncoderOutput
from cap_pretrain.models.recurrent import DECODERS
from cap_pretrain.training.step import accumulated_gradients, split_learner
from tests import tiny

KEY = jax.random.key(3)
EOS = 1
SIZES = dict(embed=12, hidden=16, attention=8)
KINDS = {
    "lstm": dict(decoder="lstm", layers=2),
    "gru": dict(decoder="gru"),
    "attention": dict(decoder="attention", penalty=0.5),
    "merge": dict(decoder="merge"),
}


class Patches(ImageEncoder):
    """An encoder that compiles quickly: a linear function of each patch."""

    width = 16

    def __init__(self, rngs):
        self.embedding = nnx.Linear(3 * tiny.PATCH**2, self.width, rngs=rngs)

    def _encode(self, images, *, train, key):
        n, p = tiny.SIDE // tiny.PATCH, tiny.PATCH
        patches = images.reshape(-1, n, p, n, p, 3).swapaxes(2, 3).reshape(-1, n * n, 3 * p * p)
        tokens = jnp.tanh(self.embedding(patches))
        return EncoderOutput(tokens, jnp.mean(tokens, axis=1))


def build(kind, vocab=tiny.VOCAB, **options):
    """Return an abstract learner of a kind, split."""

    def make():
        rngs, settings = nnx.Rngs(0), Recurrent.Options(**SIZES | KINDS[kind] | options)
        shape = dict(vocab_size=vocab, width=Patches.width, compute=Compute(), rngs=rngs)
        decoder = DECODERS[settings.decoder](settings, **shape)
        return Recurrent(Patches(rngs), decoder, options=settings)

    return split_learner(nnx.eval_shape(make))


def random(kind, **options):
    """Return a learner of a kind with random parameters, split."""
    return tiny.randomised(build(kind, **options))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def split(kind):
    """A learner of each kind with random parameters."""
    return random(kind)


def predicted(split, images, text):
    """Return logits [B, T, V] for one text per image."""

    def predict(learner, images, text):
        return learner.predict(learner.image_features(images), text)

    return np.asarray(tiny.jitted(split, predict)(images, text))


def with_options(split, kind, **options):
    """Return the same learner with other options."""
    return build(kind, **options)[0], *split[1:]


def loss_of(split, train):
    return tiny.jitted(split, lambda learner, *args: learner.loss(*args, train))


# Losses


def cross_entropy(logits, text, smoothing):
    """Return the cross-entropy [B, T] in float64."""
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = (1 - smoothing) * np.eye(tiny.VOCAB)[text] + smoothing / tiny.VOCAB
    return -(target * log_p).sum(-1)


def mean_over(values, text, average):
    captions = [row[t != 0] for row, t in zip(values, text, strict=True)]
    return (
        np.mean([c.mean() for c in captions])
        if average == "example"
        else np.mean(np.concatenate(captions))
    )


@pytest.mark.parametrize(("train", "average"), [(True, "token"), (False, "example")])
def test_loss_is_its_formula(split, kind, train, average):
    images, text = tiny.images(4), tiny.texts([7, 4, 2, 1])
    mask = np.array([True, True, False, True])
    options = with_options(split, kind, average=average, label_smoothing=0.1)
    batch = {"image": images, "text": text, "mask": mask}
    loss, metrics = loss_of(options, train)(batch, KEY)
    logits, text = predicted(split, images, text)[mask], text[mask]
    nll = cross_entropy(logits, text, 0.1 if train else 0.0)
    expected = mean_over(nll, text, average)
    if train and kind == "attention":
        expected += 0.5 * float(metrics["penalty"])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert metrics["loss_weight"] == ((text != 0).sum() if average == "token" else 3)
    right = mean_over(logits.argmax(-1) == text, text, average)
    assert metrics["token_accuracy"] == pytest.approx(right)
    assert ("penalty" in metrics) == (kind == "attention")


def test_what_follows_the_end_and_what_is_given_do_not_count():
    split = random("attention")
    images, text = tiny.images(3), tiny.texts([5, 4, 2])
    loss = loss_of(split, False)
    whole, metrics = loss({"image": images, "text": text}, KEY)
    short, short_metrics = loss({"image": images, "text": text[:, :5]}, KEY)
    assert whole == pytest.approx(float(short), rel=1e-6)
    for name, value in short_metrics.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-6)
    prompt = np.array([2, 0, 1], np.int32)
    given, _ = loss({"image": images, "text": text, "prompt": prompt}, KEY)
    nll = cross_entropy(predicted(split, images, text), text, 0.0)
    counts = (text != 0) & (np.arange(tiny.LENGTH) >= prompt[:, None])
    assert given == pytest.approx(nll[counts].mean(), rel=1e-5)


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    graphdef, params, stats = random("attention")
    batch = {"image": tiny.images(4), "text": tiny.texts([7, 1, 4, 2])}
    parts = [
        jax.jit(accumulated_gradients, static_argnums=(0, 5))(
            graphdef, params, stats, batch, KEY, parts
        )
        for parts in (1, 2)
    ]
    (whole, metrics, _), (added, added_metrics, _) = jax.device_get(parts)
    for name in ("loss", "penalty", "token_accuracy"):
        assert added_metrics[name] == pytest.approx(metrics[name], rel=1e-5)
    for a, b in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_penalty_of_known_weights():
    # Four parts: each attended to for one word in total; only one part; only one word counts.
    even, one = np.eye(4), np.eye(4)[[0] * 4]
    weights = jnp.asarray(np.stack([even, one, one]))
    learned = np.ones((3, 4), bool)
    learned[2, 1:] = False
    np.testing.assert_allclose(attention_penalty(weights, learned, "sum"), [0, 9 + 3, 3])
    np.testing.assert_allclose(attention_penalty(weights, learned, "mean"), [0, 3, 0.75])


def test_the_penalty_is_that_of_the_weights_and_weighs_as_told():
    images, text = tiny.images(3), tiny.texts([7, 4, 2])
    batch = {"image": images, "text": text}
    split = random("attention")
    attend = tiny.jitted(split, lambda learner, *args: learner.attend(*args))
    weights = np.asarray(attend(images, text))
    assert weights.shape == (3, tiny.LENGTH, 16)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    seen = (weights * (text != 0)[..., None]).sum(1)
    expected = (((1 - seen) ** 2).mean(1) * (text != 0).sum(1)).sum() / (text != 0).sum()
    options = with_options(split, "attention", penalty_scale="sum", penalty=2.0)
    loss, metrics = loss_of(options, True)(batch, KEY)
    without, _ = loss_of(split, False)(batch, KEY)
    assert metrics["penalty"] == pytest.approx(16 * expected, rel=1e-4)
    assert loss - without == pytest.approx(2 * 16 * expected, rel=1e-4)


def test_gradients_reach_the_image(split):
    encoded = tiny.jitted(split, lambda learner, *args: learner.image_features(*args))(
        tiny.images(2)
    )

    def likelihood(learner, *args):
        return jnp.sum(learner.compare(*args))

    gradient = jax.jit(jax.grad(tiny.jitted(split, likelihood)))(encoded, tiny.texts([5, 1]))
    assert (np.abs(gradient).max(-1) > 1e-5).all()  # for every part


# Decoding


@pytest.fixture(scope="module")
def captions(split):
    """Function (images, beams, eos, length) -> captions; greedy if beams is None."""

    def decode(learner, images, beams, eos, length):
        spec = CaptionSpec(batch=len(images), length=length, start=0, eos=eos)
        if beams is None:
            return greedy(learner.decode_step, learner.init_decoding(images), spec)
        cache = learner.init_decoding(images, beams)
        return beam_search(learner.decode_step, cache, spec, beams=beams)

    jitted = tiny.jitted(split, decode, static_argnums=(2, 4))
    return lambda images, beams=None, eos=-1, length=tiny.LENGTH: np.asarray(
        jitted(images, beams, eos, length)
    )


def test_cached_decoding_is_the_argmax_of_teacher_forcing(split, captions):
    images = tiny.images(4)
    found = captions(images)
    logits = predicted(split, images, found)
    first, second = np.sort(logits, axis=-1)[..., :-3:-1].T
    sure = (first - second).T > 1e-4  # rounding must not decide
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(found[sure], logits.argmax(-1)[sure])


def test_beam_search_finds_the_best_of_all_captions(kind):
    vocab, length = 4, 4
    split = random(kind, vocab=vocab)
    words = [token for token in range(vocab) if token != EOS]
    # Padding is a word here; tokens after the end are not read.
    texts = [
        (*some, EOS) for n in range(length) for some in itertools.product(words, repeat=n)
    ] + list(itertools.product(words, repeat=length))
    assert len(texts) == 121
    rows = np.array([(*text, *[EOS] * (length - len(text))) for text in texts])
    images = tiny.images(3)

    def every(learner, images):
        encoded = learner.image_features(images)
        return learner.predict(encoded, jnp.tile(rows, (len(images), 1)))

    log_p = jax.nn.log_softmax(tiny.jitted(split, every)(images)).reshape(3, 121, length, vocab)
    log_p = np.take_along_axis(np.asarray(log_p), rows[None, :, :, None], axis=-1)[..., 0]
    lengths = np.array([len(text) for text in texts])
    scores = (log_p * (np.arange(length) < lengths[:, None])).sum(-1) / lengths

    def search(learner, images):
        spec = CaptionSpec(batch=len(images), length=length, start=0, eos=EOS)
        return beam_search(learner.decode_step, learner.init_decoding(images, 121), spec, beams=121)

    found = np.asarray(tiny.jitted(split, search)(images))
    for row, own in zip(found, scores, strict=True):
        best = texts[int(np.argmax(own))]
        assert row.tolist() == [*best, *[0] * (length - len(best))]


def test_scores_are_those_of_each_text_alone(split):
    images, text = tiny.images(3), tiny.texts([1, 3, 7, 5, 2, 6]).reshape(3, 2, -1)
    scores = tiny.jitted(split, lambda learner, *args: learner.score(*args))(images, text)
    for c in range(2):
        nll = cross_entropy(predicted(split, images, text[:, c]), text[:, c], 0.0)
        np.testing.assert_allclose(scores[:, c], -(nll * (text[:, c] != 0)).sum(1), rtol=1e-5)


# Scheduled sampling


@pytest.fixture(scope="module")
def sampled(split):
    """Function (images, inputs, rates, key) -> sampled inputs; the decoder is always certain."""
    graphdef, params, stats = split
    logits = jax.tree.map(lambda p: 1e4 * p, params["decoder"]["logits"])
    sure = graphdef, {**params, "decoder": {**params["decoder"], "logits": logits}}, stats

    def sample(learner, images, inputs, rates, key):
        encoded = learner.image_features(images)
        return sampled_inputs(learner.decoder, encoded, inputs, rates, key)

    return tiny.jitted(sure, sample)


def test_scheduled_sampling_reads_the_caption_or_what_greedy_decoding_would(sampled, captions):
    images, inputs = tiny.images(4), np.pad(tiny.texts([6] * 4)[:, :6], ((0, 0), (1, 0)))
    ones = np.ones(inputs.shape, np.float32)
    np.testing.assert_array_equal(sampled(images, inputs, 0 * ones, KEY), inputs)
    read = np.asarray(sampled(images, inputs, ones, KEY))
    np.testing.assert_array_equal(read[:, 0], 0)
    np.testing.assert_array_equal(read[:, 1:], captions(images)[:, :-1])
    some = np.asarray(sampled(images, inputs, 0.5 * ones, KEY))
    assert 0.2 < np.mean(some[:, 1:] != inputs[:, 1:]) < 0.8


def test_scheduled_sampling_is_of_training_alone():
    split = random("gru")
    batch = {"image": tiny.images(4), "text": tiny.texts([7] * 4)}
    scheduled = with_options(split, "gru", scheduled_sampling=0.5)
    plain, _ = loss_of(split, True)(batch, KEY)
    one, other = (loss_of(scheduled, True)(batch, jax.random.key(n))[0] for n in (0, 1))
    assert len({float(plain), float(one), float(other)}) == 3
    assert loss_of(scheduled, False)(batch, KEY)[0] == pytest.approx(float(plain), rel=1e-6)


def test_scheduled_sampling_leaves_the_words_of_a_prompt():
    split = with_options(random("gru"), "gru", scheduled_sampling=1.0)
    batch = {"image": tiny.images(4), "text": tiny.texts([7] * 4)}
    all_but_one = batch | {"prompt": np.full(4, 6, np.int32)}
    # The predicted words and all words read before them are as without sampling.
    plain, _ = loss_of(random("gru"), True)(all_but_one, KEY)
    assert loss_of(split, True)(all_but_one, KEY)[0] == pytest.approx(float(plain), rel=1e-6)
    assert loss_of(split, True)(batch, KEY)[0] != loss_of(random("gru"), True)(batch, KEY)[0]


# Training and decoding


@pytest.mark.parametrize(
    "kind", ["lstm", "gru", "merge", pytest.param("attention", marks=pytest.mark.slow)]
)
def test_overfits_and_greedy_decoding_returns_the_captions(kind):
    images, text = tiny.images(6), tiny.texts([6, 3, 5, 2, 6, 4], seed=4)
    text = np.where(text == EOS, 2, text)
    text = np.where(np.arange(tiny.LENGTH) == (text != 0).sum(1)[:, None] - 1, EOS, text)
    graphdef, params, stats = random(kind, hidden=32, penalty=0.0)
    tx = optax.adam(1e-2)

    def loss(decoder, key):
        learner = nnx.merge(graphdef, {**params, "decoder": decoder}, stats)
        return learner.loss({"image": images, "text": text}, key, train=True)[0]

    @jax.jit
    def train(decoder):
        def step(carry, key):
            decoder, state = carry
            value, gradient = jax.value_and_grad(loss)(decoder, key)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(decoder, updates), state), value

        keys = jax.random.split(KEY, 150)
        (decoder, _), losses = jax.lax.scan(step, (decoder, tx.init(decoder)), keys)
        return decoder, losses

    decoder, losses = train(params["decoder"])
    assert losses[0] > 1 and losses[-1] < 0.02

    def write(learner, images):
        spec = CaptionSpec(batch=len(images), length=tiny.LENGTH, start=0, eos=EOS)
        return greedy(learner.decode_step, learner.init_decoding(images), spec)

    found = tiny.jitted((graphdef, {**params, "decoder": decoder}, stats), write)(images)
    np.testing.assert_array_equal(found, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 1.0}, "learner.penalty: 1.0 is invalid for decoder='lstm'"),
        ({"decoder": "attention", "penalty": -1.0}, "learner.penalty: -1.0"),
        ({"penalty_scale": "max"}, "learner.penalty_scale: 'max' is neither 'mean' nor 'sum'"),
        ({"average": "word"}, "learner.average: 'word' is neither 'token' nor 'example'"),
        ({"label_smoothing": 1.0}, "learner.label_smoothing: 1.0"),
        ({"scheduled_sampling": 1.5}, "learner.scheduled_sampling: 1.5"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Recurrent.Options(**options)


def test_without_attention_there_is_nothing_to_look_at():
    split = random("gru")
    attend = tiny.jitted(split, lambda learner, *args: learner.attend(*args))
    with pytest.raises(UserError, match="learner.decoder: decoder='gru' has no attention"):
        attend(tiny.images(1), tiny.texts([3]))
