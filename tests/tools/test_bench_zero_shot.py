"""Tests of tools/bench_zero_shot.py: it times both ways."""

import json

import pytest

from tools import bench_zero_shot


@pytest.mark.slow
def test_it_times_both_ways(capsys):
    sizes = ["--width=16", "--depth=1", "--mlp=16", "--heads=2", "--length=8", "--vocab_size=40"]
    small = ["--model=mu/8", "--image_size=16", "--classes=5", "--images=2", *sizes]
    assert bench_zero_shot.main(small) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"].keys() == set(bench_zero_shot.LEARNERS)
    assert found["arguments"]["classes"] == 5
