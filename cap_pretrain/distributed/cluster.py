"""Several hosts as one run: how they find each other, and what they must agree on.

`jax.distributed` brings the processes together, and its key-value store is the line they talk over
beside the devices. Hosts are numbered as `jax.process_index()` has it.
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
from cap_pretrain.errors import UserError

# Seconds that hosts wait for each other to come, and, once they have, for what the others say: one
# that dies meanwhile ends them sooner (see heartbeat.py).
PATIENCE, PATIENCE_WITH_ANSWERS = 300, 3600
# Exit status of a host that ends since another one is lost: try again (EX_TEMPFAIL of sysexits.h).
EXIT_LOST = 75


class NotTogether(Exception):
    """Not all hosts came: those that did may try again."""

    exit_code = EXIT_LOST


@dataclasses.dataclass(frozen=True)
class Addresses:
    """What the command line says of the cluster; None is what the environment says.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: which of them this one is.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def start(addresses: Addresses = Addresses()) -> None:
    """Joins the other hosts, if there are any. Call it before anything touches a device.

    Without addresses, Slurm, Open MPI, TPU pods (also of several slices) and Kubernetes are
    recognised as JAX recognises them, and `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` count.

    Raises:
      UserError: the addresses are incomplete.
      NotTogether: not all hosts came within `PATIENCE` seconds.
    """
    given = _given(addresses)
    found = "addresses" if given.coordinator else _recognised()
    if not found:
        return
    # It would take SIGTERM for itself; the loop has hosts agree on the step to stop at.
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
        if found == "TPU" and isinstance(e, ValueError):  # a machine by itself
            return
        reason = str(e).strip().splitlines()[0]
        raise NotTogether(
            f"the hosts did not come together ({found}): {reason}\nStart the same command on every "
            "one, or give --coordinator_address, --num_processes and --process_id."
        ) from e
    if found in ("Slurm", "Open MPI") and _alone_on_its_machine():
        # Under these JAX gives each process one GPU, and a single one is meant to have all.
        jax.config.update("jax_cuda_visible_devices", "all")


def _given(addresses: Addresses) -> Addresses:
    """Completes the command line's addresses from the environment, all or nothing."""
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


def _recognised() -> str:
    """What kind of cluster the environment tells of; "" for none."""
    environ = os.environ
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        return "Slurm"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    names = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    slices = int(environ.get("MEGASCALE_NUM_SLICES", 1))
    # Google's TPU machines know of each other from their metadata, which JAX asks.
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if "," in names or slices > 1 or (chips and not names):
        return "TPU"
    if names:  # a TPU machine by itself
        return ""
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes"):
            return "Kubernetes"
        raise UserError(
            "this is a pod of an indexed Kubernetes job, and who the others are is not known: pip "
            "install kubernetes, or give --coordinator_address, --num_processes and --process_id "
            "(--num_processes=1 for a pod by itself)."
        )
    return ""


def _alone_on_its_machine() -> bool:
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    return "1" in (tasks, os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"))


def decided(mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """Has host 0 decide something for all, by what each of them says.

    It goes by the key-value store, which has the time: on CPUs devices give up where others are
    half a minute late.

    Args:
      mine: what this host says, as JSON has it.
      decide: is called on host 0 alone, with what all say in the order of the hosts.

    Returns:
      Its answer, on every host, as JSON has it.

    Raises:
      UserError: on every host, if `decide` does.
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
        said = [json.loads(store.blocking_key_value_get(f"{here}/{n}", wait)) for n in hosts]
        store.key_value_delete(before)  # who is here has read it
        try:
            answer = {"answer": decide(said)}
        except UserError as error:
            answer = {"error": str(error)}
        store.key_value_set(f"{here}/answer", json.dumps(answer))
    answer = json.loads(store.blocking_key_value_get(f"{here}/answer", wait))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["answer"]


def barrier() -> None:
    """Waits until all hosts are here."""
    decided(None, lambda said: None)


def agree(facts: Mapping[str, Any], remedy: str) -> None:
    """Compares on every host what is to be the same on all.

    Args:
      facts: what to compare by name, as JSON has it; the same names on all hosts.
      remedy: what to do, at the end of the message.

    Raises:
      UserError: on every host, if one fact of one host is not that of host 0; names both.
    """

    def compare(hosts: list[dict[str, Any]]) -> None:
        for number, other in enumerate(hosts):
            if difference := _difference(hosts[0], number, other):
                raise UserError(f"{difference}\n{remedy}")

    decided({"name": socket.gethostname(), "facts": dict(facts)}, compare)


def _difference(first: dict[str, Any], host: int, other: dict[str, Any]) -> str:
    for name in [*first["facts"], *(k for k in other["facts"] if k not in first["facts"])]:
        here, there = (side["facts"].get(name, "missing") for side in (first, other))
        if here != there:
            return (
                f"hosts differ: {name} is {there!r} on host {host} ({other['name']}), {here!r} on "
                f"host 0 ({first['name']})."
            )
    return ""


def meet() -> None:
    """Has the devices of all hosts speak to each other for the first time, when all are there.

    On CPUs a host gives up if the others are not there within half a minute.
    """
    barrier()
    mesh = Mesh(jax.devices(), ("all",))
    ones = jax.make_array_from_callback(
        (jax.device_count(),), NamedSharding(mesh, P("all")), lambda index: np.ones(1, np.int32)
    )
    assert int(jax.jit(jnp.sum)(ones)) == jax.device_count()


def compiled_everywhere(fn: Any, *args: Any) -> Any:
    """Returns a jitted function compiled for `args`, once all hosts have it; why: see `meet`."""
    compiled = fn.lower(*args).compile()
    barrier()
    return compiled


def check_same(config: Mapping[str, Any]) -> None:
    """Refuses hosts that were started with another config, code or version of JAX.

    Args:
      config: its fields, as JSON has them.
    """
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    agree(
        {**config, "the code of cap_pretrain": _code(), **versions},
        "Start the same command, of the same installation, on every host.",
    )


def check_shared(workdir: Path) -> None:
    """Refuses a workdir that is not the same folder on every host.

    Raises:
      UserError: on every host.
    """
    if jax.process_count() == 1:
        return
    sign = workdir / f".host0-{os.getpid()}"
    if jax.process_index() == 0:
        sign.touch()
        seen = sign.name
    barrier()  # so that it is written
    if jax.process_index() != 0:
        deadline, seen = time.monotonic() + 15, None  # network file systems show it late
        while seen is None and time.monotonic() < deadline:
            seen = next((p.name for p in workdir.glob(".host0-*")), None)
            if seen is None:
                time.sleep(0.2)
    facts = {f"what host 0 writes in --workdir={workdir}": bool(seen)}
    try:
        agree(facts, "Give a folder that all hosts share.")
    finally:
        if jax.process_index() == 0:
            sign.unlink(missing_ok=True)


def _code() -> str:
    """A fingerprint of the package's source."""
    root, digest = Path(cap_pretrain.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


_decisions = 0


def state() -> Any:
    """What JAX knows of the cluster, for which it has no public name (Orbax does likewise)."""
    from jax._src import distributed

    return distributed.global_state


def client() -> Any:
    """The key-value store of the cluster."""
    return state().client
