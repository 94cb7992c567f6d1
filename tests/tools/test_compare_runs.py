"""Tests of tools/compare_runs.py: it reports every kind of difference, and nothing else."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.checkpoints.stored import load_arrays
from cap_pretrain.commands import compare_runs
from cap_pretrain.training.step import TrainState
from tests import toy

TOOL = Path(compare_runs.__file__).parents[2] / "tools" / "compare_runs.py"
TIMES = itertools.count()
KERNEL = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def state(step, **parts):
    """Return a training state with every part of a checkpoint and hard values (NaN, inf, 0)."""
    weights = {"kernel": KERNEL * step, "bias": np.array([0.0, np.nan, np.inf], np.float32)}
    parts = {
        "params": {"encoder": weights},
        "stats": {"mean": np.zeros(3, np.float32)},
        "opt_state": ({"mu": jnp.ones(5, jnp.bfloat16)}, np.int32(step)),
        "counts": {"broken": np.int32(0)},
        "ema": {"encoder": weights},
    } | parts
    return jax.tree.map(jnp.asarray, TrainState(step=np.int32(step), **parts))


def save(workdir, *states):
    checkpoints = Checkpoints(workdir, toy.config())
    for each in states:
        checkpoints.save(each)
    checkpoints.close()


def log(workdir, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)


def lines():
    """Yield the log of a run of four steps, with other times in each call."""
    for step in range(1, 5):
        yield {"step": step, "train/loss": 5 - step / 3, "time/step_ms": next(TIMES)}
        yield {"step": step, "data/ids": 1_000_000_007.0 * step}
    yield {"step": 4, "val/loss": 2.5, "val/accuracy": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a workdir that tests must not change."""
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, state(2), state(4))
    log(workdir, lines())
    return workdir


@pytest.fixture
def other(run, tmp_path):
    """Return a copy of `run` to be changed, with other times in its log."""
    workdir = shutil.copytree(run, tmp_path / "other")
    log(workdir, [*lines(), {"step": 3, "spike/loss": 7.0}])
    return workdir


def save_instead(workdir, *changed):
    for each in changed:
        shutil.rmtree(workdir / "checkpoints" / str(each.step))
    save(workdir, *changed)


def test_a_copy_is_the_same_whatever_time_it_took(run, other):
    found = compare_runs.compare(run, other)
    assert found.differences == ()
    # Loss and ids of four steps, and two metrics of an evaluation; 2 + 2 + 2 + 1 + 2 leaves.
    assert found.compared == (
        "10 metrics of 4 steps; 2 checkpoints (the last of step 4), each 9 arrays of 41 numbers"
    )


def test_checkpoints_by_their_paths(run, other, capsys):
    def main(a, b):
        status = compare_runs.main([str(run / a), str(other / b)])
        return status, capsys.readouterr().out.splitlines()[-1]

    same = "the same: two checkpoints, each 9 arrays of 41 numbers"
    for paths in (("checkpoints/2", "checkpoints/2"), ("", "checkpoints/4")):
        assert main(*paths) == (0, same)
    status, line = main("checkpoints/2", "checkpoints/4")
    assert status == 1 and line.startswith("checkpoint 2 and 4: learner/")


def one_bit(array, index=-1):
    bits = np.array(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    bits[index] ^= 1
    return bits.view(array.dtype).reshape(array.shape)


BIAS = np.array([0.0, np.nan, np.inf], np.float32)
CHANGES = {
    "one bit": (
        {"params": {"encoder": {"kernel": one_bit(KERNEL * 4), "bias": BIAS}}},
        "learner/params/encoder/kernel differs in 1 of 12 elements, by 4.77e-07 at most",
    ),
    "sign of zero": (
        {"params": {"encoder": {"kernel": KERNEL * 4, "bias": BIAS * [-1, 1, 1]}}},
        "learner/params/encoder/bias differs in 1 of 3 elements, by 0 at most",
    ),
    "another NaN": (
        {"params": {"encoder": {"kernel": KERNEL * 4, "bias": one_bit(BIAS, 1)}}},
        "learner/params/encoder/bias differs in 1 of 3 elements, by nan at most",
    ),
    "shape": (
        {"params": {"encoder": {"kernel": KERNEL.T * 4, "bias": BIAS}}},
        "learner/params/encoder/kernel is float32[3, 4] and float32[4, 3]",
    ),
    "statistics": (
        {"stats": {"mean": np.array([0, 0, 1], np.float32)}},
        "learner/stats/mean differs in 1 of 3 elements, by 1 at most",
    ),
    "average": (
        {"ema": {"encoder": {"kernel": KERNEL, "bias": BIAS}}},
        "learner/ema/encoder/kernel differs in 12 of 12 elements, by 3 at most",
    ),
    "optimizer": (
        {"opt_state": ({"mu": jnp.array([1, 1, 1.5, 1, 2], jnp.bfloat16)}, np.int32(4))},
        "optimizer/opt_state/0/mu differs in 2 of 5 elements, by 1 at most",
    ),
    "optimizer's count": (
        {"opt_state": ({"mu": jnp.ones(5, jnp.bfloat16)}, np.int32(3))},
        "optimizer/opt_state/1 differs in 1 of 1 elements, by 1 at most",
    ),
    "one array less": (
        {"stats": {}},
        "learner/stats/mean is in A only",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_array_that_differs_is_named_and_by_how_much(name, run, other):
    parts, message = CHANGES[name]
    save_instead(other, state(4, **parts))
    compared = 8 if name == "one array less" else 9
    (difference,) = compare_runs.compare(run, other).differences
    assert difference == f"checkpoint 4: {message}; 1 arrays differ, {compared} compared"


def test_the_first_checkpoint_that_differs_is_named(run, other):
    params = {"encoder": {"kernel": KERNEL, "bias": BIAS}}
    save_instead(other, state(2, params=params), state(4, params=params))
    (difference,) = compare_runs.compare(run, other).differences
    assert difference.startswith("checkpoint 2: learner/params/encoder/kernel differs in 12 of 12")


def test_a_run_that_ended_earlier_differs_though_all_it_saved_is_the_same(run, other):
    shutil.rmtree(other / "checkpoints" / "4")
    log(other, [line for line in lines() if line["step"] <= 3])
    assert compare_runs.compare(run, other).differences == (
        "metrics: logged in A only: 1 steps (4)",
        "last checkpoint: of step 4 in A, 2 in B",
    )


def change(name, step, value):
    """Return the log with one metric changed."""
    changed = [dict(line) for line in lines()]
    for line in changed:
        if line["step"] == step and name in line:
            line[name] = value
    return changed


@pytest.mark.parametrize(
    ("logged", "message"),
    [
        (
            change("train/loss", 3, 4.0 + 1e-9),
            "step 3: train/loss 4.0 and 4.000000001, difference 1e-09 (relative 2.5e-10); "
            "1 differ, 10 compared",
        ),
        (change("data/ids", 2, 7.0), "step 2: data/ids 2000000014.0 and 7.0, difference 2e+09"),
        (change("train/loss", 1, None), "step 1: train/loss 4.666666666666667 and not finite"),
        (change("val/loss", 4, 2.5 + 2**-50), "step 4: val/loss 2.5 and 2.500000000000001"),
        ([*lines()][:-1], "step 4: val/accuracy is logged in A only; 2 differ, 8 compared"),
        ([*lines(), {"step": 3, "train/loss": 4.0}], "step 3: train/loss again is logged in B"),
        ([line for line in lines() if line["step"] != 2], "logged in A only: 1 steps (2)"),
        ([*lines(), {"step": 5, "train/loss": 1.0}], "logged in B only: 1 steps (5)"),
    ],
    ids=["loss", "ids", "null", "evaluation", "not there", "repeated", "skipped", "longer"],
)
def test_the_first_metric_that_differs_is_named_and_by_how_much(logged, message, run, other):
    log(other, logged)
    (difference,) = compare_runs.compare(run, other).differences
    assert difference.startswith(f"metrics: {message}")


def test_losses_alone_may_differ_a_little_and_what_was_read_may_not(run, other):
    shutil.rmtree(other / "checkpoints")
    near = [dict(line) for line in lines()]
    for line in near:
        line |= {name: 1.00005 * line[name] for name in line if name.endswith("loss")}
        line |= {"train/grad_norm": 9.0}
    log(other, near)
    assert compare_runs.compare(run, other, only_losses_within=1e-4).differences == ()
    (difference,) = compare_runs.compare(run, other, only_losses_within=1e-5).differences
    assert "step 1: train/loss" in difference and "5 differ" in difference
    log(other, change("data/ids", 3, 1_000_000_007.0 * 3 + 1))
    (difference,) = compare_runs.compare(run, other, only_losses_within=1e-4).differences
    assert "step 3: data/ids" in difference and "1 differ" in difference


def no_workdir(workdir):
    shutil.rmtree(workdir)


def no_common_checkpoint(workdir):
    shutil.rmtree(workdir / "checkpoints")
    save(workdir, state(3))


def torn_line(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(text[:-20])


def flipped_bytes(workdir):
    folder = workdir / "checkpoints" / "4" / "learner"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_workdir, "is not the workdir of a run"),
        (no_common_checkpoint, "no checkpoint in common: "),
        (torn_line, "metrics.jsonl, line 10: is not JSON"),
        (flipped_bytes, "4: is corrupt"),
    ],
)
def test_error_messages_have_one_or_two_lines(damage, message, run, other, capfd):
    damage(other)
    assert compare_runs.main([str(run), str(other)]) == 2
    out, err = capfd.readouterr()
    assert message in err and len(err.splitlines()) <= 2 and out == ""


@pytest.mark.slow
def test_the_command_exits_with_0_or_1(run, other):
    assert compare_runs.main([str(run), str(run)]) == 0
    save_instead(other, state(4, stats={"mean": np.ones(3, np.float32)}))
    log(other, change("train/loss", 2, 0.0))
    done = subprocess.run(
        [sys.executable, TOOL, run, other],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TOOL.parent.parent)},
    )
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"different: A is {run}, B is {other}",
        "metrics: step 2: train/loss 4.333333333333333 and 0.0, difference 4.33 (relative 1); "
        "1 differ, 10 compared",
        "checkpoint 4: learner/stats/mean differs in 3 of 3 elements, by 1 at most; "
        "1 arrays differ, 9 compared",
    ]
    assert done.stderr == ""


def test_the_fixture_has_arrays(run):
    # A comparison of no arrays would find no difference.
    arrays = load_arrays(run, 4)
    assert len(arrays) == 9 and np.array_equal(arrays["learner/ema/encoder/kernel"], KERNEL * 4)
