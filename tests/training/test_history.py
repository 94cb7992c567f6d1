"""Tables of what evaluators found in the course of a run."""

import json

from cap_pretrain.training import history

LINES = [
    {"step": 5, "train/loss": 3.0},
    {"step": 10, "scores/CIDEr": 0.5, "scores/Bleu_4": 0.125},
    {"step": 5, "val/loss": 2.0},
    {"step": 10, "val/loss": None},
    {"step": 10, "other/loss": 7.0},
    {"step": 10, "val/cap/loss": 2.5},
    {"step": 10, "end/loss": 1.5},
]


def test_a_row_for_each_time_and_all_figures_in_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    rows = history.keep(tmp_path, {"val", "scores", "end"}, epochs=lambda step: step / 5)
    assert [row["epoch"] for row in rows] == [1, 2] and rows[0]["val/loss"] == 2
    assert (tmp_path / "evals" / "table.csv").read_text().splitlines() == [
        "step,epoch,val/loss,scores/CIDEr,scores/Bleu_4,val/cap/loss,end/loss",
        "5,1.0,2.0,,,,",
        "10,2.0,,0.5,0.125,2.5,1.5",
    ]


def test_people_see_what_was_found_more_than_once():
    rows = history.evaluations(LINES, {"val", "scores", "end"}, epochs=lambda step: step / 5)
    assert history.tables(rows).splitlines() == [
        "val",
        "",
        "| step | epoch | loss | cap/loss |",
        "| --- | --- | --- | --- |",
        "| 5 | 1 | 2 |  |",
        "| 10 | 2 |  | 2.5 |",
    ]
    assert not history.tables(rows[:1])
