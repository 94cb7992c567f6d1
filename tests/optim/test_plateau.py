"""Reduce on plateau and early stopping, with the same result after any interruption."""

import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals, train
from cap_pretrain.checkpoints import folders
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Result
from cap_pretrain.evals.suite import Suite
from cap_pretrain.optim.plateau import Plateau
from cap_pretrain.validation import validate
from tests import quick, toy


def states(plateau, values):
    """Return the plateau state after each of several evaluations."""
    memory, all_states = jax.tree.map(jax.numpy.asarray, plateau.begin()), []
    for step, value in enumerate(values):
        memory = plateau.after(memory, step, {"val/loss": value, "val/other": 0.0})
        all_states.append(jax.device_get(memory))
    return all_states


def test_the_rate_falls_after_consecutive_evaluations_without_improvement():
    plateau = Plateau(figure="val/loss", factor=0.5, patience=2, stop=5)
    memory = states(plateau, [3.0, 2.0, 2.0, np.nan, 2.5, 2.1, 1.0, 1.5, 1.5])
    assert [float(m["scale"]) for m in memory] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert [int(m["since"]) for m in memory] == [0, 0, 1, 2, 3, 4, 0, 1, 2]
    assert float(memory[-1]["best"]) == 1
    assert not plateau.ended(memory[-1])
    assert plateau.ended(states(plateau, [1.0] + 5 * [2.0])[-1])


def test_mode_max():
    plateau = Plateau(figure="val/loss", mode="max", patience=1, factor=0.1)
    scales = [float(m["scale"]) for m in states(plateau, [0.2, 0.4, 0.3])]
    assert scales == pytest.approx([1, 1, 0.1])


def test_an_evaluation_counts_once_and_other_metrics_do_not_count():
    plateau = Plateau(figure="val/loss", patience=1)
    memory = states(plateau, [1.0])[0]
    assert plateau.after(memory, 5, {"val/other": 9.0}) is memory
    assert plateau.after(memory, 0, {"val/loss": 9.0}) is memory
    assert Plateau().begin() is None and Plateau().after(None, 1, {"val/loss": 1.0}) is None
    assert not Plateau(stop=1).ended(None)


def make_config(tokenizer_path, **plateau):
    c = toy.config(quick.NAME, text__tokenizer=str(tokenizer_path), total_steps=20)
    c.eval.every_steps = c.checkpoint.every_steps = 2
    c.optim.decay, c.optim.warmup_share = "constant", 0.0
    c.evals = ConfigDict(
        {
            "val": evals.defaults("loss", limit=8, batch_size=8),
            "end": evals.defaults("loss", limit=8, batch_size=8, when="end"),
        }
    )
    c.plateau.update(figure="val/loss", **plateau)
    return c


@pytest.fixture(scope="module")
def falling_then_flat():
    """Make evaluators return losses of 3, 1, 1, 1 and so on at steps 2, 4, 6, 8 and so on."""
    whole = Suite.run

    def run(suite, step, variables, **kwargs):
        for name, _ in whole(suite, step, variables, **kwargs):
            yield name, Result({"loss": max(5.0 - step, 1.0)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Suite, "run", run)
        yield


@pytest.mark.slow
def test_a_run_lowers_its_rate_stops_early_and_is_then_complete(
    tokenizer_path, tmp_path, falling_then_flat, capsys
):
    c = make_config(tokenizer_path, factor=0.5, patience=2, stop=3)
    c.checkpoint.every_steps = 100  # only the early stop saves
    train.run(c, tmp_path)
    lines = toy.lines(tmp_path)
    rates = {x["step"]: x["train/learning_rate"] for x in lines if "train/learning_rate" in x}
    assert max(rates) == 10  # best at step 4, no improvement at 6, 8, 10
    assert all(rates[step] == pytest.approx(1e-3) for step in range(1, 9))
    assert rates[9] == rates[10] == pytest.approx(5e-4)
    assert [x["step"] for x in lines if "end/loss" in x] == [10]
    assert folders.saved_steps(tmp_path) == [10]
    assert "val/loss no longer improves: the run ends at step 10" in capsys.readouterr().out
    train.run(c, tmp_path)
    assert "Already at step 10 of 20" in capsys.readouterr().out
    assert toy.lines(tmp_path) == lines


@pytest.fixture(scope="module")
def whole_run(tokenizer_path, falling_then_flat, tmp_path_factory):
    """The config and workdir of a run that stopped at step 10, halving its rate each time."""
    c = make_config(tokenizer_path, factor=0.5, patience=1, stop=3)
    c.checkpoint.keep_last = 20
    workdir = tmp_path_factory.mktemp("whole")
    train.run(c, workdir)
    return c, workdir


@pytest.mark.parametrize(
    ("last", "logged"),
    [
        (6, False),
        (10, True),
        pytest.param(6, True, marks=pytest.mark.slow),
        pytest.param(10, False, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes_with_the_same_results(whole_run, tmp_path, last, logged):
    """It stops after saving the checkpoint of a step, before or after logging its evaluation."""
    c, whole = whole_run
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for step in folders.saved_steps(stopped):
        if step > last:
            shutil.rmtree(stopped / "checkpoints" / str(step))
    lines = [x for x in toy.lines(stopped) if x["step"] <= last]
    if not logged:
        lines = [x for x in lines if x["step"] < last or "train/loss" in x]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (stopped / "metrics.jsonl").write_text(text)
    train.run(c, stopped)
    assert metrics(stopped) == metrics(whole)
    assert folders.saved_steps(stopped) == folders.saved_steps(whole)


def metrics(workdir):
    """Return the logged metrics of steps and evaluations, without times."""
    kinds = ("step", "train/", "val/", "end/")
    return [{k: v for k, v in x.items() if k.startswith(kinds)} for x in toy.lines(workdir)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(figure="vall/loss"), "plateau.figure: 'vall/loss' is not a metric of an evaluator"),
        (dict(mode="least"), "plateau.mode: 'least'"),
        (dict(factor=0.0), "plateau.factor: 0.0 is not in"),
        (dict(patience=-1), "plateau.patience: -1 must not"),
    ],
)
def test_invalid_settings_are_refused(fields, message):
    c = toy.config("captioner")
    c.plateau.update(fields)
    with pytest.raises(UserError, match=message):
        validate(c)
