"""The rows of a batch that a host of a pod reads; they need not be contiguous."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.topology.compilers import open_topology
from cap_pretrain.topology.tpu import TPU
from tests.parity import require

require("libtpu")
pytestmark = pytest.mark.parity
TPU().set_environment()


def mesh(name, *shape):
    axes = ("data", "fsdp", "tensor")
    devices = open_topology(name)
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 3, devices=devices)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        # A host has 2 x 2 chips, in two rows of the grid.
        ((32, 1, 1), [0, 1, 2, 3, 16, 17, 18, 19]),
        # The tensor axis crosses two hosts, so both read the same rows.
        ((8, 1, 4), range(8)),
        ((1, 1, 32), range(64)),
    ],
)
def test_a_host_reads_the_rows_that_its_chips_hold(shape, rows):
    found = sharding.batch_rows(mesh("v5e:4x8", *shape), 64)
    held = sharding.batch_sharding(mesh("v5e:4x8", *shape)).addressable_devices_indices_map((64,))
    assert sorted(set(found)) == found.tolist()
    assert set(found) == {row for (s,) in held.values() for row in np.arange(64)[s]}
    assert found.tolist()[: len(rows)] == list(rows)


def test_batches_that_do_not_divide_by_the_chips_are_refused():
    with pytest.raises(UserError, match="batch_size: 48 .* data x fsdp = 32"):
        sharding.batch_rows(mesh("v5e:4x8", 32, 1, 1), 48)
