"""Batches of one caption length are functions of the step number, without repeated pairs."""

import collections
import contextlib

import numpy as np
import pytest

from cap_pretrain import inputs, train
from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.sources import buckets
from cap_pretrain.data.text.words import Rules, WordTokenizer, write_words
from cap_pretrain.errors import UserError
from cap_pretrain.training import feed
from cap_pretrain.validation import validate
from tests import toy
from tests.data.numbers import rows_of_host

SIZE, BATCH, MAX = 8, 4, 9
WORDS = ["a", "red", "star", "next", "to", "some", "very", "large", "blue", "circle", "on", "green"]
# Length, EOS included -> number of captions; longer captions are truncated to 9.
COUNTS = {2: 3, 3: 21, 4: 40, 6: 10, 9: 14}


class Captioned:
    """Example i has gray value i and captions of various lengths."""

    class_names: list[str] = []

    def __init__(self, broken=(), of_one=0):
        lengths = [
            n - 1 + (n == MAX) * (k % 3) for n, count in COUNTS.items() for k in range(count)
        ]
        lengths = np.random.default_rng(0).permutation([of_one] * 40 if of_one else lengths)
        parts = np.array_split(lengths, 25)
        self._captions = [[self._caption(i, n) for n in part] for i, part in enumerate(parts)]
        self._broken = broken

    @staticmethod
    def _caption(i, length):
        words = np.random.default_rng([i, length]).choice(WORDS, length, replace=False)
        return " ".join(words)

    def __len__(self):
        return len(self._captions) + 1  # the last one has no captions

    def __getitem__(self, i):
        image = np.full((SIZE, SIZE, 3), i, np.uint8)
        captions = self._captions[i] if i < len(self._captions) else []
        return {
            "image": b"no image" if i in self._broken else image,
            "captions": captions,
            "label": i,
            "id": str(i),
        }

    def __str__(self):
        return "dataset 'captioned'"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = write_words([" ".join(WORDS)], tmp_path_factory.mktemp("words"), Rules())
    return WordTokenizer(path, MAX)


@pytest.fixture
def build(tokenizer):
    def build(source=None, seed=1, batch=BATCH, flip=False, **options):
        groups = buckets.by_length(source or Captioned(), tokenizer)
        return train_dataset(
            [(group, 1.0) for group in groups],
            tokenizer,
            ImageOptions(SIZE, flip=flip),
            batch_size=batch,
            seed=seed,
            order=buckets.Order(groups, batch, seed),
            **options,
        )

    return build


BATCHES = sum(n // BATCH for n in COUNTS.values())  # in an epoch


def lengths(batch):
    return (batch["text"] != 0).sum(axis=1)


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_captions_are_grouped_by_their_tokens(tokenizer):
    groups = buckets.by_length(Captioned(), tokenizer)
    assert {group.length: len(group) for group in groups} == COUNTS
    for group in groups:
        for example in (group[0], group[len(group) - 1]):
            (caption,) = example["captions"]
            assert np.count_nonzero(tokenizer.encode(caption)) == group.length
            assert caption in Captioned()[example["label"]]["captions"]
    with pytest.raises(IndexError):
        groups[0][len(groups[0])]


def test_every_batch_has_one_length_and_an_epoch_no_pair_twice(build):
    dataset = build()
    epochs = [[dataset[e * BATCHES + b] for b in range(BATCHES)] for e in range(4)]
    for epoch in epochs:
        assert all(len(set(lengths(batch))) == 1 for batch in epoch)
        seen = np.concatenate([batch["index"] for batch in epoch])
        assert len(set(seen)) == len(seen) == BATCHES * BATCH
        # Lengths occur in proportion to their frequency; rare ones never do.
        drawn = collections.Counter(int(lengths(batch)[0]) for batch in epoch)
        assert drawn == {n: count // BATCH for n, count in COUNTS.items() if count >= BATCH}
    # Epochs differ in the captions left out, in the batches and in their order.
    left_out = {frozenset(range(88)) - set(np.concatenate([b["index"] for b in e])) for e in epochs}
    assert len(left_out) == 4 and set.intersection(*map(set, left_out)) == {0, 1, 2}
    assert len({tuple(int(lengths(batch)[0]) for batch in epoch) for epoch in epochs}) == 4
    again = {frozenset(b["index"]) for b in epochs[0]} & {frozenset(b["index"]) for b in epochs[1]}
    assert len(again) < 3


def test_rows_hold_the_pair_they_name(build, tokenizer):
    groups = buckets.by_length(Captioned(), tokenizer)
    pairs = [example for group in groups for example in (group[k] for k in range(len(group)))]
    batch = build()[5]
    for row, index in enumerate(batch["index"]):
        assert tokenizer.decode(batch["text"][row]) == pairs[index]["captions"][0]
        assert batch["image"][row, 0, 0, 0] == batch["label"][row] == pairs[index]["label"]


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_slices_of_the_hosts_make_up_the_batch(build, hosts):
    dataset, slices = (
        build(flip=True),
        [build(flip=True, rows=rows_of_host(h, hosts, BATCH)) for h in range(hosts)],
    )
    for t in (0, 13, 1000):
        parts = [part[t] for part in slices]
        assert_same({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, dataset[t])


@pytest.mark.parametrize("workers", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_any_start_and_any_workers_give_the_same(build, workers):
    dataset = build()
    start = BATCHES - 3  # across the end of an epoch
    with contextlib.closing(iterate(build(), start, start + 6, workers=workers)) as batches:
        got = list(batches)
    assert len(got) == 6
    for t, batch in enumerate(got, start):
        assert_same(batch, dataset[t])


def test_seeds_give_other_orders(build):
    orders = {
        tuple(np.concatenate([build(seed=s)[t]["index"] for t in range(5)])) for s in range(4)
    }
    assert len(orders) == 4


def test_a_pair_of_the_same_length_stands_in_for_a_broken_image(build):
    dataset = build(Captioned(broken=range(0, 25, 2)))
    batches = [dataset[t] for t in range(BATCHES)]
    assert all(len(set(lengths(batch))) == 1 for batch in batches)
    broken = np.concatenate([batch["broken"] for batch in batches])
    images = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    assert 0.2 < broken.mean() < 0.8 and (images % 2 == 1).all()


def test_describe_counts_what_is_left_out(tokenizer):
    groups = buckets.by_length(Captioned(), tokenizer)
    assert buckets.describe(groups, BATCH) == (
        "Batches of one length: 88 captions of 2 to 9 tokens; an epoch has 20 batches and leaves "
        "out 8 captions, different ones each time; too few to fill a batch, tokens (captions): "
        "2 (3)."
    )


def test_too_large_batches_raise(build):
    assert build(Captioned(of_one=4), batch=40)[3]["index"].shape == (40,)
    with pytest.raises(UserError, match="no length has 41 captions.*most frequent one has 40"):
        build(Captioned(of_one=4), batch=41)


def test_epochs_are_of_captions(tmp_path):
    c = toy.config(data__buckets=True, text__kind="words", total_steps=0, total_epochs=3.0)
    c.data.scenes.length_train = 60
    mixture = inputs.open_sources(c)
    tokenizer = inputs.prepare_tokenizer(c, mixture, tmp_path, anew=True)
    members = feed.in_buckets(c, mixture, tokenizer)
    epoch = feed.examples_an_epoch(c, members)
    assert 200 < epoch <= 60 * 5 and epoch % c.batch_size == 0
    assert f"has {epoch // c.batch_size} batches" in feed.describe(c, members)[0]
    seen = [feed.training_batches(c, members, tokenizer)[t]["index"] for t in range(epoch // 8)]
    assert len(set(np.concatenate(seen))) == epoch
    assert f"training, {3 * epoch // 8} steps" in train.dry_run(c, tmp_path / "plan")


@pytest.mark.parametrize(
    ("learner", "data", "message"),
    [("captioner", "scenes+other", "not with the mixture"), ("classifier", "scenes", "classifier")],
)
def test_data_without_batches_of_one_length_raises(learner, data, message):
    c = toy.config(learner, data__buckets=True, data__name=data)
    with pytest.raises(UserError, match=message):
        validate(c)
