"""The loop: what a run leaves behind, exact resume, and how it ends when it must."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
import sentencepiece
from ml_collections import ConfigDict

from cap_pretrain import evals, train
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.data.text.tokenizers import train_sentencepiece
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context
from cap_pretrain.telemetry.metrics import MetricsWriter
from cap_pretrain.training import setup, watch
from tests import quick, toy

STEPS = 4
# Everything random that a step may draw, and an average besides the parameters.
CAPPA = ("captioner", {"parallel_fraction": 0.75}, {"model__dropout": 0.2, "optim__ema": 0.9})
CLIP = ("dual_encoder", {"contrast": "softmax"}, {"optim__name": "adamw"})
LOCCA = (
    "joint",
    {
        "parts": {
            "locca": {"name": "locca", "parallel_fraction": 0.5, "bins": 17},
            "siglip": {"name": "dual_encoder", "contrast": "sigmoid"},
        },
        "weights": {"locca": "1", "siglip": "0.5"},
    },
    {"data__regions": 2, "model__depth": 1, "model__decoder_depth": 1},
)
# What is about the loop alone.
QUICK = (quick.NAME, {}, {"optim__ema": 0.9})


def make_config(case, tokenizer_path, **fields):
    learner, options, more = case
    fields = {"text__tokenizer": str(tokenizer_path), "checkpoint__every_steps": 2} | more | fields
    return toy.config(learner, options, **{"total_steps": STEPS, **fields})


class PowerCut(BaseException):
    pass


def sigterm_in(step, monkeypatch):
    """Has SIGTERM come while that step of the next run is computed."""
    put, calls = sharding.put_batch, []

    def put_batch(batch, mesh):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, mesh)

    monkeypatch.setattr(sharding, "put_batch", put_batch)


def power_cut_after(step, monkeypatch, when="step"):
    """Ends the next run when it has logged that step, or the figure `when` of it."""
    write = MetricsWriter.write

    def write_then_die(self, now, metrics):
        write(self, now, metrics)
        if now == step and when in {"step", *metrics}:
            raise PowerCut

    monkeypatch.setattr(MetricsWriter, "write", write_then_die)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tokenizer_path):
    """Workdirs of uninterrupted runs, by case."""
    workdirs = {}

    def of(case):
        if case[0] not in workdirs:
            workdirs[case[0]] = tmp_path_factory.mktemp(case[0])
            train.run(make_config(case, tokenizer_path), workdirs[case[0]])
        return workdirs[case[0]]

    return of


@pytest.mark.parametrize(
    ("case", "stop", "at", "goes_on_from"),
    [
        (QUICK, power_cut_after, 3, 2),  # from the last save; step 3 is done again
        pytest.param(CAPPA, power_cut_after, 3, 2, marks=pytest.mark.slow),
        (QUICK, sigterm_in, 1, 1),  # saved where it was stopped
        pytest.param(CAPPA, sigterm_in, 1, 1, marks=pytest.mark.slow),
        pytest.param(CLIP, sigterm_in, 3, 3, marks=pytest.mark.slow),
        pytest.param(LOCCA, sigterm_in, 1, 1, marks=pytest.mark.slow),
    ],
    ids=[
        *("quick-power-cut", "cappa-power-cut", "quick-sigterm", "cappa-sigterm", "clip-sigterm"),
        "locca+siglip-sigterm",
    ],
)
def test_a_run_that_was_stopped_goes_on_exactly(
    case, stop, at, goes_on_from, straight, tokenizer_path, tmp_path, monkeypatch, capsys
):
    config = make_config(case, tokenizer_path)
    whole = straight(case)
    with monkeypatch.context() as patch:
        stop(at, patch)
        with pytest.raises((watch.Stopped, PowerCut)):
            train.run(config, tmp_path)
    assert [line["step"] for line in toy.losses(tmp_path)] == list(range(1, at + 1))
    capsys.readouterr()
    train.run(config, tmp_path)
    assert f"Resuming from step {goes_on_from}." in capsys.readouterr().out

    assert toy.losses(tmp_path) == toy.losses(whole)
    states = [toy.saved_state(config, w, vocab_size(w), STEPS) for w in (whole, tmp_path)]
    toy.assert_same(*states)
    assert states[0].step == STEPS


def vocab_size(workdir):
    path = workdir / "tokenizer" / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()


def test_a_finished_run_says_so_and_does_nothing(straight, tokenizer_path, capsys):
    workdir = straight(QUICK)
    before = (workdir / "metrics.jsonl").read_bytes()
    train.run(make_config(QUICK, tokenizer_path), workdir)
    assert f"Already at step {STEPS} of {STEPS}: nothing to do." in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_an_evaluation_that_a_stop_prevented_is_made_up_for_once(
    straight, tokenizer_path, tmp_path
):
    workdir = shutil.copytree(straight(QUICK), tmp_path / "run")
    config = make_config(QUICK, tokenizer_path)
    config.evals = ConfigDict({"late": evals.defaults("loss", limit=8)})
    train.run(config, workdir)
    result = workdir / "evals" / "late" / f"{STEPS}.json"
    assert json.loads(result.read_text())["examples"] == 8
    assert toy.lines(workdir)[-1]["late/loss"] == json.loads(result.read_text())["loss"]
    before = (result.stat().st_mtime_ns, len(toy.lines(workdir)))
    train.run(config, workdir)
    assert (result.stat().st_mtime_ns, len(toy.lines(workdir))) == before


@pytest.mark.slow
def test_of_two_evaluations_only_the_one_that_a_kill_prevented_is_made_up_for(
    straight, tokenizer_path, tmp_path, monkeypatch
):
    config = make_config(QUICK, tokenizer_path, eval__every_steps=2)
    config.evals = ConfigDict({name: evals.defaults("loss", limit=8) for name in ("a", "b")})
    train.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        power_cut_after(2, patch, when="a/loss")
        with pytest.raises(PowerCut):
            train.run(config, tmp_path / "cut")
    assert "b/loss" not in toy.lines(tmp_path / "cut")[-1]
    train.run(config, tmp_path / "cut")
    figures = [
        [(line["step"], k, v) for line in toy.lines(w) for k, v in line.items() if "/loss" in k]
        for w in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 4 + 2 * 2  # steps, and evaluations


def test_the_newest_checkpoints_and_every_nth_are_kept(straight):
    kept = sorted(int(p.name) for p in (straight(QUICK) / "checkpoints").iterdir())
    assert kept == [2, 4]


@pytest.mark.parametrize(
    ("when", "name"), [("before", "loss"), ("after", "param_norm")], ids=["loss", "update"]
)
def test_what_is_not_finite_stops_the_run_and_spares_the_checkpoints(
    when, name, straight, tokenizer_path, tmp_path, monkeypatch
):
    """The parameters are ruined before or after the third step; the step is the loop's own."""
    config = make_config(QUICK, tokenizer_path, checkpoint__every_steps=1)
    make, calls = setup.make_train_step, []

    def ruin(params):
        with jax.transfer_guard("allow"):
            return jax.tree.map(lambda p: p * jnp.nan, params)

    def make_train_step(*args):
        take = make(*args)

        def take_and_ruin(state, batch, requests=None):
            calls.append(1)
            if len(calls) == 3 and when == "before":
                state = state.replace(params=ruin(state.params))
            state, metrics = take(state, batch, requests)
            if len(calls) == 3 and when == "after":
                metrics["param_norm"] = ruin(metrics["param_norm"])
            return state, metrics

        return take_and_ruin

    monkeypatch.setattr(setup, "make_train_step", make_train_step)
    with pytest.raises(UserError, match=f"step 3: {name} is nan") as error:
        train.run(config, tmp_path)
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [1, 2]
    size = vocab_size(tmp_path)
    toy.assert_same(
        toy.saved_state(config, tmp_path, size, 2),
        toy.saved_state(config, straight(QUICK), size, 2),
    )


def test_an_evaluation_gives_way_to_a_signal_and_is_made_up_for(
    tokenizer_path, tmp_path, monkeypatch
):
    """The step is evaluated but not due to be saved: it is saved then."""
    config = make_config(QUICK, tokenizer_path, eval__every_steps=3, checkpoint__every_steps=4)
    config.evals = ConfigDict({"val": evals.defaults("loss", limit=8)})
    batches = Context.batches

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return batches(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "batches", interrupted)
        with pytest.raises(watch.Stopped, match="SIGINT: stopped after step 3") as stopped:
            train.run(config, tmp_path)
    assert stopped.value.exit_code == 130 and saved_steps(tmp_path) == [3]
    assert not (tmp_path / "evals").exists()
    train.run(config, tmp_path)
    steps = sorted(int(p.stem) for p in (tmp_path / "evals" / "val").iterdir())
    assert steps == [3, STEPS]
    config = make_config(QUICK, tokenizer_path, checkpoint__best="val/loss", eval__every_steps=1)
    config.evals = ConfigDict({"val": evals.defaults("loss", limit=8)})
    train.run(config, tmp_path / "best")
    assert saved_steps(tmp_path / "best") == [3, 4]  # each was saved; the last is the best


def test_the_examples_seen_are_logged_step_by_step(tokenizer_path, tmp_path):
    seen = []
    for name, fields in (("a", {}), ("b", {"data__workers": 1}), ("c", {"seed": 1})):
        config = make_config(QUICK, tokenizer_path, log__ids=True, log__every_steps=3, **fields)
        train.run(config, tmp_path / name)
        lines = [line for line in toy.lines(tmp_path / name) if "train/loss" not in line]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        seen.append([line["data/ids"] for line in lines])
    assert seen[0] == seen[1] and len(set(seen[0])) == STEPS
    assert not set(seen[0]) & set(seen[2])


def test_a_run_goes_on_with_another_config_only_if_told(straight, tokenizer_path, tmp_path, capsys):
    workdir = shutil.copytree(straight(QUICK), tmp_path / "run")
    before = (workdir / "config.json").read_bytes()
    config = make_config(QUICK, tokenizer_path)
    config.total_steps = STEPS + 1
    with pytest.raises(UserError, match="total_steps was 4, is now 5"):
        train.run(config, workdir)
    assert (workdir / "config.json").read_bytes() == before
    train.run(config, workdir, ["total_steps"])
    assert "Resuming from step 4.\ntotal_steps was 4, is now 5" in capsys.readouterr().out
    assert toy.losses(workdir)[-1]["step"] == STEPS + 1
    assert (workdir / f"config.until_{STEPS}.json").read_bytes() == before
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == STEPS + 1


def test_no_step_is_taken_back(straight, tokenizer_path, tmp_path):
    workdir = shutil.copytree(straight(QUICK), tmp_path / "run")
    before = (workdir / "config.json").read_bytes()
    config = make_config(QUICK, tokenizer_path, total_steps=STEPS - 1)
    with pytest.raises(UserError, match=f"end at step {STEPS - 1}, but .* reached step {STEPS}"):
        train.run(config, workdir, ["total_steps"])
    assert (workdir / "config.json").read_bytes() == before


def test_every_config_that_led_to_a_state_is_kept(tmp_path):
    def start(seed, at):
        train.keep_config(toy.config(seed=seed), tmp_path, at)
        found = {p.name: json.loads(p.read_bytes())["seed"] for p in tmp_path.glob("config*")}
        assert found.pop("config.json") == seed
        return found

    assert start(1, 0) == {}
    assert start(2, 0) == {}  # the first start left nothing
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert start(2, 3) == {}
    assert start(3, 3) == {"config.until_3.json": 2}
    assert start(4, 3) == {"config.until_3.json": 2, "config.until_3.2.json": 3}
    assert len(start(5, 3)) == 3


def test_a_tokenizer_that_does_not_fit_the_checkpoint(straight, tokenizer_path, tmp_path):
    workdir = shutil.copytree(straight(QUICK), tmp_path / "run")
    train_sentencepiece(["a red square", "a blue circle"] * 9, workdir / "tokenizer", 30)
    with pytest.raises(UserError, match="tokenizer.model: is not the file that .*checkpoints/4"):
        train.run(make_config(QUICK, tokenizer_path), workdir)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [("learner__width", 8, "model"), ("optim__name", "adamw", "optimizer")],
)
def test_a_checkpoint_of_another_model_is_not_gone_on_from(
    field, value, what, straight, tokenizer_path, tmp_path
):
    workdir = shutil.copytree(straight(QUICK), tmp_path / "run")
    config = make_config(QUICK, tokenizer_path, **{field: value})
    match = f"holds another {what} than this config describes"
    with pytest.raises(UserError, match=match) as error:
        train.run(config, workdir, ["all"])
    assert len(str(error.value).splitlines()) == 2
    assert saved_steps(workdir) == [2, 4]


def test_without_a_checkpoint_nothing_binds_the_run(straight, tokenizer_path, tmp_path):
    workdir = shutil.copytree(straight(QUICK), tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    another = {"learner__width": 8, "optim__name": "adamw"}
    config = make_config(QUICK, tokenizer_path, total_steps=1, **another)
    train.run(config, workdir)
    assert [line["step"] for line in toy.losses(workdir)] == [1]


def test_saving_by_minutes(tokenizer_path, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "minutes_passed", lambda self: True)
    fields = {"checkpoint__every_steps": 100, "checkpoint__keep_last": 9, "log__every_steps": 2}
    train.run(make_config(QUICK, tokenizer_path, total_steps=5, **fields), tmp_path)
    assert saved_steps(tmp_path) == [2, 4, 5]


@pytest.mark.slow
def test_sigterm_ends_the_program_with_143_after_saving(tokenizer_path, tmp_path):
    command = [
        *(sys.executable, "-m", "cap_pretrain.main"),
        *(f"--config={toy.CONFIGS / 'quickstart.py'}", f"--workdir={tmp_path}"),
        *("--config.model.width=64", "--config.model.depth=1", "--config.batch_size=8"),
        *("--config.data.image_size=24", f"--config.text.tokenizer={tokenizer_path}"),
        *(
            "--config.total_steps=100000",
            "--config.log.every_steps=1",
            "--config.eval.every_share=1",
        ),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    stopped_at = toy.losses(tmp_path)[-1]["step"]
    assert re.search(rf"Saved step {stopped_at} in \d+\.\d s after SIGTERM\.", stdout), stdout
    assert f"stopped after step {stopped_at}, which is saved" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()
    steps = stopped_at + 2
    again = [a for a in command if "total_steps" not in a] + [f"--config.total_steps={steps}"]
    refused = subprocess.run(again, capture_output=True, text=True)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 2, refused.stderr
    assert f"total_steps was 100000, is now {steps}" in refused.stderr
    again.append("--allow_changes=total_steps")
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Resuming from step {stopped_at}." in done.stdout
    assert [line["step"] for line in toy.losses(tmp_path)] == list(range(1, steps + 1))
