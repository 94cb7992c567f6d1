"""results_table: the newest figures of several runs side by side."""

import json

import pytest

from tools import results_table


@pytest.fixture
def runs(tmp_path):
    """Two runs; the second was not asked for its order, and got better."""
    for path, figures in {
        "cap/evals/probe/0.json": {"top1": 0.25, "protocol": "by hand"},
        "cap/order/evals/composition/0.json": {"accuracy": 0.875},
        "clip/evals/probe/9.json": {"top1": 0.3},
        "clip/evals/probe/10.json": {"top1": 0.5, "top5": 1},
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(figures))
    return [str(tmp_path / "cap"), str(tmp_path / "clip")]


def test_a_row_a_run(runs, capsys):
    figures = ["--figures", "probe/top1", "order:composition/accuracy", "probe/top5"]
    titles = ["--titles", "probe", "order", "5"]
    assert results_table.main([*runs, *figures, "--percent", *titles]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "|  | probe | order | 5 |",
        "| --- | --- | --- | --- |",
        "| cap | 25.0 | 87.5 |  |",
        "| clip | 50.0 |  | 100.0 |",
    ]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["probe/top11"], "no figure 'top11'. Did you mean 'top1'?"),
        (["probe/protocol"], "no figure 'protocol'"),
        (["probe"], "'probe' is not of the form"),
        (["knn/top1"], "none of the runs has knn/top1"),
        (["probe/top1", "--titles", "a", "b"], "--titles: 2 for 1"),
    ],
)
def test_what_is_not_there_is_told(runs, capsys, asked, told):
    assert results_table.main([*runs, "--figures", *asked]) == 2
    assert told in capsys.readouterr().err
