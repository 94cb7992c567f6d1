"""Two real processes over jax.distributed do what one does."""

import os
import socket
import subprocess
import sys

import pytest

from tests import toy

COMMAND = [
    *(sys.executable, "-m", "cap_pretrain.main", "--config=configs/quickstart.py"),
    *("--config.total_steps=4", "--config.batch_size=8", "--config.log.every_steps=1"),
    *("--config.model.name=mu/12", "--config.model.width=32", "--config.model.mlp=64"),
    *("--config.data.scenes.length_train=200", "--config.data.scenes.length_val=20"),
    *("--config.evals.scenes.count=10", "--config.evals.scenes.batch_size=6"),
    *("--config.evals.val.batch_size=6", "--config.eval.every_steps=2"),
    "--config.checkpoint.every_steps=2",
]


def run_hosts(workdir, hosts: int) -> list[str]:
    """Runs the command on so many hosts of this machine; returns what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for host in range(hosts):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        if hosts > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(hosts),
                "JAX_PROCESS_ID": str(host),
            }
        command = [*COMMAND, f"--workdir={workdir}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * hosts, printed
    return printed


@pytest.mark.slow
def test_two_hosts_train_and_evaluate_as_one_does(tmp_path):
    run_hosts(tmp_path / "one", 1)
    _, of_the_second = run_hosts(tmp_path / "two", 2)
    assert "step" not in of_the_second  # one host speaks for all
    one, two = (toy.lines(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == [1, 2, 2, 2, 3, 4, 4, 4, 4]
    for expected, found in zip(one, two, strict=True):
        for name in expected:
            if not name.startswith("time/"):
                assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoints").iterdir()) == ["2", "4"]
