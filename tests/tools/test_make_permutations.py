"""Tests of tools/make_permutations.py: it writes the learner's permutations and their distances."""

from cap_pretrain.commands import make_permutations
from cap_pretrain.learners import permutations


def test_a_file_of_permutations(tmp_path, capsys):
    out = tmp_path / "new" / "permutations.txt"
    assert make_permutations.main(["--rule", "min", "--seed", "2", "--out", str(out)]) == 0
    chosen = permutations.read(out)
    assert chosen == permutations.greedy(100, "min", 2)
    mean, smallest = permutations.distances(chosen)
    output = capsys.readouterr().out
    assert f"100 permutations; distance {mean:.4f} on average, {smallest} least" in output
    assert make_permutations.main(["--count", "1", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: permutations: 1 is not from 2")
    assert permutations.read(out) == chosen
