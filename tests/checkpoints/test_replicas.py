"""Hosts restore a checkpoint together: each byte is read once, every bit arrives."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from cap_pretrain import files
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.checkpoints.replicas import PART_BYTES, Stored, _aligned, plan
from cap_pretrain.cli import processes
from cap_pretrain.training.step import TrainState
from tests import toy


def state() -> TrainState:
    """Return a state of 13 MB with the bits that arithmetic would change."""
    rng = np.random.default_rng(0)
    large = rng.integers(0, 2**32, (4, 256, 1024), np.uint32).view(np.float32)  # with NaNs
    large[0, 0, :2] = -0.0
    return TrainState(
        step=np.int32(7),
        params={
            "block": {"kernels": large[:2].copy(), "bias": large[0, :64, 0].copy()},
            "other": {"kernels": large[2:].copy()},
        },
        stats={"odd": large[0, :13, 1].copy(), "mask": large[1, :16, :16] > 0},
        opt_state={
            "mu": {"block": {"kernel": large[0].copy()}, "other": {"kernel": large[1].copy()}},
            "nu": {"kernels": large[2:, ::-1].copy()},
            "half": rng.integers(0, 2**16, (256, 1024), np.uint16).view(ml_dtypes.bfloat16),
            "small": rng.integers(-128, 128, (4, 64), np.int8),
            "count": np.uint32(2**31 + 1),
        },
        counts={"broken": np.int32(3)},
        ema=np.float32(-0.0),
    )


HOST = """
import json, sys
import jax, numpy as np, tensorstore as ts
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from cap_pretrain import files, rules
from cap_pretrain.checkpoints import replicas
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.checkpoints.stored import load_arrays
from cap_pretrain.distributed import cluster
from tests import toy
from tests.checkpoints.test_replicas import state

cluster.start()
replicas.GROUP_BYTES = 2**22  # so that several groups are sent
folder, meshes = files.place(sys.argv[1]), json.loads(sys.argv[2])
whole, me = state(), jax.process_index()
SPECS = {"kernel": P("fsdp", "tensor"), "kernels": P(None, "fsdp", "tensor")}
SPECS |= {"bias": P(("tensor", "fsdp")), "half": P("fsdp")}

def on(mesh):
    def abstract(path, leaf):
        spec = SPECS.get(rules.path_string(path).split("/")[-1], P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree_util.tree_map_with_path(abstract, whole)

def read():
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    found = [metric["values"] for metric in found if metric["name"].endswith("bytes_read")]
    return sum(value["value"] for values in found for value in values)

def check(found):
    for path, array in rules.flatten(found).items():
        expected = rules.flatten(whole)[path]
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes(), path

def fails(*args):
    raise ValueError("a fault of one host")

report = []
for shape in meshes:
    devices = np.array(jax.devices()).reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    checkpoints = Checkpoints(folder, toy.config())
    with jax.set_mesh(mesh):
        before = read()
        found = checkpoints.restore(on(mesh), 7)
        report.append(read() - before)
        check(found)
        if shape == meshes[-1]:
            before = read()
            arrays = load_arrays(folder, 7)
            report.append(read() - before)
            expected = whole.params["block"]["kernels"]
            assert arrays["learner/params/block/kernels"].tobytes() == expected.tobytes()
            assert arrays["learner/ema"].tobytes() == whole.ema.tobytes()
        if len(sys.argv) > 3 and shape == meshes[-1]:  # save as sharded by this mesh, and restore
            checkpoints.save(found.replace(step=found.step + 1))
            checkpoints.wait()
            whole = whole.replace(step=np.int32(8))
            before = read()
            check(checkpoints.restore(on(mesh), 8))
            report.append(read() - before)
            original = ocp.type_handlers.ArrayHandler.deserialize
            if me == 1:
                ocp.type_handlers.ArrayHandler.deserialize = fails
            try:
                checkpoints.restore(on(mesh), 8)
            except Exception as error:
                print("ERROR", type(error).__name__, str(error).partition("checkpoints/")[2])
            ocp.type_handlers.ArrayHandler.deserialize = original
    checkpoints.close()
print("READ", json.dumps(report))
"""


def run(hosts, folder, meshes, *more):
    """Restore on `hosts` with two devices each; return what each printed."""
    address = processes._free_address()
    command = [sys.executable, "-c", HOST, str(folder), json.dumps(meshes), *more]
    running = []
    for host in range(hosts):
        environment = processes.environment(address, hosts, host, 2)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, env=environment, cwd=toy.CONFIGS.parent, **pipes))
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * hosts, "\n".join(printed)
    return [text.splitlines() for text in printed]


def reports(printed):
    return [json.loads(lines[-1].removeprefix("READ ")) for lines in printed]


def read_in_all(printed):
    """Return the bytes that all hosts read together in each restore."""
    return np.sum(reports(printed), axis=0)


def save(folder):
    """Save the state on one device."""
    checkpoints = Checkpoints(folder, toy.config())
    checkpoints.save(jax.device_put(state()))
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the state, saved on one device, and the bytes of its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    save(folder)
    found = (folder / "checkpoints" / "7").rglob("*")
    return folder, sum(path.stat().st_size for path in found if path.is_file())


@pytest.mark.slow
def test_two_hosts_read_one_checkpoint_and_fail_alike(saved):
    folder, size = saved
    meshes = [(4, 1, 1), (2, 2, 1)]
    printed = run(2, folder, meshes, "save")
    print(size, total := read_in_all(printed))
    assert len(total) == 4 and (total <= 1.1 * size).all() and (total > 0.5 * size).all(), total
    # Each host reads about half of it where both may.
    assert np.max(reports(printed), axis=0)[0] < 0.6 * size
    errors = [[line for line in lines if line.startswith("ERROR")] for lines in printed]
    corrupt = "ERROR CorruptCheckpointError 8: is corrupt (a fault of one host)"
    assert errors == [[corrupt]] * 2


@pytest.mark.slow
def test_four_hosts_read_one_checkpoint_from_a_bucket(bucket):
    save(files.place("gs://bucket/run"))
    bucket.log.clear()
    size = sum(len(each.data) for each in bucket.objects.values())
    print(size, total := read_in_all(run(4, "gs://bucket/run", [(2, 2, 2)])))
    assert (total <= 1.1 * size).all() and (total > 0.5 * size).all(), total
    sent = sum(request.sent for request in bucket.requests("read"))
    print(sent)
    assert sent <= 2 * 1.1 * size


def test_only_whole_chunks_are_read_and_parts_stay_small():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    target = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))

    def spec(shape, chunk):
        return tuple(_aligned(target, Stored(shape, np.dtype(np.float32), chunk)))

    assert spec((8, 8), (4, 4)) == ("fsdp", "tensor")
    assert spec((8, 8), (2, 1)) == ("fsdp", "tensor")
    assert spec((8, 8), (8, 4)) == (None, "tensor")
    assert spec((8, 8), (4, 3)) == ("fsdp", None)
    assert spec((8, 8), (8, 8)) == (None, None)
    large = (PART_BYTES // 16, 8)
    assert spec(large, large) == ("fsdp", "tensor")
    assert plan([target], [Stored((8,), np.dtype(np.float64), (8,))]) == {}
