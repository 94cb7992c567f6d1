"""A run whose workdir is in a bucket trains, dies and resumes like one on a disk."""

import os
import socket
import subprocess
import sys

import pytest

from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.checkpoints.stored import load_arrays
from cap_pretrain.telemetry.metrics import read_metrics
from tests import toy

RUN, NAME, STEPS = "gs://bucket/runs/a", "bucket/runs/a", 6
CONFIG = f"""
from ml_collections import ConfigDict

from cap_pretrain.evals import defaults
from tests import toy


def get_config():
    evals = ConfigDict({{"val": defaults("loss", limit=8)}})
    every = {{"checkpoint__every_steps": 2, "eval__every_steps": 3, "log__ids": True}}
    own = {{"total_steps": {STEPS}, "mesh__data": 2, "model__depth": 1}}
    return toy.config("captioner", evals=evals, **every, **own)
"""


def start(workdir, cwd, processes=1):
    """Start the processes of a run on two devices."""
    command = [sys.executable, "-m", "cap_pretrain.main", f"--workdir={workdir}"]
    (cwd / "tiny.py").write_text(CONFIG)
    command += ["--config=tiny.py"]
    environment = {**os.environ, "PYTHONPATH": str(toy.CONFIGS.parent)}
    devices = 2 // processes
    environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if processes > 1:
        command += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [
        subprocess.Popen(
            [*command, *([f"--process_id={n}"] if processes > 1 else [])],
            env=environment,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for n in range(processes)
    ]


def figures(workdir):
    """Return the logged figures by step and name, without times; each must be there once."""
    found = {}
    for line in read_metrics(workdir):
        for name, value in line.items():
            if not name.startswith(("time/", "step")):
                assert (line["step"], name) not in found
                found[line["step"], name] = value
    return found


@pytest.mark.slow
def test_a_run_killed_while_it_saves_resumes_on_another_number_of_hosts(bucket, tmp_path):
    (local,) = start(tmp_path / "local", tmp_path)
    assert local.wait(300) == 0, local.stdout.read()
    killed = []

    def kill():
        if not killed:
            killed.append(bucket.objects[f"{NAME}/run.lock"].data)
            first.kill()

    bucket.on("write", f"{NAME}/checkpoints/4/learner/*", kill)
    (first,) = start(RUN, tmp_path)
    assert first.wait(300) == -9, first.stdout.read()
    assert saved_steps(RUN) == [2] and bucket.names(f"{NAME}/checkpoints/4/")
    assert f'"process": {first.pid}'.encode() in killed[0]
    assert {step for step, name in figures(RUN) if name == "train/loss"} >= {1, 2, 3, 4}
    bucket.heal()
    bucket.log.clear()
    hosts = start(RUN, tmp_path, processes=2)
    printed = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], printed
    assert not bucket.requests("bucket")  # so that the permission to use objects suffices
    assert "Resuming from step 2" in printed[0] and "step" not in printed[1]
    assert saved_steps(RUN) == saved_steps(tmp_path / "local") == [4, STEPS]
    found, expected = figures(RUN), figures(tmp_path / "local")
    assert found == expected and {s for s, n in found if n == "data/ids"} == {*range(1, STEPS + 1)}
    ours, theirs = (load_arrays(workdir, STEPS) for workdir in (RUN, tmp_path / "local"))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    names = [name for name in bucket.names(f"{NAME}/") if not name.startswith("checkpoints/")]
    events = [name for name in names if name.startswith("tensorboard/")]
    assert len(events) == 2 and all(bucket.objects[f"{NAME}/{name}"].data for name in events)
    assert {*names} - {*events} == {
        *("config.json", "metrics.jsonl", "parameters.txt", "report.html", "report/facts.json"),
        *("evals/table.csv", "evals/val/3.json", "evals/val/6.json"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer.model"),
    }
    assert {path.name for path in tmp_path.iterdir()} == {"local", "tiny.py"}  # no folder gs:
