"""Random numbers of pretext tasks depend on the index in the global batch, not on devices."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import tiny
from tests.layouts import on_eight_devices

SIDE = 28
CASES = {
    "rotation": {"copies": "one"},
    "jigsaw": dict(crop=24, cell=8, tile=4, colour=0.5, permutations=10, hidden=(12,), tower=8),
}


def loss_on(devices, task):
    """Return the loss of a batch with a masked last example, and the norm of its gradient."""
    c = tiny.config(task, CASES[task])
    c.data.image_size = SIDE
    graphdef, params, stats = tiny.split(c)
    mesh = Mesh(jax.devices()[:devices], "data")
    batch = {"image": tiny.images(16, SIDE), "mask": np.arange(16) < 15}
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

    def loss(params, batch):
        return nnx.merge(graphdef, params, stats).loss(batch, jax.random.key(0), True)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    return float(value), float(optax.tree.norm(gradient))


@pytest.mark.slow
def test_eight_devices_learn_what_one_learns():
    calls = [(devices, task) for task in CASES for devices in (1, 8)]
    found = np.array(on_eight_devices(loss_on, calls))
    np.testing.assert_allclose(found[::2], found[1::2], rtol=1e-4)
