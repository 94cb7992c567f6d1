"""Programs that are compiled in the background."""

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain.distributed.ahead import Ahead


def test_a_program_is_traced_at_once_and_used_where_it_fits():
    traced = []

    def double(tree, nothing):
        traced.append(tree["x"].shape)
        return {"y": 2 * tree["x"]}

    fn, x = jax.jit(double), jnp.arange(3.0)
    ahead = Ahead(fn, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}, None)
    assert traced == [(3,)]
    for _ in range(2):
        np.testing.assert_array_equal(ahead({"x": x}, None)["y"], [0, 2, 4])
    assert traced == [(3,)]
    other = Ahead(fn, {"x": jax.ShapeDtypeStruct((4,), x.dtype, sharding=x.sharding)}, None)
    np.testing.assert_array_equal(other({"x": x}, None)["y"], [0, 2, 4])  # left to the function
