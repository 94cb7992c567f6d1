"""LocCa: its texts, its loss as that of three captioners, and the boxes that it writes."""

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.learners.locca import LocCa
from cap_pretrain.learners.protocols import Locates, WritesCaptions
from cap_pretrain.models import decoding
from cap_pretrain.training import plan
from tests import tiny, toy
from tests.layouts import SMALL, Training, on_eight_devices
from tests.learners.test_captioner import KEY, log_softmax

BINS, LENGTH, EOS = 9, 10, 1
WORDS = tiny.VOCAB
AREF, GCAP = WORDS + BINS, WORDS + BINS + 1
# Words of two phrases of each image; the third image has one region, the fourth has none.
PHRASES = [
    [[5, 6], [7]],
    [[8, 9, 10, 11, 12, 13, 14, 15], [4, 4, 4, 4, 4]],
    [[3, 2, 9], []],
    [[], []],
]
BOXES = np.array(
    [
        [[0, 0.25, 0.5, 1], [0.1, 0.2, 0.3, 0.4]],
        [[0.9, 0, 1, 0.01], [0.062, 0.0630, 0.9, 0.95]],
        [[0, 0, 1, 1], [0] * 4],
        [[0] * 4] * 2,
    ],
    np.float32,
)
PARALLEL = dict(parallel_fraction=1.0)


def padded(ids):
    return ids + [0] * (LENGTH - len(ids))


def expected_text(words, box, task):
    """The text of a region, composed in Python."""
    if not words:
        return padded([])
    words = words[: LENGTH - 5]
    sides = [WORDS + int(np.floor(side * (BINS - 1) + 0.5)) for side in box]
    return padded((words + sides if task == "aref" else sides + words) + [EOS])


@pytest.fixture(scope="module")
def batch():
    text = np.random.default_rng(0).integers(2, WORDS, (4, LENGTH), np.int32)
    text = np.where(np.arange(LENGTH) < np.array([[10], [4], [7], [3]]), text, 0)
    phrases = [
        [padded([*words[: LENGTH - 1], EOS] if words else []) for words in p] for p in PHRASES
    ]
    return {
        "image": tiny.images(4),
        "text": text,
        "phrases": np.array(phrases, np.int32),
        "boxes": BOXES,
    }


@pytest.fixture(scope="module")
def locca():
    return made()


def config(learner="locca", **options):
    c = tiny.config(learner, options, depth=1, decoder_depth=1)
    c.text.length = LENGTH
    return c


def made(**options):
    return tiny.split(config(**{"bins": BINS, **options}))


def loss_with(variables, train, learner="locca", vocab=WORDS, **options):
    """Function (batch, key) -> loss, metrics, of a learner with these variables and options."""
    options = options if learner == "captioner" else {"bins": BINS, **options}
    graphdef, _, _ = tiny.abstract(config(learner, **options), vocab)
    return tiny.jitted((graphdef, *variables), lambda learner, *args: learner.loss(*args, train))


@pytest.fixture(scope="module")
def nll_of(locca, batch):
    """Function (texts [n, T], image, start, parallel) -> their tokens' losses, from the logits."""

    def logits(learner, images, text, start, parallel):
        encoded = learner.encode(images).tokens
        return learner.predict(encoded, text, parallel, start=start)

    forward = tiny.jitted(locca, logits)

    def nll(text, image, start, parallel=False):
        text, one = np.array([text], np.int32), batch["image"][image : image + 1]
        found = forward(one, text, np.array([start]), np.array([parallel]))
        return -log_softmax(np.asarray(found)[0])[np.arange(LENGTH), text[0]]

    return nll


def mean_nll(nll_of, text, image, start, *, given=0, parallel=False):
    counted = (np.array(text) != 0) & (np.arange(LENGTH) >= given)
    return nll_of(text, image, start, parallel)[counted].mean()


def test_texts_hold_phrase_and_box_in_both_orders(locca, batch):
    texts = tiny.jitted(locca, lambda learner, *args: learner.region_texts(*args))
    found = texts(batch["phrases"], batch["boxes"])
    for task, start in (("aref", AREF), ("gcap", GCAP)):
        wanted = [
            [expected_text(words, box, task) for words, box in zip(*own, strict=True)]
            for own in zip(PHRASES, BOXES, strict=True)
        ]
        assert np.array_equal(found[task].text, wanted)
        assert not found[task].prompt.any() and found[task].start == start


@pytest.mark.parametrize("bins", [2, 9, 501])
def test_coordinates_come_back_within_half_a_step(bins):
    learner = nnx.merge(*made(bins=bins))
    boxes = np.random.default_rng(1).random((500, 4))
    tokens = learner.coordinates(boxes)
    assert tokens.min() >= WORDS and tokens.max() < WORDS + bins
    assert np.abs(learner.boxes(tokens) - boxes).max() <= 0.5 / (bins - 1) + 1e-6
    assert np.array_equal(learner.coordinates(learner.boxes(tokens)), tokens)
    beyond = np.array([-3, 0, 1, 7.0])
    assert np.array_equal(learner.boxes(learner.coordinates(beyond)), [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("train", "options"),
    [
        (False, {}),
        pytest.param(True, PARALLEL, marks=pytest.mark.slow),
        (True, PARALLEL | dict(conditional=True, aref_weight=2.0, gcap_weight=0.5)),
        pytest.param(
            True, dict(cap_weight=0.0, gcap_weight=0.0, conditional=True), marks=pytest.mark.slow
        ),
        pytest.param(False, dict(average="token", aref_weight=2.0), marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_the_mean_of_three_captioners(locca, batch, nll_of, train, options):
    loss, metrics = loss_with(locca[1:], train, **options)(batch, KEY)
    given = options.get("conditional", False)
    by_task = {"cap": [], "aref": [], "gcap": []}
    tokens, images = [], []
    for i in range(4):
        parallel = bool(train and options.get("parallel_fraction"))
        text = batch["text"][i].tolist()
        found = {"cap": [(text, 0, 0, parallel)], "aref": [], "gcap": []}
        for words, box in zip(PHRASES[i], BOXES[i], strict=True):
            if words:
                n = min(len(words), LENGTH - 5)
                own = [expected_text(words, box, task) for task in ("aref", "gcap")]
                found["aref"].append((own[0], AREF, n * given, False))
                found["gcap"].append((own[1], GCAP, 4 * given, False))
        total = weights = 0.0
        for task, rows in found.items():
            weight = options.get(f"{task}_weight", 1.0)
            losses = [
                mean_nll(nll_of, own, i, start, given=given, parallel=p)
                for own, start, given, p in rows
            ]
            tokens += [
                (weight, one)
                for own, s, _, p in rows
                for one, t in zip(nll_of(own, i, s, p), own, strict=True)
                if t
            ]
            by_task[task] += losses
            if rows and weight:
                total, weights = total + weight * np.mean(losses), weights + weight
        images += [total / weights] if weights else []
    if options.get("average") == "token":
        wanted = np.average([nll for _, nll in tokens], weights=[w for w, _ in tokens])
        assert metrics["loss_weight"] == pytest.approx(sum(w for w, _ in tokens))
    else:
        wanted = np.mean(images)
        assert metrics["loss_weight"] == len(images)
    assert loss == pytest.approx(wanted, rel=1e-5)
    for task, losses in by_task.items():
        if options.get(f"{task}_weight", 1.0):
            assert metrics[f"loss_{task}"] == pytest.approx(np.mean(losses), rel=1e-5)
            assert metrics[f"loss_{task}_weight"] == len(losses)
        else:
            assert f"loss_{task}" not in metrics


@pytest.mark.slow
def test_without_regions_it_is_a_captioner_bit_by_bit(locca, batch):
    options = dict(parallel_fraction=0.5, label_smoothing=0.1)
    captions = {name: batch[name] for name in ("image", "text")}
    both = dict(aref_weight=0.0, gcap_weight=0.0)
    only, metrics = loss_with(locca[1:], True, **options, **both)(batch, KEY)
    without, _ = loss_with(locca[1:], True, **options)(captions, KEY)
    plain = loss_with(locca[1:], True, "captioner", GCAP + 1, **options)
    loss, expected = plain(captions, KEY)
    assert loss == only == without
    assert expected.items() <= metrics.items()


def test_boxes_are_the_greedy_ones_after_the_phrase(locca, batch):
    phrases = batch["phrases"][[0, 1, 1, 2], [0, 0, 1, 0]]
    found = tiny.jitted(locca, lambda learner, *args: learner.locate(*args))(
        batch["image"], phrases
    )
    predict = tiny.jitted(
        locca,
        lambda learner, images, text: learner.predict(
            learner.encode(images).tokens, text, start=np.full(4, AREF)
        ),
    )
    n = np.minimum((phrases != 0).sum(1) - 1, LENGTH - 5)
    text = np.where(np.arange(LENGTH) < n[:, None], phrases, 0)
    for side in range(4):
        logits = np.asarray(predict(batch["image"], text))
        for i in range(4):
            text[i, n[i] + side] = WORDS + logits[i, n[i] + side, WORDS:AREF].argmax()
    sides = np.array([text[i, n[i] : n[i] + 4] for i in range(4)])
    assert np.allclose(found, (sides - WORDS) / (BINS - 1), atol=1e-6)
    assert len(np.unique(sides)) > 2


@pytest.mark.slow
def test_captions_have_no_coordinates(locca, batch):
    assert issubclass(LocCa, Locates) and issubclass(LocCa, WritesCaptions)
    graphdef, params, stats = locca
    params = jax.tree.map(lambda x: x, params)
    params["decoder"]["logits"]["bias"] = params["decoder"]["logits"]["bias"].at[WORDS:].add(50)
    written = tiny.jitted(
        (graphdef, params, stats),
        lambda learner, images: decoding.write_captions(
            learner, images, decoding.Decoding(method="greedy"), length=LENGTH, eos=EOS
        ),
    )(batch["image"])
    assert written.max() < WORDS and written.any()


def losses_on(layout, accumulate):
    """The losses of two steps on a mesh; only half of the images have regions."""
    fields = SMALL | {"batch_size": 16, "accumulate": accumulate, "data__regions": 2}
    training = Training(toy.config("locca", {"bins": BINS}, **fields), layout)
    return training.go_on(training.init(), 2)[1]


@pytest.mark.slow
def test_parts_of_a_batch_and_devices_do_not_matter():
    whole, parts = on_eight_devices(losses_on, [("one", 1), ("all", 4)])
    assert whole[0] != whole[1]
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_costs_grow_by_the_texts_of_regions():
    counted = []
    for regions in (1, 2, 3):
        c = toy.config("locca", batch_size=2, data__regions=regions, model__depth=1)
        counted.append(plan.flops_per_example(c, 100, ["forward"])["forward"])
    one, two, three = counted
    assert three - two == pytest.approx(two - one, rel=1e-3) and two > 1.2 * one


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"bins": 1}, LENGTH, "learner.bins"),
        ({"cap_weight": -1.0}, LENGTH, "must not be negative"),
        ({"cap_weight": 0.0, "aref_weight": 0.0, "gcap_weight": 0.0}, LENGTH, "or all 0"),
        ({}, 5, "text.length"),
    ],
)
def test_mistakes_are_found(options, length, message):
    c = tiny.config("locca")
    c.learner.update(options)
    c.text.length = length
    with pytest.raises(UserError, match=message):
        tiny.abstract(c)
