"""The gradients of transformer blocks on a mesh of all three axes are those on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cap_pretrain.models import layers
from cap_pretrain.models.mlp import Details
from cap_pretrain.models.sizes import Size
from tests.layouts import on_eight_devices


def gradients(mesh_shape):
    """Loss and gradients of two blocks, kernels sharded over fsdp and tensor, as lists."""
    compute = layers.Compute(attention="auto")
    blocks = layers.encoder_blocks(
        Size(16, 2, 32, 2), details=Details(), compute=compute, rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(blocks)
    x = jax.random.normal(jax.random.key(1), (8, 5, 16))

    def loss(params, x):
        blocks = nnx.merge(graphdef, params)
        return jnp.sum(layers.run_encoder_blocks(blocks, x, None, depth=2, compute=compute) ** 3)

    devices = jax.devices()[: int(np.prod(mesh_shape))]
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh(mesh_shape, axes, axis_types=(AxisType.Auto,) * 3, devices=devices)
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda p: jax.device_put(
                p, NamedSharding(mesh, P(None, "fsdp", "tensor") if p.ndim == 3 else P())
            ),
            params,
        )
        x = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(found)]


@pytest.mark.slow
def test_blocks_have_the_same_gradients():
    # jaxlib 0.10.2 computes wrong ones of linear layers whose leading axes are joined.
    one, eight = on_eight_devices(gradients, [((1, 1, 1),), ((2, 2, 2),)])
    largest = max(np.abs(leaf).max() for leaf in one[1:])
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * largest)
