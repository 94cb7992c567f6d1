"""Tests of exact resume after kills, and of tools/kill_and_resume.py with fake trainers."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from cap_pretrain.cli import processes
from cap_pretrain.cli.processes import Kill, RehearsalError, Run
from cap_pretrain.commands import kill_and_resume
from tests import toy

STATISTICS = Path(__file__).parents[1] / "configs" / "with_statistics.py"
PRETRAIN = toy.CONFIGS / "pretrain.py"
SMALL = {
    **{"batch_size": 8, "data.image_size": 16, "data.workers": 2, "text.length": 16},
    **{"data.scenes.length_train": 200, "data.scenes.length_val": 20},
    **{"total_steps": 40, "log.every_steps": 1, "log.ids": True},
    **{"checkpoint.every_steps": 2, "eval.every_steps": 10},
}
SHORT = {"total_steps": 20, "model.depth": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kills", "more"),
    [
        (str(STATISTICS), 5, {}),  # CapPa with batch statistics and a moving average
        # Every kind of kill is above; each objective resumes after one between steps and one while
        # saving.
        (f"{PRETRAIN}:objective=cap,model=mu/8", 2, SHORT | {"evals.samples.when": "end"}),
        (f"{PRETRAIN}:objective=clip,model=mu/8", 2, SHORT),
        (f"{PRETRAIN}:objective=siglip,model=mu/8", 2, SHORT),
    ],
    ids=["cappa-with-statistics", "cap", "clip", "siglip"],
)
def test_a_run_killed_several_times_ends_as_one_that_was_not(
    config, kills, more, tokenizer_path, tmp_path, capfd
):
    fields = SMALL | more | {"text.tokenizer": tokenizer_path}
    steps = fields["total_steps"]
    code = kill_and_resume.main(
        [
            *(
                f"--kills={kills}",
                f"--workdir={tmp_path / 'rehearsal'}",
                "--",
                f"--config={config}",
            ),
            *(f"--config.{name}={value}" for name, value in fields.items()),
        ]
    )
    out, err = capfd.readouterr()
    assert code == 0, f"{out}\n{err}"
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        f"kill {n + 1} of {kills}" for n in range(kills)
    ]
    assert kills < 5 or any("while saving" in line for line in lines)
    assert lines[-1].startswith("the same: ") and f" metrics of {steps} steps" in lines[-1]
    killed = tmp_path / "rehearsal" / "killed"
    assert sum("data/ids" in line for line in toy.lines(killed)) >= steps
    assert "Resuming from step " in killed.with_name("killed.log").read_text()


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that replaces Python by a shell script; `$dir` is its workdir."""

    def use(script):
        path = tmp_path / "program"
        path.write_text(f'#!/bin/sh\nfor last; do :; done\ndir="${{last#--workdir=}}"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return use


def test_left_worker_processes_are_detected_and_killed(program, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.1)
    program("sleep 60 &\n mkdir $dir; exec sleep 60")
    with Run([], tmp_path / "run") as run:
        while not (tmp_path / "run").exists():
            assert not run.ended()
        run.kill(Kill("step", 0, 0.0))
        with pytest.raises(RehearsalError, match=r"processes \[\d+\] were still running"):
            run.check_nothing_left()
    run.check_nothing_left()


def test_a_save_is_distinguished_from_the_remains_of_an_earlier_process(program, tmp_path):
    folders = tmp_path / "run" / "checkpoints"
    left = folders / "4.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (folders / "2").mkdir()
    program("sleep 60")
    with Run([], tmp_path / "run") as run:
        assert run.saving() == set()
        left.rmdir()
        assert run.saving() == set()
        left.mkdir()
        assert run.saving() == {left.name}


def test_kills_come_at_every_stage_and_throughout_the_run():
    pace = kill_and_resume.Pace(steps=100, start=5.0, line=0.1, save=0.2)

    def plan(seed):
        return list(kill_and_resume.plan_kills(30, pace, random.Random(seed)))

    kills = plan(1)
    assert [kill.after for kill in kills].count("save") == 10
    assert [kill.after for kill in kills].count("start") == 5
    for number, kill in enumerate(kills):
        assert 3 * number - 1 <= kill.step <= 3 * (number + 1)
        assert 0 <= kill.seconds <= 1.2 * 5
    assert kills == plan(1)
    assert kills != plan(2)


LOG_AND_SAVE = """
mkdir -p $dir/checkpoints/1.orbax-checkpoint-tmp
echo '{"step": 1}' > $dir/metrics.jsonl
sleep 0.1
"""


def rehearse(folder, *arguments):
    return kill_and_resume.main(["--kills=3", f"--workdir={folder}", *arguments, "--", "--x=1"])


def test_a_run_too_short_for_its_kills_is_no_proof(program, tmp_path, monkeypatch, capsys):
    program(LOG_AND_SAVE)
    monkeypatch.setattr(kill_and_resume, "wait_for", lambda run, kill: False)
    monkeypatch.setattr(subprocess, "call", lambda *args, **kwargs: 0)
    assert rehearse(tmp_path / "new") == 1
    assert "the run ended after 0 of 3 kills" in capsys.readouterr().err
    assert rehearse(tmp_path / "new") == 2
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("echo 'no field' >&2; exit 2", 2),  # at once
        (f"if test $(basename $dir) = killed; then exit 2; fi; {LOG_AND_SAVE}", 1),  # on resume
        ("mkdir $dir", 2),  # nothing to compare
    ],
)
def test_a_run_that_fails_ends_the_rehearsal(script, code, program, tmp_path, capsys):
    program(script)
    assert rehearse(tmp_path / "new") == code
    message = capsys.readouterr().err
    assert message.startswith("error: ") and len(message.splitlines()) <= 2
