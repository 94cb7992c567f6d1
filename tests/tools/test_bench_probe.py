"""Tests of tools/bench_probe.py: both candidates reach the same minimum."""

import json
import sys

import numpy as np
import pytest

from tools import bench_probe


def rows(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_probe.py", *arguments])
    assert bench_probe.main() == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["fits"]


def test_both_reach_the_same_minimum(capsys, monkeypatch, tmp_path):
    paths = []
    for seed in (1, 2):
        features, labels = bench_probe.generated(300, 64, 3, seed)
        paths.append(str(tmp_path / f"{seed}.npz"))
        np.savez(paths[-1], key="of a probe", features=features, labels=labels)
    arguments = ("--train", paths[0], "--test", paths[1], "--c", "0.1", "1", "--tol", "1e-6")
    found = rows(capsys, monkeypatch, *arguments, "--rounds", "1", "--threads", "1")
    assert [(row["c"], row["name"]) for row in found] == [
        (c, name) for c in (0.1, 1.0) for name in ("cap_pretrain", "scikit-learn, threads: 1")
    ]
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        assert ours["objective"] == pytest.approx(theirs["objective"], rel=1e-5)
        assert ours["top1"] == pytest.approx(theirs["top1"], abs=0.01)
        assert 0.35 < ours["top1"] < 0.9  # better than chance, but not perfect


def test_a_file_without_features_is_rejected(capsys, monkeypatch, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["x", "--train", str(tmp_path / "a.npz"), "--test", "b"])
    assert bench_probe.main() == 2
    assert "a.npz: is not a file of features" in capsys.readouterr().err
