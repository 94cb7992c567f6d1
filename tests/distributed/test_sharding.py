"""Shardings on a mesh: each of eight devices holds an eighth of the state; invalid meshes."""

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
    """Return the bytes of PARTS on one device, and per device with fsdp=8, of real arrays."""
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
        fractions = 8 * np.array(fsdp) / one
        print(*call, *(f"{part} {x:.4f}" for part, x in zip(PARTS, fractions, strict=True)))
        np.testing.assert_allclose(fractions, 1, rtol=0.05)


def test_fsdp_shards_parameters_optimizer_and_average_by_eight():
    """test_layouts.py checks this after real steps, too."""
    optimizers = {"cappa": "adafactor", "siglip": "adamw", "simclr": "lars"}
    assert_an_eighth([(*pair, "toy") for pair in optimizers.items()])


@pytest.mark.slow
def test_fsdp_shards_the_state_of_the_other_objectives_by_eight():
    optimizers = {"cap": "adamw", "clip": "adafactor"}
    optimizers |= {"recurrent": "adafactor", "colorization": "adamw"}
    assert_an_eighth([(*pair, "toy") for pair in optimizers.items()])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Ti/16", "S/16"])
def test_fsdp_shards_the_state_of_real_models_by_eight(model):
    optimizers = ("adamw", "adafactor")
    assert_an_eighth([(o, name, model) for o in OBJECTIVES for name in optimizers])


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 1, 1), 1, (1, 1, 1)),
        ((2, 2, -1), 4, (2, 2, 1)),
        ((-1, 0, 2), 8, (4, 1, 2)),  # without TPUs, 0 means 1
    ],
)
def test_minus_one_is_what_the_other_axes_leave(mesh, devices, shape):
    c = toy.config(**dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True)))
    assert tuple(sharding.mesh_shape(c, devices).values()) == shape


@pytest.mark.parametrize(
    ("fields", "devices", "message"),
    [
        ({"mesh__data": -1, "mesh__fsdp": -1}, 8, "at most one may be -1"),
        ({"mesh__data": 0}, 8, "axes must be positive"),
        ({"mesh__fsdp": -2}, 8, "axes must be positive"),
        ({"mesh__data": 3}, 8, "needs 3 devices, there are 8"),
        ({"mesh__fsdp": 3}, 8, "needs a multiple of 3 devices, there are 8"),
        ({"mesh__fsdp": 16}, 8, "needs a multiple of 16 devices, there are 8"),
        ({"batch_size": 12}, 8, "batch_size: 12 .* = 8"),
        ({"batch_size": 8, "accumulate": 2}, 8, "batch_size: 8 .*accumulate = 16"),
    ],
)
def test_invalid_meshes_are_refused(fields, devices, message):
    with pytest.raises(UserError, match=message):
        sharding.mesh_shape(toy.config(**fields), devices)


def abstract_mesh(data=1, fsdp=1, tensor=1):
    return jax.sharding.AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def tree():
    def shape(*s):
        return jax.ShapeDtypeStruct(s, np.float32)

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


def test_everything_is_sharded_as_far_as_it_divides():
    mesh = abstract_mesh(fsdp=4, tensor=2)
    found = specs(sharding.param_shardings(tree(), mesh))
    query = found["encoder"]["attention"]["query"]
    assert query["kernel"] == P(None, "fsdp", "tensor")
    assert query["bias"] == P(None, ("tensor", "fsdp"))
    assert found["encoder"]["norm"]["scale"] == P("fsdp")
    assert found["encoder"]["positions"] == P(None, "fsdp")
    assert found["encoder"]["log_scale"] == P()
    logits = found["decoder"]["logits"]  # tensor does not divide an odd vocabulary
    assert logits["kernel"] == P(("fsdp", "tensor"), None)
    assert logits["bias"] == P(None)


def test_the_axis_of_stacked_layers_is_never_sharded():
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
def test_the_rules_of_a_config_take_precedence(axes, spec):
    mesh = abstract_mesh(fsdp=4, tensor=2)
    found = specs(sharding.param_shardings(tree(), mesh, ((".*/query/kernel", axes),)))
    assert found["encoder"]["attention"]["query"]["kernel"] == spec
    assert found["encoder"]["positions"] == P(None, "fsdp")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((".*/qery/kernel", ()), "'.*/qery/kernel' matches no parameter"),
        ((".*/kernel", ("fdsp", None)), "'.*/kernel' has the axes .*'fdsp'.* one of data, fsdp,"),
        ((".*/kernel", ("fsdp", ("tensor", "fsdp"))), "'.*/kernel' .* use none of them twice"),
        ((".*/kernel", "fsdp"), "'.*/kernel' has the axes 'fsdp'"),
        ((".*/kernel", None), "'.*/kernel' has the axes None"),
    ],
)
def test_invalid_rules_are_refused(rule, message):
    with pytest.raises(UserError, match=f"mesh.rules: {message}"):
        sharding.param_shardings(tree(), abstract_mesh(), (rule,))


def test_optimizer_state_is_sharded_like_its_parameter():
    mesh = abstract_mesh(fsdp=4, tensor=2)
    params = tree()
    shardings = sharding.param_shardings(params, mesh)

    def at(*s):
        kernel = jax.ShapeDtypeStruct(s, np.float32)
        return {"encoder": {"attention": {"query": {"kernel": kernel}}}}

    state = {"mu": at(2, 64, 64), "column": at(2, 64), "none": at(1), "count": at()}
    state["step"] = jax.ShapeDtypeStruct((), np.int32)
    found = sharding.state_shardings(state, params, shardings, mesh)

    def spec(name):
        return found[name]["encoder"]["attention"]["query"]["kernel"].spec

    assert spec("mu") == P(None, "fsdp", "tensor")
    assert spec("column") == P(None, ("tensor", "fsdp"))  # a factored moment takes over the axis
    assert spec("none") == spec("count") == found["step"].spec == P()
