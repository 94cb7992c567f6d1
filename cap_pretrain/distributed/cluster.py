"""Several hosts as one run: how processes connect, and what they must agree on.

`jax.distributed` connects the processes. Its key-value store lets them exchange messages without
using the devices. Hosts are numbered by `jax.process_index()`.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cap_pretrain
from cap_pretrain.distributed import tpu
from cap_pretrain.errors import UserError

# Seconds to wait for all hosts to connect, and later for a message from another host. If that host
# dies meanwhile, heartbeat.py ends the wait sooner.
PATIENCE, PATIENCE_WITH_ANSWERS = 300, 3600
# Exit status after losing another host: the run can be retried (EX_TEMPFAIL of sysexits.h).
EXIT_LOST = 75


class ClusterStartError(Exception):
    """Not all hosts connected; the run can be retried."""

    exit_code = EXIT_LOST


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Cluster addresses from the command line; None means to take them from the environment."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None  # their number
    process: int | None = None  # the index of this one


def start(addresses: Addresses = Addresses()) -> None:
    """Connect to the other hosts, if any. Call it before anything touches a device.

    Without addresses on the command line, `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` are used. Without those, JAX detects Slurm, Open MPI, TPU pods (including
    several slices) and Kubernetes. Raises UserError if the addresses are incomplete or invalid, and
    ClusterStartError if not all hosts connected within `PATIENCE` seconds.
    """
    given = _complete_addresses(addresses)
    kind = "addresses" if given.coordinator else _detect_cluster()
    if not kind:
        return
    # The service would handle SIGTERM itself; the training loop has hosts agree where to stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            given.coordinator,
            given.processes,
            given.process,
            initialization_timeout=PATIENCE,
            cluster_detection_method="deactivate" if given.coordinator else None,
        )
    except Exception as e:
        if kind == "TPU" and isinstance(e, ValueError):  # a single TPU machine
            return
        reason = str(e).strip().splitlines()[0]
        raise ClusterStartError(
            f"the hosts could not connect ({kind}): {reason}\nStart the same command on every "
            "host, or give --coordinator_address, --num_processes and --process_id."
        ) from e
    if kind in ("Slurm", "Open MPI") and (_is_only_process_on_machine() or _sees_one_gpu()):
        # JAX gives process n of a machine its nth GPU. But the only process of a machine should use
        # all, and one that the scheduler shows a single GPU (--gpus-per-task=1) has no nth.
        jax.config.update("jax_cuda_visible_devices", "all")


def _complete_addresses(addresses: Addresses) -> Addresses:
    """Fill in missing addresses from the environment; raise UserError if some remain missing."""
    environment = {
        "coordinator": os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "processes": os.environ.get("JAX_NUM_PROCESSES"),
        "process": os.environ.get("JAX_PROCESS_ID"),
    }
    found = {k: v for k, v in environment.items() if v is not None}
    found |= {k: v for k, v in dataclasses.asdict(addresses).items() if v is not None}
    if not found:
        return addresses
    flags = {"coordinator": "coordinator_address", "processes": "num_processes"}
    flags["process"] = "process_id"
    for name, flag in flags.items():
        if name not in found:
            raise UserError(
                f"--{flag}: is missing beside --{flags[next(iter(found))]}; give all three of "
                "--coordinator_address=HOST:PORT --num_processes=N --process_id=I."
            )
    address, port = found["coordinator"].rpartition(":")[::2]
    if not (address and port.isdecimal()):
        raise UserError(f"--coordinator_address: {found['coordinator']!r} is not HOST:PORT.")
    try:
        processes, process = int(found["processes"]), int(found["process"])
    except ValueError:
        processes, process = 0, 0
    if not 0 <= process < processes:
        raise UserError(
            f"--process_id: {found['process']} is not one of {found['processes']} processes, "
            "which are numbered from 0."
        )
    return Addresses(found["coordinator"], processes, process)


def _detect_cluster() -> str:
    """Return the kind of cluster that the environment describes; "" if none."""
    environ = os.environ
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        return "Slurm"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    names = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    slices = int(environ.get("MEGASCALE_NUM_SLICES", 1))
    # Google's TPU machines find each other through the metadata server, which JAX queries.
    if "," in names or slices > 1 or (tpu.chips() and not names):
        return "TPU"
    if names:  # a single TPU machine
        return ""
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes"):
            return "Kubernetes"
        raise UserError(
            "this is a pod of an indexed Kubernetes job, and the other pods are unknown: pip "
            "install kubernetes, or give --coordinator_address, --num_processes and --process_id "
            "(--num_processes=1 for a single pod)."
        )
    return ""


def _is_only_process_on_machine() -> bool:
    """Return whether Slurm or Open MPI started one process on this machine."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    return "1" in (tasks, os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"))


def _sees_one_gpu() -> bool:
    return len(list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))) == 1


def decided(mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """Have host 0 decide for all hosts, given a JSON value from each. All hosts must call it.

    `decide` is called on host 0 alone, with the values ordered by host. Its result, after a round
    trip through JSON, is returned on every host, or the UserError that it raises is raised. This
    uses the key-value store, which waits long enough: on CPUs, device collectives give up when
    another host is half a minute late.
    """
    if jax.process_count() == 1:
        return decide([mine])
    global _decisions
    _decisions += 1
    here, before = (f"cap_pretrain/decided/{n}" for n in (_decisions, _decisions - 1))
    store, me, wait = client(), jax.process_index(), 1000 * PATIENCE_WITH_ANSWERS
    store.key_value_set(f"{here}/{me}", json.dumps(mine))
    if me == 0:
        hosts = range(jax.process_count())
        values = [json.loads(store.blocking_key_value_get(f"{here}/{n}", wait)) for n in hosts]
        store.key_value_delete(before)  # every host has read it, since all are here now
        try:
            answer = {"answer": decide(values)}
        except UserError as error:
            answer = {"error": str(error)}
        store.key_value_set(f"{here}/answer", json.dumps(answer))
    answer = json.loads(store.blocking_key_value_get(f"{here}/answer", wait))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["answer"]


def barrier() -> None:
    """Wait until all hosts have reached this call."""
    decided(None, lambda _: None)


def agree(facts: Mapping[str, Any], remedy: str) -> None:
    """Check that facts, JSON values by name, are the same on all hosts. All hosts must call it.

    If one differs from that of host 0, UserError with both values and `remedy`, what the user
    should do, is raised on every host.
    """

    def compare(hosts: list[dict[str, Any]]) -> None:
        for number, other in enumerate(hosts):
            if difference := _difference(hosts[0], number, other):
                raise UserError(f"{difference}\n{remedy}")

    decided({"name": socket.gethostname(), "facts": dict(facts)}, compare)


def _difference(first: dict[str, Any], host: int, other: dict[str, Any]) -> str:
    """Describe the first fact of `host` that differs from host 0; "" if all are the same."""
    for name in [*first["facts"], *(k for k in other["facts"] if k not in first["facts"])]:
        here, there = (side["facts"].get(name, "missing") for side in (first, other))
        if here != there:
            return (
                f"hosts differ: {name} is {there!r} on host {host} ({other['name']}), {here!r} on "
                f"host 0 ({first['name']})."
            )
    return ""


def connect_devices() -> None:
    """Run a first collective over all devices once all hosts are ready.

    On CPUs a collective fails if another host is half a minute late, as it may be at the start.
    """
    barrier()
    mesh = Mesh(jax.devices(), ("all",))
    ones = jax.make_array_from_callback(
        (jax.device_count(),), NamedSharding(mesh, P("all")), lambda _: np.ones(1, np.int32)
    )
    assert int(jax.jit(jnp.sum)(ones)) == jax.device_count()


def compiled_everywhere(fn: Any, *args: Any) -> Any:
    """Compile the jitted `fn` for `args` and wait for all hosts; see `connect_devices` for why."""
    compiled = fn.lower(*args).compile()
    barrier()
    return compiled


def check_same(config: Mapping[str, Any]) -> None:
    """Raise UserError on every host unless all use the same config, code and JAX version."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    agree(
        {**config, "the code of cap_pretrain": code_fingerprint(), **versions},
        "Start the same command with the same installation on every host.",
    )


def check_shared(workdir: Path) -> None:
    """Raise UserError on every host unless `workdir` is the same folder on all."""
    if jax.process_count() == 1:
        return
    marker = workdir / f".host0-{os.getpid()}"
    if jax.process_index() == 0:
        marker.touch()
    barrier()  # the marker has been written
    seen = jax.process_index() == 0
    deadline = time.monotonic() + 15  # network file systems show new files late
    while not seen and time.monotonic() < deadline:
        seen = any(workdir.glob(".host0-*"))
        if not seen:
            time.sleep(0.2)
    try:
        agree(
            {f"the marker file of host 0 in --workdir={workdir}": seen},
            "Give a folder that all hosts share.",
        )
    finally:
        if jax.process_index() == 0:
            marker.unlink(missing_ok=True)


def code_fingerprint() -> str:
    """Return 16 hex digits of the SHA-256 of all Python files of the package."""
    root, digest = Path(cap_pretrain.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


_decisions = 0  # The number of calls of `decided` so far, which makes its keys unique


def state() -> Any:
    """Return JAX's distributed state, which has no public name (Orbax uses it likewise)."""
    from jax._src import distributed

    return distributed.global_state


def processes() -> int:
    """Return the number of processes of the run, without connecting to devices."""
    return state().num_processes or 1


def client() -> Any:
    """Return the client of the cluster's key-value store."""
    return state().client
