"""Several real processes over jax.distributed train like one process, and end together.

tools/kill_and_resume.py --processes 1 2 4 kills them repeatedly.
"""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from cap_pretrain import train
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.cli import config_files
from cap_pretrain.training import lock
from tests import toy

pytestmark = pytest.mark.slow

STEPS = 5
SMALL = {
    **{"batch_size": 8, "data.image_size": 16, "text.length": 16, "text.vocab_size": 100},
    **{"data.scenes.length_train": 200, "data.scenes.length_val": 20, "total_steps": STEPS},
    **{"model.depth": 1, "log.every_steps": 1, "log.ids": True, "checkpoint.every_steps": 2},
    **{"eval.every_steps": 4},
}
# Objectives, and the mesh of the four devices of two hosts. If the tensor axis crosses hosts, the
# hosts read the same examples.
MESHES = {
    "cap": {"mesh.data": 4},
    "cappa": {"mesh.data": 1, "mesh.tensor": 4},
    "clip": {"mesh.data": 1, "mesh.fsdp": 4},
    "siglip": {"mesh.data": 2, "mesh.tensor": 2},
}
CAPTIONS = {"evals.samples.count": 4}  # a field of captioners only
# One of them changes the size of the images. Of a single patch, some gradients would only be noise.
PHASES = {"data.first_sizes": "24:0.5"}


def fields_of(objective: str) -> dict:
    own = PHASES if objective == "cappa" else {}
    return SMALL | (CAPTIONS if objective.startswith("cap") else {}) | own


def arguments(objective: str, fields: dict) -> list[str]:
    config = f"--config={toy.CONFIGS / 'pretrain.py'}:objective={objective},model=mu/8"
    fields = fields_of(objective) | fields
    return [config, *(f"--config.{name}={value}" for name, value in fields.items())]


def start(workdir, hosts: int, objective: str = "cap", own=(), **fields):
    """Start `hosts` processes with two devices each; `own` gives an extra argument by host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
    command = [sys.executable, "-m", "cap_pretrain.main", f"--workdir={workdir}"]
    command += arguments(objective, {k.replace("__", "."): v for k, v in fields.items()})
    command += [f"--coordinator_address={address}", f"--num_processes={hosts}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(
            [
                *command,
                f"--process_id={host}",
                *filter(None, own[host : host + 1]),
            ],
            env=environment,
            cwd=toy.CONFIGS.parent,
            **pipes,
        )
        for host in range(hosts)
    ]


def ended(processes, timeout: float = 240) -> tuple[list[int], list[str]]:
    """Wait for the processes; return their exit codes and their output."""
    printed = [process.communicate(timeout=timeout)[0] for process in processes]
    return [process.returncode for process in processes], printed


def wait_for_step(workdir, step: int, processes) -> None:
    path = workdir / "metrics.jsonl"
    while not path.exists() or not any(line["step"] >= step for line in toy.lines(workdir)):
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.05)


def metrics(workdir) -> dict[tuple[int, str], float]:
    """Return the logged metrics by (step, name), without times."""
    return {
        (line["step"], name): value
        for line in toy.lines(workdir)
        for name, value in line.items()
        if not name.startswith(("time/", "step", "spike/"))
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key[1].startswith("data/"):  # fingerprints of the examples
            assert found[key] == value, key
        else:  # Adafactor's first updates depend on the last digits of the gradients
            rel = 1e-3 if key[1].endswith("_norm") else 1e-4
            assert found[key] == pytest.approx(value, rel=rel, abs=1e-6), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a function that gives the metrics of a run in this process, by objective."""

    @functools.cache
    def metrics_of(objective):
        workdir = tmp_path_factory.mktemp(objective)
        config = config_files.config(
            f"{toy.CONFIGS / 'pretrain.py'}:objective={objective},model=mu/8"
        )
        config.update_from_flattened_dict(fields_of(objective))
        train.run(config, workdir)
        return metrics(workdir)

    return metrics_of


@pytest.mark.parametrize("objective", MESHES)
def test_two_hosts_train_and_evaluate_like_one(objective, alone, tmp_path):
    codes, printed = ended(start(tmp_path / "two", 2, objective, **MESHES[objective]))
    assert codes == [0, 0], printed
    assert "step" not in printed[1]  # only host 0 prints
    expected = alone(objective)
    assert {(4, "val/loss"), (5, "train/loss"), (5, "data/ids")} <= expected.keys()
    assert_same(metrics(tmp_path / "two"), expected)
    assert saved_steps(tmp_path / "two") == [4, 5]


def test_a_lost_host_ends_the_others_and_four_hosts_resume(alone, tmp_path):
    hosts = start(tmp_path / "lost", 2)
    wait_for_step(tmp_path / "lost", 3, hosts)
    hosts[1].kill()
    since = time.monotonic()
    codes, printed = ended(hosts)
    assert time.monotonic() - since < 60
    assert codes == [75, -signal.SIGKILL], printed
    message = r"cap_pretrain: host 1 \(.+\) is lost.*\nThe checkpoints are intact: start again"
    assert re.search(message, printed[0]), printed[0]
    codes, printed = ended(start(tmp_path / "lost", 4, **{"mesh.data": 4, "mesh.fsdp": 2}))
    assert codes == [0] * 4, printed
    assert "Resuming from step 2" in printed[0]
    assert_same(metrics(tmp_path / "lost"), alone("cap"))


def test_a_host_that_loses_the_coordinator_exits_and_says_so(tmp_path):
    hosts = start(tmp_path, 2, total_steps=500)
    wait_for_step(tmp_path, 2, hosts)
    hosts[0].kill()
    codes, printed = ended(hosts, timeout=60)
    assert codes == [-signal.SIGKILL, 75], printed
    assert "cap_pretrain: host 0 (127.0.0.1:" in printed[1] and "is lost" in printed[1]


def test_sigterm_on_one_host_stops_all_at_one_step(tmp_path):
    hosts = start(tmp_path, 2, total_steps=500, eval__every_steps=0, eval__every_share=0.0)
    wait_for_step(tmp_path, 2, hosts)
    hosts[1].terminate()
    codes, printed = ended(hosts)
    assert codes == [143, 143], printed
    last = saved_steps(tmp_path)[-1]
    assert f"SIGTERM on another host: stopped after step {last}, which is saved" in printed[0]
    assert re.search(rf"Saved step {last} in \d+\.\d s after SIGTERM on another host", printed[0])
    assert f"SIGTERM: stopped after step {last}, which is saved" in printed[1]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("--config.optim.lr=0.5", r"optim.lr is 0.5 on host 1 \(.+\), 0.001 on host 0"),
        (
            "--workdir={}/elsewhere",
            "the marker file of host 0 in --workdir=.* is 'missing' on host 1",
        ),
    ],
)
def test_hosts_started_with_other_arguments_are_refused(own, message, tmp_path):
    codes, printed = ended(start(tmp_path / "run", 2, own=("", own.format(tmp_path))))
    assert codes == [2, 2], printed
    for text in printed:
        assert re.search(message, text), text
    assert not saved_steps(tmp_path / "run")


def test_a_second_run_on_the_workdir_is_refused_on_every_host(tmp_path):
    with lock.locked(tmp_path):
        codes, printed = ended(start(tmp_path, 2))
    assert codes == [2, 2], printed
    assert all(f"in use by process {os.getpid()} on host" in text for text in printed), printed
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK_FILE]
