"""Sets of distant permutations, and their files."""

import time

import numpy as np
import pytest

from cap_pretrain.errors import UserError
from cap_pretrain.learners import permutations


@pytest.mark.parametrize(
    ("count", "rule", "mean", "smallest"),
    [(100, "mean", 8.08, 2), (100, "min", 8.03, 6), (1000, "mean", 8.01, 2)],
)
def test_they_are_as_far_as_published_ones(count, rule, mean, smallest):
    """Compare with the distances of sets from public greedy code, to two decimals."""
    chosen = permutations.greedy(count, rule)
    assert len(set(chosen)) == count
    assert all(sorted(permutation) == list(range(9)) for permutation in chosen)
    got = permutations.distances(chosen)
    assert round(got[0], 2) >= mean and got[1] >= smallest


def test_each_is_the_farthest_from_those_before_it():
    for rule, worst in (("mean", np.sum), ("min", np.max)):
        chosen = np.array(permutations.greedy(6, rule, 3))
        everything = permutations._all()
        for n in range(1, 6):
            alike = np.stack([(everything == one).sum(axis=1) for one in chosen[:n]])
            score = worst(alike, axis=0)
            score[(alike == 9).any(axis=0)] = 99
            own = np.flatnonzero((everything == chosen[n]).all(axis=1))
            assert score[own] == score.min()


def test_the_seed_decides_and_more_begin_with_fewer():
    assert permutations.greedy(20, "mean", 1) == permutations.greedy(30, "mean", 1)[:20]
    assert permutations.greedy(20, "mean", 1) != permutations.greedy(20, "mean", 2)


def test_distances_of_any_two():
    a, b, c = (tuple(range(9)), (1, 0, *range(2, 9)), (8, *range(8)))
    assert permutations.distances((a, b, c)) == ((2 + 9 + 8) / 3, 2)


def test_a_thousand_are_made_in_seconds():
    began = time.process_time()
    permutations.greedy(1000, "min", 11)
    assert time.process_time() - began < 5


def test_files(tmp_path):
    path = tmp_path / "permutations.txt"
    chosen = permutations.greedy(5)
    permutations.write(path, chosen)
    assert path.read_text().splitlines()[0] == " ".join(map(str, chosen[0]))
    assert permutations.read(path) == chosen
    for text, told in (
        (
            "0 1 2 3 4 5 6 7\n",
            "line 1 is '0 1 2 3 4 5 6 7', not a permutation of the numbers 0 to 8",
        ),
        ("1 2 3 4 5 6 7 8 9\n", "line 1"),
        ("0 1 2 3 4 5 6 7 8\n" * 2, "line 2 repeats line 1"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=told):
            permutations.read(path)
    with pytest.raises(UserError, match="nowhere: not a readable file of permutations"):
        permutations.read(tmp_path / "nowhere")
