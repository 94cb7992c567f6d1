"""Settings for NVIDIA GPUs: what is set when, and that the user comes first."""

import os
import socket
import subprocess
import sys
import types

import jax
import pytest

from cap_pretrain.distributed import gpu
from tests import toy
from tests.distributed.test_compile_cache import ended


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU and JAX's plugin, on which no one has set anything."""
    for name in (*gpu._FRACTION_NAMES, "XLA_FLAGS"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu, "_installed", lambda module: module == "jax_plugins.xla_cuda13")
    monkeypatch.setattr(gpu, "_nodes", lambda pattern: pattern.startswith("nvidia"))
    monkeypatch.setattr(type(jax.config), "values", {"jax_platforms": None})
    return monkeypatch


def test_the_memory_fraction_is_set_once_a_gpu_will_be_used(machine):
    gpu.set_environment()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == str(gpu.MEMORY_FRACTION)


@pytest.mark.parametrize("name", gpu._FRACTION_NAMES)
def test_the_user_comes_first(name, machine):
    machine.setenv(name, "0.5")
    gpu.set_environment()
    assert [os.environ[n] for n in gpu._FRACTION_NAMES if n != name] == [""]
    assert os.environ[name] == "0.5"
    machine.setattr(jax, "default_backend", lambda: "gpu")
    (line,) = gpu.describe()
    assert line.startswith("GPU settings: 50% of the memory") and "\n" not in line


@pytest.mark.parametrize(
    "why",
    [
        lambda m: m.setattr(type(jax.config), "values", {"jax_platforms": "cpu"}),
        lambda m: m.setenv("CUDA_VISIBLE_DEVICES", ""),
        lambda m: m.setenv("CUDA_VISIBLE_DEVICES", "-1"),
        lambda m: m.setattr(gpu, "_installed", lambda module: False),
        lambda m: m.setattr(gpu, "_nodes", lambda pattern: False),
    ],
)
def test_nothing_is_set_without_gpus(why, machine):
    why(machine)
    before = dict(os.environ)
    gpu.set_environment()
    assert dict(os.environ) == before and not gpu.will_be_used()


def test_platforms_may_be_named_in_several_ways(machine):
    for names, used in {"cuda": True, "gpu,cpu": True, "tpu,cpu": False, "": True}.items():
        machine.setattr(type(jax.config), "values", {"jax_platforms": names})
        assert gpu.will_be_used() == used, names


def test_communication_overlaps_on_several_gpus(machine):
    card, core = (types.SimpleNamespace(platform=name) for name in ("gpu", "cpu"))
    assert gpu.compiler_options([card] * 2, deterministic=False) == {gpu.OVERLAP: True}
    several = gpu.compiler_options([card] * 2, deterministic=True)
    alone = gpu.compiler_options([card], deterministic=True)
    assert several == alone | {gpu.OVERLAP: True} and gpu.OVERLAP not in alone
    assert gpu.compiler_options([card], deterministic=False) is None
    assert gpu.compiler_options([core] * 2, deterministic=False) is None
    machine.setenv("XLA_FLAGS", f"--{gpu.OVERLAP}=false")
    assert gpu.compiler_options([card] * 2, deterministic=False) is None


def test_xla_knows_the_option():
    """An unknown one is refused, see test_determinism."""
    jax.jit(lambda x: x + 1, compiler_options={gpu.OVERLAP: True})(1.0)


def test_cpus_are_left_alone():
    assert not gpu.will_be_used() and gpu.describe() == []


SMALL = {
    **{"batch_size": 8, "data.image_size": 16, "text.length": 16, "text.vocab_size": 100},
    **{"data.scenes.length_train": 200, "data.scenes.length_val": 20, "total_steps": 2},
    **{"log.every_steps": 1, "log.ids": True, "eval.every_share": 0.0, "mesh.data": -1},
}


@pytest.mark.slow
def test_one_process_per_gpu_under_slurm(tmp_path):
    """Each process has one CPU device, as it would have one GPU, and Slurm's variables."""
    processes, nodes = 4, 2
    command = [sys.executable, "-m", "cap_pretrain.main"]
    command += [f"--config={toy.CONFIGS / 'pretrain.py'}:objective=clip,model=mu/8"]
    command += [f"--config.{name}={value}" for name, value in SMALL.items()]
    with socket.socket() as free:  # JAX derives its port from the number of the job
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1] % 4096
    each = processes // nodes
    running = []
    for process in range(processes):
        variables = {
            **{"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost"},
            **{"SLURM_NTASKS": str(processes), "SLURM_PROCID": str(process)},
            **{"SLURM_LOCALID": str(process % each), "SLURM_STEP_NUM_NODES": str(nodes)},
            "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})",
        }
        with (tmp_path / f"{process}.log").open("w") as log:
            pipes = {"stdout": log, "stderr": subprocess.STDOUT}
            where = [f"--workdir={tmp_path / 'several'}"]
            env = os.environ | variables
            running.append(subprocess.Popen(command + where, env=env, **pipes))
    logs = [tmp_path / f"{process}.log" for process in range(processes)]
    codes = ended(running)
    assert codes == [0] * processes, [log.read_text() for log in logs]
    assert f"{processes} x cpu" in logs[0].read_text()
    subprocess.run([*command, f"--workdir={tmp_path / 'one'}"], check=True, capture_output=True)
    for found, expected in zip(*(toy.lines(tmp_path / n) for n in ("several", "one")), strict=True):
        assert found.get("data/ids") == expected.get("data/ids")
        if "train/loss" in expected:
            assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)
