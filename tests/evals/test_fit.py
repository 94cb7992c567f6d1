"""Evaluations that do not outlast the training they belong to."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals, train
from cap_pretrain.evals import members
from cap_pretrain.evals.base import BatchOptions
from cap_pretrain.evals.fit import LEAST, Work, fitted
from cap_pretrain.evals.retrieval import Retrieval
from tests import quick, toy


@pytest.mark.parametrize(
    ("images", "budget", "limit"),
    [
        (10_000, 10_000, 0),  # all fit
        (10_000, 9_999, 9_984),  # whole batches of 128
        (10_000, 200, 128),
        (10_000, 100, 100),
        (10_000, 3, LEAST),
        (20, 3, 0),  # fewer than the least
    ],
)
def test_the_first_examples_that_fit_are_read(images, budget, limit):
    options = fitted(BatchOptions(), Work(images), budget)
    assert options.limit == limit
    assert options.batch_size == (min(128, limit) if limit else 128)


def test_options_of_the_user_and_unknown_work_are_left():
    own = BatchOptions(limit=5_000)
    assert fitted(own, Work(5_000), 10) is own
    assert fitted(BatchOptions(), None, 0) == BatchOptions()
    other = BatchOptions(batch_size=32, split="test")  # says nothing of how many
    assert fitted(other, Work(5_000), 100) == dataclasses.replace(other, limit=96)


def test_work_that_grows_with_the_square_and_options_of_other_names():
    work = Work(1000, lambda n: n * n, lambda n: {"limit": n}, least=10)
    assert fitted(Retrieval.Options(), work, 100**2).limit == 64  # one batch of 64
    count = fitted(evals.evaluator_class("captions").Options(), Work(32, limits=_count), 1)
    assert count.count == 32  # all of them, since they are fewer than the least
    scenes = fitted(evals.evaluator_class("scene_captions").Options(), Work(500, limits=_count), 99)
    assert scenes.count == scenes.batch_size == 99


def _count(number):
    return {"count": number}


def test_every_member_of_a_mixture_gets_a_section():
    c = ConfigDict({"data": {"name": "a/coco:2+b/my-own+c/coco"}, "evals": {}})
    with c.unlocked():
        c.evals.val = evals.defaults("loss", limit=7)
        c.evals.val_2 = evals.defaults("loss", data="b/my-own")
        c.evals.order = evals.defaults("composition", questions="order")
        c.evals.scenes = evals.defaults("scene_captions")  # of one dataset
        c.evals.drawn = evals.defaults("composition", questions="scenes")
    found = members.sections(c)
    assert {name: section.data for name, section in found.items()} == {
        "val_coco": "c/coco",  # another section has the other one
        "order_my_own": "b/my-own",
        "order_coco": "c/coco",
    }
    assert found["val_coco"].limit == 7 and found["order_coco"].questions == "order"
    c.data.name = "a/coco"
    assert members.sections(c) == {}


@pytest.mark.slow
def test_a_short_run_is_evaluated_on_less_unless_told_otherwise(tokenizer_path, tmp_path, capsys):
    c = toy.config(quick.NAME, data__scenes__length_val=500, text__tokenizer=str(tokenizer_path))
    c.total_steps, c.eval.every_steps = 4, 2
    c.evals = ConfigDict({"val": evals.defaults("loss"), "own": evals.defaults("loss", limit=300)})

    def read(name):
        results = [json.loads(p.read_text()) for p in (tmp_path / name / "evals").glob("*/*.json")]
        return sorted((r["examples"], r["options"]["limit"]) for r in results)

    train.run(c, tmp_path / "short")
    assert read("short") == [(LEAST, LEAST)] * 2 + [(300, 300)] * 2
    said = capsys.readouterr().out
    assert said.count("evals.val reads 64 of 500 examples, since all would take longer") == 1
    assert "Evaluating val on 64 examples" in said and "Evaluating own on 300 examples" in said
    c.eval.fit = False
    train.run(c, tmp_path / "all")
    assert read("all") == [(300, 300)] * 2 + [(500, 0)] * 2
