"""One mesh, any shape of it: the same losses, less memory, and mistakes told."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cap_pretrain import partition, step
from cap_pretrain.errors import UserError
from tests import toy

CASES = {
    "captioner": ("captioner", {}),
    "clip": ("dual_encoder", {"contrast": "softmax"}),
    "siglip": ("dual_encoder", {"contrast": "sigmoid"}),
}
ONE = (1, 1, 1)
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}


def train_on(case, shape, steps=3):
    """Losses of some steps, and bytes of the parameters and optimizer on the first device."""
    learner, options = CASES[case]
    data, fsdp, tensor = shape
    # Adam's state is of the parameters' size, the recipe's Adafactor factored.
    c = toy.config(
        learner,
        options,
        total_steps=3,
        optim__name="adamw" if case == "captioner" else "adafactor",
        optim__warmup_share=0.0,
        mesh__data=data,
        mesh__fsdp=fsdp,
        mesh__tensor=tensor,
    )
    mesh = partition.make_mesh(c, jax.devices()[: data * fsdp * tensor])
    init, abstract, graphdef, tx, rate, _ = toy.prepared(c, 104, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    take = step.make_train_step(graphdef, tx, rate, c, shardings)
    losses = []
    with jax.set_mesh(mesh):
        state = init()
        for seed in range(steps):
            batch = {k: v for k, v in toy.batch(c, seed).items() if k != "label"}
            state, metrics = take(state, partition.put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
    bytes_of = lambda tree: sum(  # noqa: E731
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)
    )
    return losses, bytes_of(state.params), bytes_of(state.opt_state)


def on_eight_devices(calls):
    """The results of `train_on` for each (case, shape, …), from a process with eight devices."""
    program = (
        "import json, sys\n"
        "from tests.test_partition import train_on\n"
        "print(json.dumps([train_on(*call) for call in json.loads(sys.argv[1])]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(calls)],
        capture_output=True,
        text=True,
        cwd=toy.CONFIGS.parent,
        env=os.environ
        | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same_losses(alone, sharded):
    np.testing.assert_allclose(alone[0], sharded[0], rtol=1e-4)
    assert len(set(alone[0])) == 3


def assert_an_eighth(alone, sharded):
    for whole, part in zip(alone[1:], sharded[1:], strict=True):
        assert whole / 8 <= part < 1.1 * whole / 8  # vectors, few as they are, stay whole


def test_eight_devices_compute_what_one_does_and_share_the_state():
    alone, sharded, placed = on_eight_devices(
        [("captioner", ONE), ("captioner", MESHES["all"]), ("captioner", MESHES["fsdp"], 0)]
    )
    assert_same_losses(alone, sharded)
    assert_an_eighth(alone, placed)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_mesh_computes_what_one_device_does(case):
    alone, *sharded = on_eight_devices([(case, ONE), *((case, m) for m in MESHES.values())])
    for mesh, result in zip(MESHES, sharded, strict=True):
        print(mesh)  # shown when it fails
        assert_same_losses(alone, result)
        if mesh == "fsdp" and case == "captioner":
            assert_an_eighth(alone, result)


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 1, 1), 1, (1, 1, 1)),
        ((2, 2, -1), 4, (2, 2, 1)),
    ],
)
def test_minus_one_is_what_the_other_axes_leave(mesh, devices, shape):
    c = toy.config(**dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True)))
    assert tuple(partition.mesh_shape(c, devices).values()) == shape


@pytest.mark.parametrize(
    ("fields", "devices", "said"),
    [
        ({"mesh__data": -1, "mesh__fsdp": -1}, 8, "at most one is -1"),
        ({"mesh__data": 0}, 8, "axes are positive"),
        ({"mesh__data": 3}, 8, "needs 3 devices, there are 8"),
        ({"mesh__fsdp": 3}, 8, "needs a multiple of 3 devices, there are 8"),
        ({"mesh__fsdp": 16}, 8, "needs a multiple of 16 devices, there are 8"),
        ({"batch_size": 12}, 8, "batch_size: 12 .* = 8"),
        ({"batch_size": 8, "accumulate": 2}, 8, "batch_size: 8 .*accumulate = 16"),
    ],
)
def test_meshes_that_cannot_be(fields, devices, said):
    with pytest.raises(UserError, match=said):
        partition.mesh_shape(toy.config(**fields), devices)


def abstract_mesh(data=1, fsdp=1, tensor=1):
    return jax.sharding.AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def tree():
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
    return {
        "encoder": {
            "attention": {"query": {"kernel": shape(2, 64, 64), "bias": shape(2, 64)}},
            "norm": {"scale": shape(64)},
            "positions": shape(9, 64),
        },
        "decoder": {"logits": {"kernel": shape(64, 101), "bias": shape(101)}},
    }


def specs(shardings):
    return jax.tree.map(lambda s: s.spec, shardings)


def test_rules_place_parameters_and_leave_out_what_does_not_divide():
    mesh = abstract_mesh(fsdp=4, tensor=2)
    found = specs(partition.param_shardings(tree(), mesh))
    query = found["encoder"]["attention"]["query"]
    assert query["kernel"] == P(None, "fsdp", "tensor")
    assert query["bias"] == P(None, "tensor")
    assert found["encoder"]["norm"]["scale"] == P(None)
    assert found["encoder"]["positions"] == P(None, "fsdp")
    assert found["decoder"]["logits"]["kernel"] == P("fsdp", None)  # 101 is odd


def test_a_configs_own_rules_go_first_and_must_match():
    rules = ((".*/query/kernel", ("tensor", None)),)
    mesh = abstract_mesh(fsdp=4, tensor=2)
    found = specs(partition.param_shardings(tree(), mesh, rules))
    assert found["encoder"]["attention"]["query"]["kernel"] == P(None, "tensor", None)
    with pytest.raises(UserError, match="mesh.rules: '.*/qery/kernel' matches no parameter"):
        partition.param_shardings(tree(), mesh, ((".*/qery/kernel", ()),))


def test_optimizer_state_lies_as_its_parameter_does():
    mesh = abstract_mesh(fsdp=4, tensor=2)
    params = tree()
    shardings = partition.param_shardings(params, mesh)
    kernel = {"encoder": {"attention": {"query": {"kernel": None}}}}
    at = lambda *s: jax.tree.map(  # noqa: E731
        lambda _: jax.ShapeDtypeStruct(s, np.float32), kernel, is_leaf=lambda x: x is None
    )
    state = {"mu": at(2, 64, 64), "row": at(2, 64), "none": at(1), "count": at()}
    state["step"] = jax.ShapeDtypeStruct((), np.int32)
    found = partition.state_shardings(state, params, shardings, mesh)
    spec = lambda name: found[name]["encoder"]["attention"]["query"]["kernel"].spec  # noqa: E731
    assert spec("mu") == P(None, "fsdp", "tensor")
    assert spec("none") == spec("count") == found["step"].spec == P()
