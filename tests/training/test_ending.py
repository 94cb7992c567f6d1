"""What a run notes of its data, and what it suggests at its end."""

import types

import pytest

from cap_pretrain.optim import schedule
from cap_pretrain.training import ending, setup
from tests import toy


@pytest.mark.parametrize(
    ("learner", "fields", "suggested"),
    [
        ("captioner", {}, ["caption --", "export --"]),
        ("dual_encoder", {}, ["evaluate.py", "export --"]),
        ("captioner", {"model__name": "resnet50"}, ["caption --", "report "]),
        ("rotation", {"model__name": "alexnet"}, ["evaluate.py", "report "]),
        ("colorization", {"model__colours": "gray"}, ["evaluate.py", "report "]),
        ("captioner", {"model__name": "stored"}, ["report "]),
    ],
)
def test_suggested_commands_take_the_model(learner, fields, suggested, tmp_path):
    said = ending.lines(toy.config(learner, **fields), tmp_path, 7).splitlines()[1:]
    names = ("caption --", "evaluate.py", "export --", "report ")
    assert [name for line in said for name in names if name in line] == suggested


def test_facts_have_the_datasets_and_not_their_groups(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "scenes").mkdir()
    run = types.SimpleNamespace(
        config=toy.config(data__name="scenes+own:0.5", data__buckets=True),
        sources=[(range(200), 1.0), (range(30), 0.5)],
        mixture=[(range(3), 1.0), (range(4), 1.0), (range(5), 1.0)],
        abstract=types.SimpleNamespace(params={}),
        mesh=types.SimpleNamespace(shape={"data": 1}),
        schedule=types.SimpleNamespace(total=2),
        batches=schedule.BatchSizes(()),
        epoch=12,
        phases=[],
        training_flops=[],
    )
    facts = setup.Setup.facts(run)
    sizes = {part["name"]: (part["examples"], part["weight"]) for part in facts["data"]}
    assert sizes == {"scenes": (200, 1.0), "own": (30, 0.5)}
    assert facts["folders"] == {"own": str(tmp_path / "own")}, "scenes are generated"
