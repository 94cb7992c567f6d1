"""Training batches are a function of the step number and the seed."""

import grain
import numpy as np
import pytest

from cap_pretrain.data import pipeline
from cap_pretrain.data.pipeline import eval_batches
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.views import View
from cap_pretrain.errors import UserError
from tests.data.numbers import SIZE, Numbers, assert_same, indices, rows_of_host


def test_contents_of_a_batch(build, tokenizer):
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


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_rows_of_the_hosts_make_up_the_batch(build, hosts):
    dataset = build()
    parts = [build(rows=rows_of_host(host, hosts)) for host in range(hosts)]
    for t in (0, 7, 100):
        batches = [part[t] for part in parts]
        assert_same({k: np.concatenate([b[k] for b in batches]) for k in batches[0]}, dataset[t])


@pytest.mark.parametrize("rows", [[0, 1, 4, 5], [2, 3, 6, 7], [5]])
def test_rows_need_not_be_contiguous(build, rows):
    dataset, part = build(), build(rows=rows)
    for t in (0, 7, 100):
        assert_same(part[t], {k: v[rows] for k, v in dataset[t].items()})


def test_the_group_size_changes_nothing(build, monkeypatch):
    whole = build(batch_size=40)[3]
    monkeypatch.setattr(pipeline, "_GROUP", 7)
    assert_same(build(batch_size=40)[3], whole)


def test_random_numbers_are_those_of_grain(build):
    """Runs that were started when Grain drew the numbers can be resumed."""

    class Draw(grain.transforms.RandomMap):
        def random_map(self, element, rng):
            return rng.random(3)

    drawn = grain.MapDataset.range(10**6).random_map(Draw(), seed=7)
    rows = pipeline._TrainRows([Numbers(3)], None, None, pipeline.ImageOptions(8), seed=7)
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
    """Captions a, b and c, of which a has half of the weight; odd numbers have no captions."""

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


class Questions(Numbers):
    """Captions of even numbers answer a question; the question about 4 has no answer."""

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
    dataset = build([(Numbers(9, offset=1), 1.0), (Questions(9), 2.0)], crop="none")
    batches = [dataset[t] for t in range(6)]
    questions = 0
    for batch in batches:
        for n in range(8):
            row = {key: values[n] for key, values in batch.items()}
            if row["index"] >= 9:
                check(row)
                questions += row["prompt"] > 0
            else:
                assert row["prompt"] == 0
    assert questions > 8
    (batch,) = eval_batches(Questions(9), tokenizer, view=View(SIZE), batch_size=10)
    for n in range(9):
        check({key: values[n] for key, values in batch.items()})
    assert batch["prompt"][9] == 0 and batch["prompt"].dtype == np.int32


def test_a_neighbour_stands_in_for_a_broken_image(build):
    # For 11, the search for a valid image wraps around and skips 0.
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


def test_a_run_of_broken_images_raises(build):
    dataset = build([(Numbers(120, broken=range(120)), 1.0)])
    with pytest.raises(UserError, match="all images broken in dataset 'numbers'.*not an image"):
        next(iterate(dataset))
    assert build([(Numbers(120, broken=range(99)), 1.0)])[0]["broken"].any()


def test_bad_arguments_raise(build, tokenizer):
    with pytest.raises(UserError, match="'numbers' has no examples"):
        build([(Numbers(0), 1.0)])
    with pytest.raises(UserError, match="data.crop.*'randm'.*Did you mean 'random'"):
        build(crop="randm")
    with pytest.raises(UserError, match="'numbers' has no examples"):
        eval_batches(Numbers(0), tokenizer, view=View(SIZE), batch_size=4)
