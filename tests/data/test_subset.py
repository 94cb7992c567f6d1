"""Parts of datasets are balanced and seeded, and smaller parts are inside larger ones."""

import itertools
import pickle

import numpy as np
import pytest

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.sources import base, subset
from cap_pretrain.data.sources.base import without_image
from cap_pretrain.errors import UserError

SOURCE = Scenes("train", 16, length_train=400, label="count")
LABELS = np.array([SOURCE[i]["label"] for i in range(400)])


def ids(source):
    return [source[i]["id"] for i in range(len(source))]


def counts(source):
    return np.bincount(subset.labels_of(source), minlength=3)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_a_fraction_is_taken_of_every_class(fraction):
    part = subset.fraction_of(SOURCE, fraction, seed=0)
    np.testing.assert_array_equal(counts(part), np.round(fraction * np.bincount(LABELS)))
    assert str(part) == f"scenes, split 'train', {100 * fraction:g}% of every class (seed 0)"
    assert part.class_names == SOURCE.class_names


def test_the_smaller_fraction_is_part_of_the_larger_and_seeds_differ():
    one, ten, half = (set(ids(subset.fraction_of(SOURCE, f, seed=0))) for f in (0.01, 0.1, 0.5))
    assert one < ten < half
    assert ids(subset.fraction_of(SOURCE, 0.1, 0)) == ids(subset.fraction_of(SOURCE, 0.1, 0))
    assert ids(subset.fraction_of(SOURCE, 0.1, 0)) != ids(subset.fraction_of(SOURCE, 0.1, 1))


def test_every_class_keeps_an_example_and_the_order_stays():
    assert counts(subset.fraction_of(SOURCE, 0.001, seed=0)).tolist() == [1, 1, 1]
    drawn = [int(name.split("/")[1]) for name in ids(subset.fraction_of(SOURCE, 0.3, seed=0))]
    assert drawn == sorted(drawn)
    assert subset.fraction_of(SOURCE, 1.0, seed=0) is SOURCE


def test_a_sample_is_drawn_from_all_over():
    part = subset.sample(SOURCE, 50, seed=0)
    drawn = [int(name.split("/")[1]) for name in ids(part)]
    assert len(set(drawn)) == 50 and drawn == sorted(drawn) and max(drawn) > 300
    assert set(drawn) < {int(n.split("/")[1]) for n in ids(subset.sample(SOURCE, 60, seed=0))}
    assert subset.sample(SOURCE, 0, seed=0) is subset.sample(SOURCE, 400, seed=0) is SOURCE


def test_a_dataset_is_divided_alike_in_every_run():
    """For many lengths: every example is on one side, a twentieth is held out, nothing random."""
    for count in (*range(2, 300), 199_999, 200_001):
        source = Scenes("train", 16, length_train=count)
        training, held_out = subset.divided(source)
        both = np.sort(np.concatenate([training._indices, held_out._indices]))
        np.testing.assert_array_equal(both, np.arange(count))
        assert len(held_out) == min(10_000, max(1, count // 20))
        np.testing.assert_array_equal(held_out._indices, subset.divided(source)[1]._indices)
    assert np.ptp(subset.divided(Scenes("train", 16))[1]._indices) > 990_000  # from all over
    with pytest.raises(UserError, match="data.eval_split: scenes.* has one example"):
        subset.divided(Scenes("train", 16, length_train=1))


class Labelled:
    """Examples with these labels."""

    def __init__(self, labels, names="abcdefgh"):
        self._labels, self.class_names = list(labels), list(names)

    def __str__(self):
        return "labelled"

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        return {"label": int(self._labels[index]), "id": str(index)}


class Files(Labelled):
    """Examples in files of these lengths, which notes what is read ahead."""

    example_bytes = 10.0

    def __init__(self, *counts):
        super().__init__([0] * sum(counts))
        self._ends, self.ahead = np.cumsum(counts).tolist(), []

    def block_bounds(self, size):
        return base.file_bounds(self._ends, size)

    def read_ahead(self, ranges):
        self.ahead += ranges


@pytest.mark.parametrize("left_out", [[], [0], [4, 5, 6], [0, 1, 2, 3], [2, 7, 11, 29]])
def test_a_subset_has_the_blocks_of_its_source(left_out):
    source, kept = Files(3, 1, 16, 10), np.setdiff1d(np.arange(30), left_out)
    np.testing.assert_array_equal(
        base.block_bounds(source, 4), [0, 3, 4, 8, 12, 16, 20, 24, 28, 30]
    )
    for indices in (kept, subset.AllBut(30, np.array(left_out, np.int64))):
        part = subset.Subset(source, indices, "part")
        bounds = base.block_bounds(part, 4)
        assert bounds[0] == 0 and bounds[-1] == len(part) and (np.diff(bounds) > 0).all()
        blocks = [kept[a:b] for a, b in itertools.pairwise(bounds)]
        of_source = [np.split(kept, np.searchsorted(kept, base.block_bounds(source, 4)))]
        assert [b.tolist() for b in blocks] == [b.tolist() for b in of_source[0] if len(b)]
        source.ahead.clear()
        base.read_ahead(part, [(1, 3), (5, 5), (6, 7)])
        assert source.ahead == [(kept[1], kept[2] + 1), (kept[6], kept[6] + 1)]
        assert base.example_bytes(part) * len(part) == pytest.approx(300)


def test_any_sequence_has_blocks():
    assert base.block_bounds(SOURCE, 150).tolist() == [0, 150, 300, 400]
    assert base.example_bytes(SOURCE) == 0 and base.read_ahead(SOURCE, [(0, 5)]) is None


def test_what_is_held_out_of_many_examples_takes_little_memory(monkeypatch):
    source = range(100_000)
    before = np.asarray(subset.divided(Files(100_000))[0]._indices)
    monkeypatch.setattr(subset, "_PERMUTED", 1000)
    training, held_out = subset.divided(Files(100_000))
    assert len(held_out) == 5000 and np.ptp(held_out._indices) > 90_000
    rest = np.setdiff1d(source, held_out._indices)
    np.testing.assert_array_equal(rest, np.asarray(training._indices))
    assert [training._indices[i] for i in range(0, 95_000, 997)] == rest[::997].tolist()
    assert not np.array_equal(before, rest)


def test_a_subset_is_a_source_that_workers_can_open():
    part = pickle.loads(pickle.dumps(subset.fraction_of(SOURCE, 0.1, seed=0)))
    assert ids(part) == ids(subset.fraction_of(SOURCE, 0.1, seed=0))
    for index in (-1, len(part)):
        with pytest.raises(IndexError):
            part[index]


def test_bad_arguments_raise():
    for fraction in (0, -1, 1.1):
        with pytest.raises(UserError, match="data.fraction: .* is not in"):
            subset.fraction_of(SOURCE, fraction, seed=0)

    class Unlabelled(Scenes):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": -1}

        without_image = __getitem__

    with pytest.raises(UserError, match=r'--config.data.split="train\[:10%\]"'):
        subset.fraction_of(Unlabelled("train", 16, length_train=5), 0.1, seed=0)


def test_examples_may_come_without_their_images():
    for source in (SOURCE, subset.sample(SOURCE, 20, seed=0)):
        rest = without_image(source, 7)
        assert rest == {name: value for name, value in source[7].items() if name != "image"}
    assert without_image([{"label": 3}], 0) == {"label": 3}


def of_sizes(source, training, *, least=0, most=0, drawn=0):
    arrays = subset.labels_of(source), subset.labels_of(training)
    return subset.ClassSizes(least, most).of(source, *arrays, drawn=drawn)


@pytest.mark.parametrize("seed", range(20))
def test_classes_are_kept_by_size_capped_and_renumbered(seed):
    rng = np.random.default_rng(seed)
    least, most = (int(n) for n in rng.integers(0, 12, 2))
    labels = rng.permutation(np.repeat(np.arange(-1, 8), [3, *rng.integers(0, 15, 7), 12]))
    train, test = Labelled(labels), Labelled(rng.integers(-1, 8, 60))
    found = of_sizes(train, train, least=least, most=most)
    sizes = np.bincount(labels[labels >= 0], minlength=8)
    names = [n for n, size in zip("abcdefgh", sizes, strict=True) if size >= max(least, 1)]
    assert found.class_names == names
    for source, whole in (found, train), (of_sizes(test, train, least=least, drawn=None), test):
        assert source.class_names == names
        for example in source:  # each is an example of the whole dataset, with its class name
            old = whole[int(example["id"])]["label"]
            assert names[example["label"]] == "abcdefgh"[old]
        assert source[0] == source.without_image(0)
    expected = [min(size, most or size) for size in sizes if size >= max(least, 1)]
    assert np.bincount(subset.labels_of(found)).tolist() == expected
    assert [int(i) for i in ids(found)] == sorted(int(i) for i in ids(found))
    if most:
        more = of_sizes(train, train, least=least, most=most + 3)
        assert set(ids(found)) <= set(ids(more))


def test_splits_without_a_cap_keep_all_examples_of_the_classes():
    train, test = Labelled([0] * 9 + [1] * 2 + [2] * 5), Labelled([2, 1, 0, 0, 2, 2])
    part = of_sizes(test, train, least=5, most=2, drawn=None)
    assert ids(part) == ["0", "2", "3", "4", "5"]
    assert subset.labels_of(part).tolist() == [1, 0, 0, 1, 1]
    assert str(of_sizes(train, train, least=5, most=9)) == (
        "labelled, 2 of 3 classes, 1 at the cap of 9 (seed 0)"
    )
    assert of_sizes(test, train, least=5).class_names == ["a", "c"]
    assert pickle.loads(pickle.dumps(part))[0] == {"label": 1, "id": "0"}


def test_classes_without_examples_raise():
    train = Labelled([0, 0, 1])
    with pytest.raises(UserError, match="no class with 5 examples to train on; the largest has 2"):
        of_sizes(train, train, least=5)
    with pytest.raises(UserError, match="there are no labels"):
        of_sizes(Labelled([-1, -1]), Labelled([-1, -1]), most=5)
    with pytest.raises(UserError, match="no example of the classes that remain"):
        of_sizes(Labelled([1]), train, least=2)
