"""Every mesh layout trains like one device, and resumes the checkpoints of any other layout."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from cap_pretrain import train
from tests import toy
from tests.layouts import (
    LAYOUTS,
    OBJECTIVES,
    Training,
    bytes_per_device,
    config,
    on_eight_devices,
)

STEPS, SAVED = 20, 12


def straight_run(training, workdir):
    """Return all losses, the state saved midway (NumPy), and the final bytes per device."""
    state, before = training.go_on(training.init(), SAVED)
    training.save(state, workdir)
    at_save = on_host(state)
    state, after = training.go_on(state, STEPS - SAVED)
    held = [bytes_per_device(tree) for tree in (state.params, state.opt_state)]
    return before + after, at_save, held


def on_host(state):
    return jax.tree.map(np.array, jax.device_get(state))


def curves(objective, folder, layouts, moves):
    """Train on each of `layouts`, saving in `folder/LAYOUT`, then resume on other layouts.

    Every restored state is compared bit by bit with the one that was saved, so for each layout it
    suffices to train on after the first move to it.

    Returns:
        The losses of the uninterrupted runs by layout; the losses after the first of `moves`
        (layout that saved, layout that resumes) to each layout; and the bytes of parameters and of
        optimizer state on one device, by layout.
    """
    c = config(objective, total_steps=STEPS)
    trainings = {name: Training(c, name) for name in layouts}
    straight, states, moved, held = {}, {}, {}, {}
    for name, training in trainings.items():
        straight[name], states[name], held[name] = straight_run(training, Path(folder) / name)
    for source, target in moves:
        state = trainings[target].restored(Path(folder) / source, SAVED)
        toy.assert_same(on_host(state), states[source])
        if target not in moved:
            moved[target] = trainings[target].go_on(state, STEPS - SAVED)[1]
    return straight, moved, held


def assert_same_curve(losses, reference, name):
    """Assert that losses equal the last ones of `reference` within 1e-4, relative."""
    assert len(set(reference)) == len(reference)
    np.testing.assert_allclose(losses, reference[-len(losses) :], rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_layout_gives_the_losses_of_one_device_and_resumes_any(objective, tmp_path):
    names = list(LAYOUTS)
    moves = list(itertools.permutations(names, 2))
    if objective != "cappa":  # fewer, and each resumes on one other layout
        names = ["one", "fsdp", "all"]
        moves = list(zip(names, names[1:] + names[:1], strict=True))
    call = (objective, str(tmp_path), names, moves)
    ((straight, moved, held),) = on_eight_devices(curves, [call])
    for name, losses in straight.items():
        assert_same_curve(losses, straight["one"], name)
    assert moved.keys() == straight.keys()
    for name, losses in moved.items():
        assert_same_curve(losses, straight["one"], f"another layout -> {name}")
    np.testing.assert_allclose(held["fsdp"], np.array(held["one"]) / 8, rtol=0.05)


def run(layout, workdir, tokenizer):
    """Train as the command line does; only the layout may differ."""
    axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), LAYOUTS[layout], strict=True))
    fields = {"text__tokenizer": tokenizer, "checkpoint__every_steps": SAVED, "log__ids": True}
    train.run(config("cappa", total_steps=STEPS, **fields, **axes), Path(workdir))


def half_done(workdir, copy):
    """Copy a finished run and restore the copy to its state at step `SAVED`."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= SAVED]
    (copy / "metrics.jsonl").write_text("".join(kept))
    return str(copy)


@pytest.mark.slow
def test_a_run_moves_between_one_device_and_eight(tokenizer_path, tmp_path):
    """As a user would: the same workdir and command on other devices."""
    tokenizer, one, eight = str(tokenizer_path), tmp_path / "one", tmp_path / "all"
    run("one", one, tokenizer)
    moved = half_done(one, tmp_path / "one_then_all")
    on_eight_devices(run, [("all", str(eight), tokenizer), ("all", moved, tokenizer)])
    back = half_done(eight, tmp_path / "all_then_one")
    run("one", back, tokenizer)

    def logged(workdir, name):
        return {line["step"]: line[name] for line in toy.lines(Path(workdir)) if name in line}

    reference = logged(one, "train/loss")
    assert list(reference) == [*range(1, STEPS + 1)]
    for workdir in (eight, moved, back):
        losses = logged(workdir, "train/loss")
        assert list(losses) == list(reference)
        assert_same_curve([*losses.values()], [*reference.values()], str(workdir))
        assert logged(workdir, "data/ids") == logged(one, "data/ids")
