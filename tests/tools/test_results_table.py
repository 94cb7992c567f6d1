"""Tests of tools/results_table.py: the newest results of several runs in one table."""

import json

import pytest

from cap_pretrain.commands import results_table


@pytest.fixture
def runs(tmp_path):
    """Return two runs; the second has no `order` subfolder and two results of `probe`."""
    for path, metrics in {
        "cap/evals/probe/0.json": {"top1": 0.25, "protocol": "by hand"},
        "cap/order/evals/composition/0.json": {"accuracy": 0.875},
        "clip/evals/probe/9.json": {"top1": 0.3},
        "clip/evals/probe/10.json": {"top1": 0.5, "top5": 1},
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(metrics))
    return [str(tmp_path / "cap"), str(tmp_path / "clip")]


def test_one_row_per_run(runs, capsys):
    figures = ["--figures", "probe/top1", "order:composition/accuracy", "probe/top5"]
    titles = ["--titles", "probe", "order", "5"]
    assert results_table.main([*runs, *figures, "--percent", *titles]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "|  | probe | order | 5 |",
        "| --- | --- | --- | --- |",
        "| cap | 25.0 | 87.5 |  |",
        "| clip | 50.0 |  | 100.0 |",
    ]


def test_a_folder_stands_for_the_runs_below_it(runs, tmp_path, capsys):
    (tmp_path / "clip/checkpoints/9").mkdir(parents=True)
    (tmp_path / "clip/config.json").write_text("{}")
    assert results_table.main([str(tmp_path), "--figures", "probe/top1"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| cap | 0.25 |", "| clip | 0.5 |"]
    checkpoint = str(tmp_path / "clip/checkpoints/9")
    assert results_table.main([checkpoint, "--figures", "probe/top1"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| clip/9 | 0.3 |"]
    assert results_table.main([str(tmp_path / "none"), "--figures", "probe/top1"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe/top11"], "no metric 'top11'. Did you mean 'top1'?"),
        (["probe/protocol"], "no metric 'protocol'"),
        (["probe"], "'probe' is not of the form"),
        (["knn/top1"], "none of the runs has knn/top1"),
        (["probe/top1", "--titles", "a", "b"], "--titles: 2 titles for 1 metrics"),
    ],
)
def test_error_messages(runs, capsys, arguments, message):
    assert results_table.main([*runs, "--figures", *arguments]) == 2
    assert message in capsys.readouterr().err
