"""What lies where on a mesh: an eighth of the state on each of eight devices; mistakes told."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from tests import toy
from tests.layouts import OBJECTIVES, Training, bytes_per_device, config, on_eight_devices

PARTS = ("params", "opt_state", "ema")


def bytes_held(objective, optimizer, model):
    """Bytes of each of PARTS on one device, and on each of eight with fsdp=8, of real arrays."""
    c = config(objective, optim__name=optimizer, optim__ema=0.9)
    if model != "toy":
        c.model.update(name=model, width=0, depth=0, mlp=0, heads=0)
        c.data.image_size, c.text.length = 224, 64
    held = []
    for layout in ("one", "fsdp"):
        abstract = Training(c, layout, 104 if model == "toy" else 32_000).abstract
        state = jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract
        )
        held.append([bytes_per_device(getattr(state, part)) for part in PARTS])
    return held


def assert_an_eighth(calls):
    for call, (one, fsdp) in zip(calls, on_eight_devices(bytes_held, calls), strict=True):
        shares = 8 * np.array(fsdp) / one
        print(*call, *(f"{part} {share:.4f}" for part, share in zip(PARTS, shares, strict=True)))
        np.testing.assert_allclose(shares, 1, rtol=0.05)


def test_fsdp_shares_parameters_optimizer_and_average_by_eight():
    """After real steps too: tests/test_layouts.py."""
    optimizers = ("adamw", "adafactor", "adafactor", "adamw", "adafactor", "lars", "adamw")
    assert_an_eighth([(o, name, "toy") for o, name in zip(OBJECTIVES, optimizers, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Ti/16", "S/16"])
def test_fsdp_shares_the_state_of_real_models_by_eight(model):
    optimizers = ("adamw", "adafactor")
    assert_an_eighth([(o, name, model) for o in OBJECTIVES for name in optimizers])


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 1, 1), 1, (1, 1, 1)),
        ((2, 2, -1), 4, (2, 2, 1)),
        ((-1, 0, 2), 8, (4, 1, 2)),  # 0 is 1 where there are no TPUs
    ],
)
def test_minus_one_is_what_the_other_axes_leave(mesh, devices, shape):
    c = toy.config(**dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True)))
    assert tuple(sharding.mesh_shape(c, devices).values()) == shape


@pytest.mark.parametrize(
    ("fields", "devices", "said"),
    [
        ({"mesh__data": -1, "mesh__fsdp": -1}, 8, "at most one is -1"),
        ({"mesh__data": 0}, 8, "axes are positive"),
        ({"mesh__fsdp": -2}, 8, "axes are positive"),
        ({"mesh__data": 3}, 8, "needs 3 devices, there are 8"),
        ({"mesh__fsdp": 3}, 8, "needs a multiple of 3 devices, there are 8"),
        ({"mesh__fsdp": 16}, 8, "needs a multiple of 16 devices, there are 8"),
        ({"batch_size": 12}, 8, "batch_size: 12 .* = 8"),
        ({"batch_size": 8, "accumulate": 2}, 8, "batch_size: 8 .*accumulate = 16"),
    ],
)
def test_meshes_that_cannot_be(fields, devices, said):
    with pytest.raises(UserError, match=said):
        sharding.mesh_shape(toy.config(**fields), devices)


def abstract_mesh(data=1, fsdp=1, tensor=1):
    return jax.sharding.AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def tree():
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)
    return {
        "encoder": {
            "attention": {"query": {"kernel": shape(2, 64, 64), "bias": shape(2, 64)}},
            "norm": {"scale": shape(64)},
            "positions": shape(9, 64),
            "log_scale": shape(),
        },
        "decoder": {"logits": {"kernel": shape(64, 101), "bias": shape(101)}},
    }


def specs(shardings):
    return jax.tree.map(lambda s: s.spec, shardings)


def test_everything_is_split_as_far_as_it_divides():
    mesh = abstract_mesh(fsdp=4, tensor=2)
    found = specs(sharding.param_shardings(tree(), mesh))
    query = found["encoder"]["attention"]["query"]
    assert query["kernel"] == P(None, "fsdp", "tensor")
    assert query["bias"] == P(None, ("tensor", "fsdp"))
    assert found["encoder"]["norm"]["scale"] == P("fsdp")
    assert found["encoder"]["positions"] == P(None, "fsdp")
    assert found["encoder"]["log_scale"] == P()
    logits = found["decoder"]["logits"]  # of an odd vocabulary, which tensor does not divide
    assert logits["kernel"] == P(("fsdp", "tensor"), None)
    assert logits["bias"] == P(None)


def test_the_axis_of_stacked_layers_is_never_split():
    kernel = jax.ShapeDtypeStruct((8, 15, 9), np.float32)
    params = {"mlp": {"up": {"kernel": kernel}}}
    found = specs(sharding.param_shardings(params, abstract_mesh(fsdp=4, tensor=3)))
    assert found["mlp"]["up"]["kernel"] == P(None, None, "tensor")


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("tensor", None), P(None, "tensor", None)),
        ((None, ("tensor", "fsdp")), P(None, None, ("tensor", "fsdp"))),
        (("tensor", "fsdp", None), P("tensor", "fsdp", None)),
        ((), P(None, None, None)),
    ],
)
def test_a_configs_own_rules_go_first(axes, spec):
    mesh = abstract_mesh(fsdp=4, tensor=2)
    found = specs(sharding.param_shardings(tree(), mesh, ((".*/query/kernel", axes),)))
    assert found["encoder"]["attention"]["query"]["kernel"] == spec
    assert found["encoder"]["positions"] == P(None, "fsdp")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ((".*/qery/kernel", ()), "'.*/qery/kernel' matches no parameter"),
        ((".*/kernel", ("fdsp", None)), "'.*/kernel' has the axes .*'fdsp'.* one of data, fsdp,"),
        ((".*/kernel", ("fsdp", ("tensor", "fsdp"))), "'.*/kernel' .* none of them twice"),
        ((".*/kernel", "fsdp"), "'.*/kernel' has the axes 'fsdp'"),
        ((".*/kernel", None), "'.*/kernel' has the axes None"),
    ],
)
def test_rules_that_cannot_be(rule, said):
    with pytest.raises(UserError, match=f"mesh.rules: {said}"):
        sharding.param_shardings(tree(), abstract_mesh(), (rule,))


def test_optimizer_state_lies_as_its_parameter_does():
    mesh = abstract_mesh(fsdp=4, tensor=2)
    params = tree()
    shardings = sharding.param_shardings(params, mesh)
    kernel = {"encoder": {"attention": {"query": {"kernel": None}}}}
    at = lambda *s: jax.tree.map(
        lambda _: jax.ShapeDtypeStruct(s, np.float32), kernel, is_leaf=lambda x: x is None
    )
    state = {"mu": at(2, 64, 64), "column": at(2, 64), "none": at(1), "count": at()}
    state["step"] = jax.ShapeDtypeStruct((), np.int32)
    found = sharding.state_shardings(state, params, shardings, mesh)
    spec = lambda name: found[name]["encoder"]["attention"]["query"]["kernel"].spec
    assert spec("mu") == P(None, "fsdp", "tensor")
    assert spec("column") == P(None, ("tensor", "fsdp"))  # a factored moment takes over the axis
    assert spec("none") == spec("count") == found["step"].spec == P()
