"""Tests of tools/sweep.py: slots, retries, resuming, locking, status, tables and plots."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cap_pretrain.cli import figures
from cap_pretrain.commands import sweep
from cap_pretrain.errors import UserError
from cap_pretrain.sweeps import power_law, runner, trials
from tests import toy
from tests.tools.drawing import words_in

ROOT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = toy.CONFIGS / "quickstart.py"

# A program in place of training: behaves as its trial is named, and records its starts and end.
PROGRAM = """
import json, signal, sys, time
from pathlib import Path

arguments = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
folder = Path(arguments["workdir"])
with (folder / "starts").open("a") as file:
    file.write(f"{time.time()}\\n")
start = len((folder / "starts").read_text().splitlines())
kind = folder.name.split("_")[0]

def stop(*_):
    (folder / "saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
if kind == "slow" and start == 1:
    (folder / "metrics.jsonl").write_text('{"step": 50, "time/eta_s": 65}\\n')
    time.sleep(60)
if kind == "crash" and start <= 2:
    sys.exit(f"crash {start}")
if kind == "hopeless":
    sys.exit("no memory")
if kind == "mistake":
    print("cap_pretrain: your fault", file=sys.stderr)
    sys.exit(2)
if kind == "unwritable":
    (folder / "trial.json.tmp").mkdir()  # the record cannot be written
if kind == "napping":
    time.sleep(0.3)
lr = float(arguments["config.optim.lr"])
(folder / "metrics.jsonl").write_text(json.dumps({"step": 100, "val/loss": 2 * lr**-0.5}) + "\\n")
(folder / "ended").write_text(str(time.time()))
"""

SWEEP = """
from cap_pretrain.sweeps.trials import Trial

def sweep(arg):
    for number, name in enumerate(arg.split("+"), 1):
        yield Trial(name, CONFIG, {"optim.lr": 0.1 * number, "total_steps": 100})
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that sweeps named trials with PROGRAM and returns the exit status."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    file = tmp_path / "sweep.py"
    file.write_text(SWEEP.replace("CONFIG", repr(str(QUICKSTART))))
    monkeypatch.setattr(runner, "PROGRAM", (sys.executable, "-S", "-E", str(program)))
    monkeypatch.setattr(runner, "POLL", 0.01)

    def run(names, *options):
        return sweep.main(["run", f"{file}:{'+'.join(names)}", f"--out={tmp_path}/out", *options])

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def starts(folder):
    path = folder / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_runs_as_many_as_there_are_slots(run, out, capsys):
    names = [f"napping_{n}" for n in range(5)]
    assert run(names, "--slots=2") == 0
    begun = [(float((out / n / "starts").read_text()), 1) for n in names]
    ended = [(float((out / n / "ended").read_text()), -1) for n in names]
    now, most = 0, 0
    for _, change in sorted(begun + ended):
        now += change
        most = max(most, now)
    assert most == 2
    assert "napping_4: finished (5 of 5)" in capsys.readouterr().out


def test_crashed_trials_are_retried_and_the_others_run(run, out, capsys):
    names = ["crash", "hopeless", "mistake", "fine"]
    assert run(names) == 1
    assert [starts(out / name) for name in names] == [3, 3, 1, 1]
    said = capsys.readouterr().out
    assert "crash: exit status 1, will be retried: crash 2" in said
    assert "mistake: failed, exit status 2: cap_pretrain: your fault" in said
    assert "2 of 4 trials failed: mistake, hopeless" in said

    # Failed trials are run again, finished ones are not.
    assert run(names, "--retries=0") == 1
    assert [starts(out / name) for name in names] == [3, 4, 2, 1]
    assert "2 of 4 trials are finished already." in capsys.readouterr().out
    assert sweep.main(["status", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["crash", "finished"]
    assert lines[3].split()[:2] == ["hopeless", "failed"] and lines[3].endswith("no memory")
    assert lines[-1] == "2 finished, 2 failed"


def test_a_record_that_cannot_be_written_stops_no_trial(run, out, capsys):
    assert run(["unwritable", "napping", "fine"], "--slots=2") == 0
    assert all((out / name / "ended").exists() for name in ("unwritable", "napping", "fine"))
    said = capsys.readouterr().out
    assert f"unwritable: {out}/unwritable/trial.json was not written: " in said
    assert "(3 of 3)" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_after_saving_and_the_next_run_resumes(run, out, capsys, number):
    names = ["fine", "slow_a", "slow_b", "slow_c"]

    def interrupt():
        deadline = time.monotonic() + 20
        while not all((out / n / "metrics.jsonl").exists() for n in ("slow_a", "slow_b")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run(names, "--slots=2") == 128 + number
    thread.join()
    assert [(out / n / "saved").exists() for n in names] == [False, True, True, False]
    assert [starts(out / n) for n in names] == [1, 1, 1, 0]
    capsys.readouterr()
    sweep.main(["status", str(out)])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[1] for line in lines[:4]] == ["finished", "stopped", "stopped", "waiting"]
    assert lines[1].split()[2:4] == ["50", "1:05"]

    assert run([*names[:3], "fast"], "--slots=2") == 0  # with one trial more
    assert [starts(out / n) for n in (*names, "fast")] == [1, 2, 2, 0, 1]


def test_a_finished_trial_must_not_change(run, out, capsys):
    assert run(["fine", "mistake"]) == 1
    assert run(["fine", "mistake"], "--", "--config.optim.b1=0.5") == 2
    error = capsys.readouterr().err
    assert "fine" in error and "optim.b1 was 0.0, is now 0.5" in error
    assert [starts(out / n) for n in ("fine", "mistake")] == [1, 1]  # nothing was started
    # Logging options may change, and so may a trial that saved nothing.
    assert run(["fine"], "--", "--config.log.every_steps=7") == 0
    assert run(["mistake"], "--", "--config.optim.b1=0.5") == 1
    assert [starts(out / n) for n in ("fine", "mistake")] == [1, 2]


def test_two_runs_of_one_sweep_are_refused(run, out, capsys):
    with runner.lock(out):
        assert run(["fine"]) == 2
    assert "is running already" in capsys.readouterr().err
    assert run(["fine"]) == 0


def test_trials_of_a_runner_that_was_killed_hold_its_lock(out):
    with runner.lock(out) as file:
        process = subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno()])
    try:
        assert runner.is_locked(out)
        with pytest.raises(UserError, match="is running already"), runner.lock(out):
            pass
    finally:
        process.kill()
        process.wait()
    assert not runner.is_locked(out)


def test_a_trial_that_runs_without_a_runner_was_killed(run, out, capsys):
    run(["fine"])
    record = out / "fine" / trials.RECORD_FILE
    record.write_text(record.read_text().replace("finished", "running"))
    for held, state in ((True, "running"), (False, "killed")):
        capsys.readouterr()
        if held:
            with runner.lock(out):
                sweep.main(["status", str(out)])
        else:
            sweep.main(["status", str(out)])
        assert capsys.readouterr().out.splitlines()[2].split()[1] == state
    assert run(["fine"]) == 0 and starts(out / "fine") == 2


def test_prints_the_commands_instead(run, out, capsys):
    assert run(["a", "b", "c"], "--print", "--only=[bc]", "--", "--config.seed=3") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"python -m cap_pretrain.main --config={QUICKSTART} --config.optim.lr={lr} "
        f"--config.total_steps=100 --config.seed=3 --workdir={out}/{name}"
        for name, lr in (("b", 0.2), ("c", 0.1 * 3))
    ]
    assert not starts(out / "b")
    assert sweep.main(["status", str(out)]) == 0
    assert "3 waiting" in capsys.readouterr().out


@pytest.mark.slow
def test_tables_and_plots(run, out, tmp_path, capsys):
    assert run(["a", "b", "c", "d"]) == 0
    capsys.readouterr()
    figures = ["--figures", "val/loss"]
    assert sweep.main(["table", str(out), *figures, "--sort=val/loss", "--format=csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trial,optim.lr,val/loss" and lines[1].startswith("d,0.4,3.16")
    picture = tmp_path / "plot.svg"
    arguments = ["plot", str(out), "--x=optim.lr", "--y=val/loss"]
    assert sweep.main([*arguments, f"--out={picture}"]) == 0
    reason = "val/loss: no power law: optim.lr is a setting with a best value, not a scale"
    assert capsys.readouterr().out.startswith(reason)
    assert "optim.lr" in picture.read_text()
    for wrong, message in {
        "--out=plot.gif": "must end in .png or .svg",
        "--y=val/los": "has the metric 'val/los'. Did you mean 'val/loss'",
        "--by=objectiv": "--by: a has no field 'objectiv'",
    }.items():
        assert sweep.main([*arguments, f"--out={picture}", wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "DIR"], "not the folder of a sweep"),
        (["run", "no_such_sweep.py", "--out=DIR"], "there is no file 'no_such_sweep.py'"),
    ],
)
def test_error_messages(arguments, message, tmp_path, capsys):
    assert sweep.main([a.replace("DIR", str(tmp_path)) for a in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_sweep_is_interrupted_and_resumes(tmp_path):
    out = tmp_path / "out"
    command = [
        *(sys.executable, str(ROOT / "tools" / "sweep.py"), "run", f"--out={out}", "--slots=2"),
        "configs/sweeps/recurrent.py:size=toy,batches=8,rates=0.001+0.01+0.1,layers=1,epochs=1",
        *("--", "--config.data.scenes.length_train=200", "--config.checkpoint.every_steps=5"),
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        while not any(path.name.isdecimal() for path in out.glob("*/checkpoints/*")):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.terminate()
    assert process.wait() == 143
    first = json.loads((out / "batch=8_lr=0.001_layers=1" / trials.RECORD_FILE).read_text())
    assert first["state"] in ("stopped", "finished")
    assert subprocess.call(command, cwd=ROOT) == 0
    assert subprocess.call(command, cwd=ROOT) == 0  # which does nothing
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*/trial.json"))]
    assert [r["state"] for r in records] == ["finished"] * 3
    assert max(r["starts"] for r in records) == 2 and min(r["starts"] for r in records) == 1
    for trial in trials.read(out):
        steps = [line["step"] for line in toy.losses(out / trial.name)]
        assert steps == sorted(set(steps)) and steps[-1] == 25


def finished(out, names_and_fields, losses):
    """Write trials that are finished, with these fields and losses."""
    listing = [
        trials.Trial(name, "configs/recurrent.py:size=toy", fields)
        for name, fields in names_and_fields
    ]
    for trial, loss in zip(listing, losses, strict=True):
        (out / trial.name).mkdir(parents=True)
        line = json.dumps({"step": 1, "val/loss": loss})
        (out / trial.name / "metrics.jsonl").write_text(line + "\n")
    (out / trials.SWEEP_FILE).write_text(json.dumps([dataclasses.asdict(t) for t in listing]))


def test_two_fields_make_a_heat_map(tmp_path, capsys):
    fields = [
        (f"lr{lr}_b{size}_s{seed}", {"optim.lr": lr, "batch_size": size, "seed": seed})
        for lr, size, seed in itertools.product((0.1, 0.3), (8, 16, 32), (0, 1))
    ]
    losses = [1.5, 1.7, 2.5, 2.5, 3.0, 3.0, 4.0, 4.0, 1.2, 1.4, 9.0, 9.0]
    finished(tmp_path / "sweep", fields, losses)
    arguments = ["plot", str(tmp_path / "sweep"), "--y", "val/loss:min", "--out"]
    picture = tmp_path / "heat.svg"
    assert sweep.main([*arguments, str(picture), "--pivot", "optim.lr", "batch_size"]) == 0
    shown = words_in(picture)
    assert {"1.6", "2.5", "3", "4", "1.3", "9"} <= set(shown)  # seeds are averaged
    assert {"optim.lr", "batch_size", "val/loss:min", "0.1", "32"} <= set(shown)
    assert sweep.main([*arguments, str(picture)]) == 2
    assert "needs --x, or --pivot" in capsys.readouterr().err


def test_power_laws_need_a_scale_and_enough_points(tmp_path, capsys):
    fields = [(f"n{n}", {"total_examples": n}) for n in (100, 200, 400, 800)]
    finished(tmp_path / "sweep", fields, [2.0, 1.9, 1.2, 1.3])
    out = tmp_path / "plot.png"
    arguments = ["plot", str(tmp_path / "sweep"), "--x=total_examples", "--y=val/loss"]
    assert sweep.main([*arguments, f"--out={out}"]) == 0
    reason = "val/loss: no power law: 4 different x are too few; --min_points is 5."
    assert capsys.readouterr().out.splitlines() == [reason, f"wrote {out}"]
    points = [(100.0, 2.0), (200.0, 1.9), (400.0, 1.2)]
    sweep._check_scales("flops", points, least=3)
    with pytest.raises(UserError, match=r"learner.layers is a setting .*, not a scale"):
        sweep._check_scales("learner.layers", points, least=3)


def test_the_axes_hold_curves_and_bands():
    x = np.geomspace(1, 100, 6)
    points = {"a": [*zip(x, 5 * x**-0.5 * [1.5, 0.6, 1.2, 0.7, 1.6, 0.8], strict=True)]}
    law = power_law.fit(*np.array(points["a"]).T)
    axis = figures.new_figure(7, 5).subplots()
    sweep.draw(axis, points, {"a": law}, "x", "y")
    low, high = law.band(x)
    bottom, top = axis.get_ylim()
    assert bottom < low.min() < min(y for _, y in points["a"]) and high.max() < top
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


def test_settings_have_linear_axes_unless_they_span_a_decade():
    for x, scale in (([0.25, 0.5, 1.0], "linear"), ([1e-4, 1e-3], "log"), ([0.0, 1.0], "linear")):
        axis = figures.new_figure(7, 5).subplots()
        sweep.draw(axis, {"": [(value, 0.5 + value / 10) for value in x]}, {}, "x", "y")
        assert (axis.get_xscale(), axis.get_yscale()) == (scale, "linear")


def test_means_over_seeds(tmp_path, capsys):
    fields = [
        (f"lr{lr}_s{seed}", {"optim.lr": lr, "seed": seed})
        for lr, seed in itertools.product((0.1, 0.3), (0, 1, 2))
    ]
    finished(tmp_path / "sweep", fields, [1.5, 1.7, 1.6, 2.5, 2.5, 4.0])
    table = ["table", str(tmp_path / "sweep"), "--figures=val/loss", "--over=seed"]
    assert sweep.main([*table, "--sort=-val/loss", "--format=markdown"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 0.3 | 3 | 3.00 ± 0.87 |",
        "| 0.1 | 3 | 1.60 ± 0.10 |",
    ]
    assert sweep.main([*table, "--format=json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["val/loss sd"] == pytest.approx(0.1) and row["trials"] == 3
    for wrong, message in {
        "--over=sed": "--over: trials do not differ in 'sed'. Did you mean 'seed'",
        "--over=trial": "--over: trials do not differ in 'trial'.",
        "--over=val/loss": "--over: trials do not differ in 'val/loss'.",
        "--pivot optim.lr seed": "drop one of the two",
    }.items():
        assert sweep.main([*table, *wrong.split()]) == 2
        assert message in capsys.readouterr().err
    picture = tmp_path / "panels.svg"
    plot = ["plot", str(tmp_path / "sweep"), "--x=optim.lr", f"--out={picture}", "--y=val/loss"]
    assert sweep.main([*plot, "--y=val/loss:min"]) == 0
    assert {"val/loss", "val/loss:min"} <= set(words_in(picture))


def test_means_say_of_how_many_trials_they_are(tmp_path, capsys):
    fields = [
        (f"{k}_s{seed}", {"data.first_sizes": sizes, "seed": seed})
        for k, sizes in enumerate(([8, 16], [32]))
        for seed in (0, 1)
    ]
    finished(tmp_path / "sweep", fields, [1.5, None, 1.6, 1.8])
    table = ["table", str(tmp_path / "sweep"), "--figures", "val/loss", "val/loss", "--over=seed"]
    assert sweep.main([*table, "--format=markdown"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| [8, 16] | 2 | 1.5 (of 1) |",
        "| [32] | 2 | 1.70 ± 0.14 |",
    ]
    plot = ["plot", str(tmp_path / "sweep"), "--x=seed", "--y=val/loss", "--only=0_s1"]
    assert sweep.main([*plot, f"--out={tmp_path}/plot.png"]) == 2
    assert "--y: no trial has val/loss yet." in capsys.readouterr().err
