"""Batches are functions of the step number, whoever computes them, when and how."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys

import cv2
import grain
import numpy as np
import pytest

from cap_pretrain.data import pipeline
from cap_pretrain.data.pipeline import eval_batches, train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer, train_sentencepiece
from cap_pretrain.errors import UserError

SIZE = 8


class Numbers:
    """Example i is an image of grey value i (encoded when `files`), captioned and labelled i."""

    class_names: list[str] = []

    def __init__(self, count, offset=0, files=False, broken=(), captions=3):
        self._numbers = range(offset, offset + count)
        self._files = files
        self._broken = frozenset(broken)
        self._captions = captions

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, i):
        number = self._numbers[i]
        image = np.full((SIZE, SIZE, 3), number, np.uint8)
        if self._files:  # a gradient, so that crops differ, larger than asked for
            image = np.tile(np.linspace(0, number, 24).astype(np.uint8), (20, 1))
            image = cv2.imencode(".png", image)[1].tobytes()
        if i in self._broken:
            image = b"not an image"
        captions = [f"{number} {'abc'[k]}" for k in range(self._captions)]
        return {"image": image, "captions": captions, "label": number, "id": str(number)}

    def __str__(self):
        return "dataset 'numbers'"


class Unreadable(Numbers):
    def __getitem__(self, i):
        raise UserError("dataset 'numbers': record is damaged")


class Deadly(Numbers):
    """Ends any process that reads it as the kernel does when memory runs out."""

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{i} {c}" for i in range(256) for c in "abc"]
    model = train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=40)
    return SentencePieceTokenizer(model, max_len=8)


@pytest.fixture
def build(tokenizer):
    """Makes a training dataset of a mixture of two, with all augmentations, unless told else."""

    def build(sources=None, **options):
        if sources is None:
            sources = [(Numbers(30, files=True), 1.0), (Numbers(11, 100, files=True), 3.0)]
        options = {"batch_size": 8, "seed": 1, "crop": "random", "flip": True} | options
        return train_dataset(sources, tokenizer, image_size=SIZE, **options)

    return build


def indices(dataset, batches):
    return np.concatenate([dataset[t]["index"] for t in range(batches)]).tolist()


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        assert batch[name].dtype == other[name].dtype
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_a_batch_holds_what_it_says(build, tokenizer):
    batch = build([(Numbers(20, offset=5), 1.0)], crop="none", flip=False)[3]
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "image": ((8, SIZE, SIZE, 3), "uint8"),
        "text": ((8, 8), "int32"),
        "prompt": ((8,), "int32"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
        "broken": ((8,), "bool"),
    }
    np.testing.assert_array_equal(batch["label"], batch["index"] + 5)
    np.testing.assert_array_equal(batch["image"][:, 2, 3, 1], batch["label"])
    texts = [tokenizer.decode(row) for row in batch["text"]]
    assert [text.split()[0] for text in texts] == [str(number) for number in batch["label"]]
    assert not batch["broken"].any()


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": 3, "prefetch": 1}, {"prefetch": 9}]
)
def test_threads_and_prefetch_change_nothing(build, options):
    dataset = build()
    got = list(iterate(build(), 5, 17, **options))
    assert len(got) == 12
    for t, batch in zip(range(5, 17), got, strict=True):
        assert_same(batch, dataset[t])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(build, workers):
    dataset = build()
    with contextlib.closing(iterate(build(), 6, 11, workers=workers, prefetch=3)) as batches:
        for t, batch in zip(range(6, 11), batches, strict=True):
            assert_same(batch, dataset[t])
    assert not multiprocessing.active_children()


def share(host, hosts, batch_size=8):
    """The rows of a batch that a host reads where each has as many, one host's after another's."""
    each = batch_size // hosts
    return range(host * each, (host + 1) * each)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_rows_of_the_hosts_make_up_the_batch(build, hosts):
    dataset = build()
    parts = [build(rows=share(host, hosts)) for host in range(hosts)]
    for t in (0, 7, 100):
        batches = [part[t] for part in parts]
        assert_same({k: np.concatenate([b[k] for b in batches]) for k in batches[0]}, dataset[t])


@pytest.mark.parametrize("rows", [[0, 1, 4, 5], [2, 3, 6, 7], [5]])
def test_rows_may_be_here_and_there(build, rows):
    dataset, part = build(), build(rows=rows)
    for t in (0, 7, 100):
        assert_same(part[t], {k: v[rows] for k, v in dataset[t].items()})


def test_how_many_rows_are_loaded_together_does_not_show(build, monkeypatch):
    whole = build(batch_size=40)[3]
    monkeypatch.setattr(pipeline, "_GROUP", 7)
    assert_same(build(batch_size=40)[3], whole)


def test_random_numbers_are_those_of_grain(build):
    """So that runs go on which began when Grain drew them."""

    class Draw(grain.transforms.RandomMap):
        def random_map(self, element, rng):
            return rng.random(3)

    drawn = grain.MapDataset.range(10**6).random_map(Draw(), seed=7)
    rows = pipeline._TrainRows(
        [Numbers(3)], None, None, image_size=8, crop="none", flip=False, seed=7
    )
    for number in (0, 1, 999_999):
        assert (rows._rng(number).random(3) == drawn[number]).all()


def test_any_order_and_any_start_give_the_same(build):
    dataset = build()
    in_order = [dataset[t] for t in range(12)]
    for t in (11, 3, 7, 3, 0):
        assert_same(build()[t], in_order[t])
        assert_same(dataset[t], in_order[t])
    assert_same(next(iterate(build(), 9)), in_order[9])
    assert dataset[10**9]["index"].shape == (8,)  # no run is too long


def test_every_epoch_is_another_permutation(build):
    drawn = np.reshape(indices(build([(Numbers(24), 1.0)]), 3 * 5), (5, 24))
    for epoch in drawn:
        assert sorted(epoch) == list(range(24))
    assert len({tuple(epoch) for epoch in drawn}) == 5


def test_epochs_need_not_be_whole_batches(build):
    drawn = indices(build([(Numbers(10), 1.0)]), 5)
    assert [sorted(drawn[i : i + 10]) for i in (0, 10, 20, 30)] == [list(range(10))] * 4


def test_seeds_give_unrelated_orders(build):
    runs = [np.reshape(indices(build([(Numbers(24), 1.0)], seed=s), 12), (4, 24)) for s in range(4)]
    # Also not the same orders one epoch later.
    assert len({tuple(epoch) for run in runs for epoch in run}) == 16


def test_mixture_members_keep_their_weights_and_their_own_epochs(build):
    batches = list(iterate(build(crop="none"), 0, 100))
    drawn = np.concatenate([batch["index"] for batch in batches])
    large, small = drawn[drawn < 30], drawn[drawn >= 30] - 30
    assert len(large) == 200 and len(small) == 600
    for epoch in large[:180].reshape(6, 30):
        assert sorted(epoch) == list(range(30))
    for epoch in small[:594].reshape(54, 11):
        assert sorted(epoch) == list(range(11))
    # Evenly interleaved, not in runs.
    assert all(3 <= (row >= 30).sum() <= 7 for row in drawn.reshape(-1, 8)[:10])
    numbers = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(numbers, np.where(drawn < 30, drawn, drawn + 70))


def test_members_of_one_length_are_shuffled_apart(build):
    drawn = np.array(indices(build([(Numbers(16), 1.0), (Numbers(16, 50), 1.0)]), 4))
    assert (drawn[drawn < 16]).tolist() != (drawn[drawn >= 16] - 16).tolist()


def test_captions_are_drawn_anew_at_each_visit(build, tokenizer):
    def captions(dataset):
        rows = np.concatenate([dataset[t]["text"] for t in range(60)])
        return [tokenizer.decode(row) for row in rows]

    sources = [(Numbers(16), 1.0)]
    drawn = captions(build(sources))
    counts = [sum(text.endswith(c) for text in drawn) for c in "abc"]
    assert sum(counts) == 480 and min(counts) > 120
    assert len(set(drawn)) == 16 * 3
    # The augmentations have their own random numbers; another seed draws other captions.
    assert captions(build(sources, crop="none", flip=False)) == drawn
    assert captions(build(sources, seed=2)) != drawn


class Weighted(Numbers):
    """Captions a, b and c, the first as often as the others together; odd numbers have none."""

    def __getitem__(self, i):
        example = super().__getitem__(i)
        if i % 2:
            return example | {"captions": [], "weights": []}
        return example | {"weights": [2.0, 1.0, 1.0]}


def test_captions_are_drawn_by_their_weights(build, tokenizer):
    dataset = build([(Weighted(16), 1.0)])
    drawn = []
    for batch in map(dataset.__getitem__, range(60)):
        odd = batch["label"] % 2 == 1
        assert not batch["text"][odd].any()
        drawn += [tokenizer.decode(text)[-1] for text in batch["text"][~odd]]
    assert len(drawn) == 240 == sum(map(drawn.count, "abc"))
    assert 95 < drawn.count("a") < 145 and min(map(drawn.count, "bc")) > 40


def test_augmentations_differ_from_visit_to_visit(build):
    one = build([(Numbers(1, 200, files=True), 1.0)], batch_size=16)
    rows = one[0]["image"]
    assert len({row.tobytes() for row in rows}) > 12
    plain = build([(Numbers(1, 200, files=True), 1.0)], batch_size=16, crop="none", flip=False)
    assert len({row.tobytes() for row in plain[0]["image"]}) == 1
    flipped = build([(Numbers(1, 200, files=True), 1.0)], batch_size=16, crop="none")[0]["image"]
    rising = flipped[:, 0, -1, 0] > flipped[:, 0, 0, 0]
    assert 2 < rising.sum() < 14
    np.testing.assert_array_equal(flipped[rising][0], flipped[~rising][0][:, ::-1])


def test_images_without_captions_have_empty_text(build):
    batch = build([(Numbers(9, captions=0), 1.0)])[0]
    assert not batch["text"].any()
    assert set(batch["label"]) <= set(range(9))


class Asked(Numbers):
    """Captions of even numbers answer a question; nobody has answered that about number 4."""

    def __getitem__(self, i):
        example, number = super().__getitem__(i), self._numbers[i]
        if number % 2:
            return example
        captions = [] if number == 4 else example["captions"]
        return example | {"question": f"{number} b", "captions": captions}


def test_questions_come_before_their_answers(build, tokenizer):
    def check(row):
        number, prompt, text = int(row["label"]), int(row["prompt"]), row["text"]
        if number % 2:
            assert prompt == 0 and tokenizer.decode(text).split()[0] == str(number)
            return
        ids = tokenizer.encode(f"{number} b")
        assert prompt == min((ids != 0).sum() - 1, 4)
        np.testing.assert_array_equal(text[:prompt], ids[:prompt])
        if number == 4:
            assert not text[prompt:].any()
        else:
            assert any(
                text[prompt:].tolist() == tokenizer.encode(f"{number} {c}")[: 8 - prompt].tolist()
                for c in "abc"
            )

    # A mixture of captions and questions.
    dataset = build([(Numbers(9, offset=1), 1.0), (Asked(9), 2.0)], crop="none")
    batches = [dataset[t] for t in range(6)]
    asked = 0
    for batch in batches:
        for n in range(8):
            row = {key: values[n] for key, values in batch.items()}
            if row["index"] >= 9:
                check(row)
                asked += row["prompt"] > 0
            else:
                assert row["prompt"] == 0
    assert asked > 8
    (batch,) = eval_batches(Asked(9), tokenizer, image_size=SIZE, batch_size=10)
    for n in range(9):
        check({key: values[n] for key, values in batch.items()})
    assert batch["prompt"][9] == 0 and batch["prompt"].dtype == np.int32


def test_a_neighbour_stands_in_for_a_broken_image(build):
    # 11 has to look past 0, back at the beginning, for a whole one.
    source = Numbers(12, broken=(3, 4, 11, 0))
    options = {"batch_size": 12, "crop": "none", "flip": False}
    batch = build([(source, 1.0)], **options)[0]
    assert sorted(batch["index"]) == list(range(12))
    stands_in = {3: 5, 4: 5, 11: 1, 0: 1}
    for index, label, image, broken in zip(
        batch["index"], batch["label"], batch["image"], batch["broken"], strict=True
    ):
        assert broken == (index in stands_in)
        assert label == image[0, 0, 0] == stands_in.get(index, index)
    assert_same(build([(source, 1.0)], **options)[0], batch)


def test_all_images_broken_is_told(build):
    dataset = build([(Numbers(120, broken=range(120)), 1.0)])
    with pytest.raises(UserError, match="all images broken in dataset 'numbers'.*not an image"):
        next(iterate(dataset))
    assert build([(Numbers(120, broken=range(99)), 1.0)])[0]["broken"].any()


def test_user_errors_come_out_of_threads_and_workers_as_they_were(build):
    dataset = build([(Unreadable(50), 1.0)])
    for workers in (0, 1):
        batches = iterate(dataset, workers=workers)
        with pytest.raises(UserError) as raised:
            next(batches)
        assert str(raised.value) == "dataset 'numbers': record is damaged"
        batches.close()


def test_a_killed_worker_is_told(build):
    with contextlib.closing(iterate(build([(Deadly(50), 1.0)]), workers=1)) as batches:
        with pytest.raises(UserError, match="exit code -9.*shared memory"):
            next(batches)


_KILLED_WHILE_READING = """
import os, signal, sys
from cap_pretrain.data.pipeline import train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer
from tests.data.test_pipeline import Numbers

tokenizer = SentencePieceTokenizer(sys.argv[1])
dataset = train_dataset([(Numbers(30), 1.0)], tokenizer, image_size=8, batch_size=2, seed=0)
batches = iterate(dataset, workers=1)
next(batches)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_killed_parent(tokenizer):
    _, (model, *_) = tokenizer.__reduce__()
    command = [sys.executable, "-c", _KILLED_WHILE_READING, model]
    # Returns when every process that holds the pipe has ended.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=90)
    assert done.returncode == -signal.SIGKILL


def test_mistakes_are_refused(build, tokenizer):
    with pytest.raises(UserError, match="'numbers' has no examples"):
        build([(Numbers(0), 1.0)])
    with pytest.raises(UserError, match="data.crop.*'randm'.*Did you mean 'random'"):
        build(crop="randm")
    with pytest.raises(UserError, match="'numbers' has no examples"):
        eval_batches(Numbers(0), tokenizer, image_size=SIZE, batch_size=4)


def test_iterating_an_empty_range_gives_nothing(build):
    assert list(iterate(build(), 5, 5)) == list(iterate(build(), 5, 3, workers=2)) == []


@pytest.mark.parametrize(
    ("count", "limit", "shown"), [(10, None, 10), (8, None, 8), (30, 9, 9), (3, 9, 3)]
)
def test_evaluation_shows_every_example_once(tokenizer, count, limit, shown):
    def batches(**options):
        return eval_batches(
            Numbers(count, files=True),
            tokenizer,
            image_size=SIZE,
            batch_size=4,
            limit=limit,
            **options,
        )

    whole = batches()
    assert len(whole) == -(-shown // 4)
    got = list(iterate(whole))
    mask = np.concatenate([batch["mask"] for batch in got])
    assert mask.tolist() == [True] * shown + [False] * (len(whole) * 4 - shown)
    assert np.concatenate([b["label"] for b in got])[mask].tolist() == list(range(shown))
    assert np.concatenate([b["index"] for b in got])[mask].tolist() == list(range(shown))
    texts = [tokenizer.decode(row) for b in got for row in b["text"][b["mask"]]]
    assert texts == [f"{i} a" for i in range(shown)]
    for batch in got:
        assert batch["image"].shape == (4, SIZE, SIZE, 3)
        for x in batch.values():
            assert not x[~batch["mask"]].any()
    for hosts in (2, 4):
        parts = [list(iterate(batches(rows=share(host, hosts, 4)))) for host in range(hosts)]
        for j, batch in enumerate(got):
            together = {k: np.concatenate([part[j][k] for part in parts]) for k in batch}
            assert_same(together, batch)


def test_evaluation_masks_broken_images(tokenizer):
    (batch,) = eval_batches(Numbers(4, broken=(2,)), tokenizer, image_size=SIZE, batch_size=4)
    assert batch["mask"].tolist() == [True, True, False, True]
    assert batch["broken"].tolist() == [False, False, True, False]
    assert batch["label"].tolist() == [0, 1, 2, 3]


def test_evaluation_crops_the_centre(tokenizer):
    def first(crop):
        source = Numbers(1, 240, files=True)
        return eval_batches(source, tokenizer, image_size=SIZE, batch_size=1, crop=crop)[0]["image"]

    # The source is wider than high, darkest at the left edge: a centred square leaves it out.
    assert first("center")[0, 0, 0, 0] > first("none")[0, 0, 0, 0]
