"""Tests of tools/bench_step.py: its figures, its fallbacks, and a run on tiny models."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cap_pretrain.errors import UserError
from tests import toy
from tests.parity import require
from tools import bench_step, bench_step_candidates
from tools.bench_step_candidates import Case, OutOfMemoryError, Variant

ROOT = toy.CONFIGS.parent
CAP = "configs/pretrain.py:objective=cap,model=mu/16"


def worker(name, seconds, kind="ours", **facts):
    return SimpleNamespace(
        name=name,
        variant=Variant(name, kind),
        seconds=seconds,
        cpu_seconds=seconds,
        memory=2**30,
        facts={"parameters": 7, "compile_seconds": None, **facts},
    )


def test_figures_follow_from_the_seconds_of_blocks():
    facts = dict(flops_per_step=3e9, peak_flops=1e10, batch_size=6, platform="gpu")
    ours = worker("ours", [1.0, 4.0, 2.0], **facts, predicted_seconds=1.5)
    torch = worker("torch", [2.0, 4.0, 6.0], "torch")
    found = bench_step.records(Case("cap", CAP), [ours, torch])
    assert [r["step_seconds"] for r in found] == [2, 4]
    assert [r["quartiles"] for r in found] == [[1.5, 3], [3, 5]]
    assert [r["examples_per_second"] for r in found] == [3, 1.5]
    assert [r["mfu"] for r in found] == [0.15, 0.075]
    assert [r["speed"] for r in found] == [2, 1]  # by rounds 2, 1, 3
    header, _, *rows = bench_step.table(found).splitlines()
    assert [cell.strip() for cell in header.split("|")][-3:-1] == ["speed", "predicted ms"]
    assert "| 2,000 | 1,500 - 3,000 | 3 | 15.0% | 1.00 |  | 2.000 | 1,500 |" in rows[0]

    alone = bench_step.records(Case("cap", CAP, together=False), [ours, worker("b", [1.0, 1.0])])
    assert [r["speed"] for r in alone] == [1, 2]


def test_candidates_must_have_the_same_parameters():
    workers = [worker("ours", [1.0]), worker("torch", [1.0], "torch")]
    workers[1].facts["parameters"] = 8
    with pytest.raises(UserError, match="differ in their parameters.*7.*8"):
        bench_step.records(Case("cap", CAP), workers)


def test_short_memory_separates_candidates_then_halves_the_batch(monkeypatch):
    tried = []

    def measure(case, *_):
        tried.append((case.batch_per_device, case.together))
        if case.batch_per_device > 2:
            raise OutOfMemoryError
        return []

    monkeypatch.setattr(bench_step_candidates, "measure", measure)
    both = [Variant("a", "ours"), Variant("b", "ours")]
    case, _ = bench_step_candidates.fitting(Case("cap", CAP, 8), both, [], 1)
    assert tried == [(8, True), (8, False), (4, False), (2, False)] and case.batch_per_device == 2
    monkeypatch.setattr(bench_step_candidates, "measure", lambda case, *_: measure(Case("", "", 3)))
    with pytest.raises(UserError, match="does not fit"):
        bench_step_candidates.fitting(Case("cap", CAP), both[:1], [], 1)


def test_against_takes_settings_and_variables(capsys):
    arguments = ["--suite=cpu", "--against", "A='1 2' --config.model.unroll=2", "--compare=torch"]
    arguments += ["--against", "--config.model.remat=lean"]
    arguments += [
        "--against",
        "--config=configs/pretrain.py:objective=clip --config.model.unroll=3",
    ]
    _, ours, lean, clip, torch = bench_step.candidates(*bench_step._parse(arguments))
    assert ours.overrides == ("--config.optim.name=adamw", "--config.model.unroll=2")
    assert lean.overrides[1:] == ("--config.model.remat=lean",) and not lean.environment
    assert clip.config == "configs/pretrain.py:objective=clip" and not lean.config
    assert clip.overrides[1:] == ("--config.model.unroll=3",) and not clip.environment
    assert ours.environment == (("A", "1 2"),) and torch.kind == "torch"
    assert bench_step.main(["--suite=cpu", "--against=unroll"]) == 2
    assert "--against: 'unroll'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parity
def test_measures_ours_and_torch(tmp_path):
    require("torch")
    command = [sys.executable, "tools/bench_step.py", f"--config={CAP}", "--compare=torch"]
    command += ["--steps=2", "--threads=1", "--config.batch_size=4", "--config.data.image_size=32"]
    command += ["--config.text.vocab_size=50", "--config.text.length=6"]
    command += [f"--json={tmp_path / 'found.json'}"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [r["candidate"] for r in found] == ["ours", "torch"]
    assert all(r["step_seconds"] > 0 and r["optimizer"] == "adamw" for r in found)
    assert len([line for line in done.stdout.splitlines() if line.startswith("| ")]) == 4
