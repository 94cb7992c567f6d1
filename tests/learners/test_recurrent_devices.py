"""Collectives of a recurrent captioner with sharded parameters."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from cap_pretrain.distributed import sharding
from cap_pretrain.topology import hlo
from cap_pretrain.training.step import loss_and_stats
from tests import tiny
from tests.layouts import on_eight_devices
from tests.learners import test_recurrent


def gathers(kind: str) -> tuple[int, int]:
    """Return the all-gathers of loss and gradient on a 2 x 4 mesh, inside loops and outside."""
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 4, 1), axes, axis_types=(AxisType.Auto,) * 3)
    options = {"scheduled_sampling": 0.5}
    graphdef, params, stats = test_recurrent.random(kind, **options)
    batch = {
        "image": jnp.asarray(tiny.images(16)),
        "text": jnp.asarray(tiny.texts([3, 5] * 8)),
    }
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def loss(params, batch):
        return loss_and_stats(graphdef, params, stats, batch, jax.random.key(0))[0]

    with jax.set_mesh(mesh):
        program = hlo.parse(jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text())
    loops = [op for ops in program.computations.values() for op in ops if op.opcode == "while"]
    bodies = {name for op in loops for name in op.runs("body")}
    found = [
        name in bodies
        for name, ops in program.computations.items()
        for op in ops
        if op.collective == "all-gather"
    ]
    return sum(found), len(found) - sum(found)


@pytest.mark.slow
def test_weights_are_gathered_once_and_not_for_each_word():
    for within, outside in on_eight_devices(gathers, [[kind] for kind in test_recurrent.KINDS]):
        assert not within and outside
