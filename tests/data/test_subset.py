"""Parts of datasets: balanced, seeded, and the smaller inside of the larger."""

import pickle

import numpy as np
import pytest

from cap_pretrain.data import subset
from cap_pretrain.data.scenes import Scenes
from cap_pretrain.data.sources import without_image
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


def test_a_subset_is_a_source_that_workers_can_open():
    part = pickle.loads(pickle.dumps(subset.fraction_of(SOURCE, 0.1, seed=0)))
    assert ids(part) == ids(subset.fraction_of(SOURCE, 0.1, seed=0))
    for index in (-1, len(part)):
        with pytest.raises(IndexError):
            part[index]


def test_what_cannot_be_is_told():
    for fraction in (0, -1, 1.1):
        with pytest.raises(UserError, match="data.fraction: .* is not in"):
            subset.fraction_of(SOURCE, fraction, seed=0)

    class Unlabelled(Scenes):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": -1}

    with pytest.raises(UserError, match=r'--config.data.split="train\[:10%\]"'):
        subset.fraction_of(Unlabelled("train", 16, length_train=5), 0.1, seed=0)


def test_examples_may_come_without_their_images():
    for source in (SOURCE, subset.sample(SOURCE, 20, seed=0)):
        rest = without_image(source, 7)
        assert rest == {name: value for name, value in source[7].items() if name != "image"}
    assert without_image([{"label": 3}], 0) == {"label": 3}
