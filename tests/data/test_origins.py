"""Captions of several origins: their shares over a run, prefixes and lengths, on any host."""

import numpy as np
import pytest

from cap_pretrain import inputs
from cap_pretrain.data.origins import Origins
from cap_pretrain.data.pipeline import train_dataset
from cap_pretrain.data.sources.base import mixed, parse_captions
from cap_pretrain.data.text.tokenizers import NoText, encode_answer
from cap_pretrain.data.weights import Weight, never
from cap_pretrain.errors import UserError
from cap_pretrain.training import feed
from cap_pretrain.validation import validate
from tests import toy
from tests.data.numbers import SIZE, Numbers, assert_same

STEPS, BATCH = 60, 16
SCHEDULE = "alt:1@0,0@0.5+short:1+long:0@0.5,3@1"
PREFIXES, LENGTHS = ("1:", "2:", ""), (0, 0, 4)


class Captioned(Numbers):
    """Two alt texts, a short and a long caption of each number; every fifth has alt texts only."""

    def __getitem__(self, i):
        found = [["a", "b"], ["c"], ["a a a a a a"]]
        weights = [weight for _, weight in parse_captions(SCHEDULE)]
        if i % 5 == 0:
            found[1:] = [], []
        return super().__getitem__(i) | mixed(found, weights)


def config(**fields):
    named = dict(data__fields__captions=SCHEDULE, data__caption_prefixes=PREFIXES)
    return toy.config(batch_size=BATCH, **named | dict(data__caption_lengths=LENGTHS) | fields)


@pytest.mark.parametrize("seed", range(20))
def test_points_are_read_as_written_and_joined_by_lines(seed):
    rng = np.random.default_rng(seed)
    shares = np.unique(np.round(rng.random(rng.integers(1, 6)), rng.integers(1, 4)))
    points = [(float(s), float(rng.choice([0, 1, rng.exponential()]))) for s in shares]
    weight = Weight.parse(",".join(f"{w}@{s}" for s, w in points), "field")
    assert list(weight.points) == points
    for share in (0.0, 1.0, *rng.random(5)):
        assert weight.then(share) == np.interp(share, *zip(*points, strict=True))
    assert weight.last == weight.then(1.0) and weight.ever == any(w for _, w in points)
    assert Weight.parse(str(points[0][1]), "field").constant
    zero = never([weight])
    assert weight.then(zero) == 0 if zero is not None else all(w for _, w in points)


def test_any_text_is_a_weight_or_refused():
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(rng.choice(list("0015@@,,.-ein ")) for _ in range(rng.integers(0, 12)))
        try:
            weight = Weight.parse(text, "field")
        except UserError:
            continue
        assert 0 <= weight.then(0.3) < np.inf


def test_features_have_weights_and_names_may_have_colons():
    found = parse_captions("a:1@0,0@0.5+b/c:2+d:e+f")
    assert [name for name, _ in found] == ["a", "b/c", "d:e", "f"]
    assert [weight.then(0.25) for _, weight in found] == [0.5, 2, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1@0,0@0.5", "all weights are 0 at 0.5 of the run"),
        ("a:0@0,1@1+b:1@0,0@0.5,0@1", "all weights are 0"),
        ("a:1@0.5,0@0.2+b", "increase from 0 to 1"),
        ("a:-1@0+b", "negative"),
        (":1@0,2@1", "a name is empty"),
        ("a+", "a name is empty"),
        ("a:0+b", "must be > 0"),
    ],
)
def test_invalid_weights_are_refused(text, message):
    if text.startswith("a:0@0,1@1+b"):
        assert parse_captions(text)  # one rises while the other falls
        return
    with pytest.raises(UserError, match=f"data.fields.captions.*{message}"):
        parse_captions(text)


def test_origins_follow_the_schedule_whatever_else_is_in_the_batch(tokenizer):
    """The expected counts follow from the weights at the row; alt texts are two captions."""
    c = config()
    origins = Origins.of(c.data, STEPS * BATCH)
    whole = train_dataset(
        [(Captioned(40), 1.0)],
        tokenizer,
        feed.pipeline.ImageOptions(SIZE),
        batch_size=BATCH,
        seed=3,
        origins=origins,
    )
    batches = [whole[t] for t in range(STEPS)]
    seen = {
        encode_answer(tokenizer, prefix, text, limit)[0].tobytes(): origin
        for origin, (prefix, limit, texts) in enumerate(
            [("1:", 0, ("a", "b")), ("2:", 0, ("c",)), ("", 4, ("a a a a a a",))]
        )
        for text in texts
    }
    drawn, expected, shown = np.zeros((4, 3)), np.zeros((4, 3)), []
    for t, batch in enumerate(batches):
        for row in range(BATCH):
            origin = seen[batch["text"][row].tobytes()]
            shown.append(batch["text"][row])
            share = (t * BATCH + row) / (STEPS * BATCH)
            weights = (
                np.interp(share, [0, 0.5, 1], [1, 0, 0]),
                1,
                np.interp(share, [0.5, 1], [0, 3]),
            )
            if batch["index"][row] % 5 == 0:
                assert origin == 0  # also when its weight is 0
            else:
                drawn[t * 4 // STEPS, origin] += 1
                expected[t * 4 // STEPS] += np.array(weights) / sum(weights)
    assert (drawn[2:, 0] == 0).all() and (drawn[:2, 2] == 0).all()
    assert np.abs(drawn - expected).max() < 4 * np.sqrt(BATCH * STEPS / 4 / 4)
    assert drawn[0, 0] > drawn[1, 0] > 0 and drawn[3, 2] > drawn[2, 2] > 0
    long = next(row for row in shown if seen[row.tobytes()] == 2)
    assert np.sum(long != 0) == 4 and long[3] == tokenizer.eos_id
    prompts = {
        seen[b["text"][r].tobytes()]: int(b["prompt"][r]) for b in batches for r in range(BATCH)
    }
    assert prompts[0] > 0 and prompts[1] > 0 and prompts[2] == 0


def test_a_resumed_run_and_every_host_draw_the_same(tokenizer):
    c = config(total_steps=6, data__image_size=SIZE)
    mixture = feed.in_buckets(c, [(Captioned(40), 1.0)], tokenizer)

    def read(rows, steps):
        batches = feed.prepared_batches(c, mixture, tokenizer, rows, steps)
        try:
            return list(batches)
        finally:
            batches.close()

    whole = read(np.arange(BATCH), range(6))
    halves = [read(rows, range(3, 6)) for rows in np.arange(BATCH).reshape(2, -1)]
    for expected, *parts in zip(whole[3:], *halves, strict=True):
        joined = {name: np.concatenate([part[name] for part in parts]) for name in expected}
        assert_same(joined, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__caption_prefixes": ("a",)}, r"caption_prefixes: \('a',\) is not a tuple of 3"),
        ({"data__caption_prefixes": ("a", "b", 1)}, "caption_prefixes: .* is not a tuple of 3"),
        ({"data__caption_lengths": (0, 1, 2)}, "caption_lengths: .* give at least 2"),
        ({"data__buckets": True}, "buckets: captions grouped by length have no origins"),
        ({"data__fields__captions": "a:1@2+b"}, "fields.captions.* increase from 0 to 1"),
    ],
)
def test_invalid_fields_are_refused(fields, message):
    with pytest.raises(UserError, match=f"data.{message}"):
        validate(config(**fields))


def test_without_changes_captions_are_drawn_as_ever():
    c = config(data__caption_prefixes=(), data__caption_lengths=())
    c.data.fields.captions = "a:2+b"
    assert Origins.of(c.data) is None


def test_prefixes_that_the_tokenizer_confuses_are_refused(tokenizer):
    origins = Origins.of(config(data__caption_prefixes=("a", "%", "#")).data)
    with pytest.raises(UserError, match="caption_prefixes: the tokenizer gives '%' and '#' the"):
        origins.check(tokenizer)
    with pytest.raises(UserError, match="the same tokens"):
        origins.check(NoText())


def test_a_new_tokenizer_knows_the_prefixes(tmp_path):
    c = config(data__fields__captions="captions", data__caption_lengths=())
    c.data.caption_prefixes = ("qqq zzz",)
    c.text.kind = "words"
    tokenizer = inputs.prepare_tokenizer(c, inputs.open_sources(c), tmp_path, anew=True)
    assert tokenizer.decode(tokenizer.encode("qqq zzz")) == "qqq zzz"
