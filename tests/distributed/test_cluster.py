"""How hosts find each other and what they compare; test_multihost.py runs several hosts."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import cap_pretrain
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError
from tests import toy

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ELSEWHERE = (
    *("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"),
    "CUDA_VISIBLE_DEVICES",
    *("TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES", "KUBERNETES_SERVICE_HOST"),
)


@pytest.fixture
def joined(monkeypatch):
    """Replace `jax.distributed.initialize`; return the list of calls to it and `config.update`."""
    calls = []
    for name in (*NAMES, *ELSEWHERE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(jax.config, "update", lambda name, value: calls.append((name, value)))
    return calls


def test_a_single_machine_joins_no_cluster(joined):
    cluster.start()
    assert joined == []


@pytest.mark.parametrize("environment", [{}, dict(zip(NAMES, ("a:1", "4", "0"), strict=True))])
def test_flags_take_precedence_over_the_environment(environment, joined, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cluster.start(cluster.Addresses("node0:1234", 8, 3))
    (_, (address, options)) = joined
    assert address == ("node0:1234", 8, 3)
    assert options["cluster_detection_method"] == "deactivate"


def test_the_environment_may_give_all_addresses(joined, monkeypatch):
    for name, value in zip(NAMES, ("[::1]:77", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    cluster.start()
    assert joined[-1][0] == ("[::1]:77", 2, 1)


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        (("node0:1", None, None), "--num_processes: is missing beside --coordinator_address"),
        ((None, None, 1), "--coordinator_address: is missing beside --process_id"),
        (("node0", 2, 0), "--coordinator_address: 'node0' is not HOST:PORT"),
        (("node0:1", 2, 2), "--process_id: 2 is not one of 2 processes"),
    ],
)
def test_invalid_addresses_are_refused(addresses, message, joined):
    with pytest.raises(UserError, match=message) as error:
        cluster.start(cluster.Addresses(*addresses))
    assert len(str(error.value).splitlines()) == 1 and joined == []


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, False),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "1", "CUDA_VISIBLE_DEVICES": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, False),
    ],
)
def test_clusters_are_detected(environment, devices, joined, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cluster.start()
    assert joined[0] == ("jax_enable_preemption_service", False)
    assert joined[1][0] == (None, None, None)
    # By default JAX would give the only process of a machine just one of its GPUs, and a process
    # that sees a single GPU one that it does not see.
    assert (("jax_cuda_visible_devices", "all") in joined) == devices


def test_an_indexed_kubernetes_job_is_not_taken_for_a_single_pod(joined, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    cluster.start()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install kubernetes"):
        cluster.start()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "kubernetes")
    cluster.start()
    assert joined[-1][0] == (None, None, None)


def test_hosts_that_cannot_connect(joined, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED: only 1 of 2 came\nat the barrier")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(cluster.ClusterStartError, match="could not connect.*only 1 of 2 came"):
        cluster.start(cluster.Addresses("node0:1", 2, 0))


class Store:
    """A fake of the cluster's key-value store, holding what other hosts have written."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        assert key not in self.values
        self.values[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        assert milliseconds > 1000
        return self.values[key]

    def key_value_delete(self, key):
        assert key == "cap_pretrain/decided/6"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"optim.lr": 0.1, "seed": 0}, ""),
        ({"optim.lr": 0.2, "seed": 0}, r"optim.lr is 0.2 on host 1 \(b\), 0.1 on host 0"),
        ({"optim.lr": 0.1}, "seed is 'missing' on host 1"),
        ({"optim.lr": 0.1, "seed": 0, "code": "x"}, "code is 'x' on host 1"),
    ],
)
def test_differences_are_named_on_every_host(other, message, monkeypatch):
    store, here = Store(), "cap_pretrain/decided/7"
    monkeypatch.setattr(cluster, "client", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    store.values[f"{here}/1"] = json.dumps({"name": "b", "facts": other})
    for host, facts in enumerate([{"optim.lr": 0.1, "seed": 0}, other]):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        monkeypatch.setattr(cluster, "_decisions", 6)
        store.values.pop(f"{here}/{host}", None)
        if message:
            with pytest.raises(UserError, match=message) as error:
                cluster.agree(facts, "Do this.")
            assert str(error.value).endswith("\nDo this.")
        else:
            cluster.agree(facts, "Do this.")


@pytest.mark.slow
def test_the_code_fingerprint_covers_every_file_of_the_package(tmp_path, monkeypatch):
    package = Path(cap_pretrain.__file__).parent
    copy = tmp_path / "cap_pretrain"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    own = cluster.code_fingerprint()
    monkeypatch.setattr(cap_pretrain, "__file__", str(copy / "__init__.py"))
    assert cluster.code_fingerprint() == own
    sources = sorted(copy.rglob("*.py"))
    assert {"train.py", "config.py"} <= {path.name for path in copy.glob("*.py")}
    assert {"models", "data", "sources", "distributed"} <= {path.parent.name for path in sources}
    for path in sources:
        content = path.read_bytes()
        path.write_bytes(content + b"#")
        assert cluster.code_fingerprint() != own, path
        path.write_bytes(content)
    path.rename(path.with_name("renamed.py"))
    assert cluster.code_fingerprint() != own


HOST = """
import hashlib, json
import jax
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError

def fails(values):
    raise UserError("no é")

def never(values):
    raise SystemExit("only host 0 decides")

cluster.start()
me = jax.process_index()
with jax.transfer_guard("disallow"):
    for large in ("", "é" * 10_000_000):  # beyond gRPC's default message size
        answer = cluster.decided((me, large), (lambda values: {"é": values}) if me == 0 else never)
    print(hashlib.sha256(json.dumps(answer).encode()).hexdigest(), [n for n, _ in answer["é"]])
    try:
        cluster.decided(None, fails if me == 0 else never)
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_all_hosts_get_the_decision_of_host_0():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = []
    for host in range(2):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(toy.CONFIGS.parent)}
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        environment |= {"JAX_PROCESS_ID": str(host), "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-c", HOST]
        pipes = {"stdout": subprocess.PIPE, "encoding": "utf-8"}
        hosts.append(subprocess.Popen(command, env=environment, **pipes))
    printed = [host.communicate(timeout=120)[0].splitlines() for host in hosts]
    (*_, first, error), (*_, second, error_too) = printed  # earlier lines are about connecting
    assert first == second and first.endswith(" [0, 1]")
    assert error == error_too == "no é"
