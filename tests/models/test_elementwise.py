"""Explicit gradients of layer normalization and GELU equal automatic ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.models.elementwise import LayerNorm, gelu_tanh

X = jax.random.normal(jax.random.key(0), (3, 5, 16)) * 2 + 0.7
WEIGHT = jax.random.normal(jax.random.key(1), X.shape)


def values_and_gradients(fn, *args):
    """Return fn(*args) and the gradients of a weighted sum of it by all arguments."""

    def total(*args):
        out = fn(*args)
        return jnp.sum(out.astype(jnp.float32) * WEIGHT[tuple(map(slice, out.shape))]), out

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.value_and_grad(total, range(len(args)), has_aux=True))(*args)
    return found[0][1], found[1]


def assert_close(found, wanted, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        scale = float(jnp.max(jnp.abs(other.astype(jnp.float32)))) + 1e-6
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * scale)


def normalized(graphdef, state, x):
    return nnx.merge(graphdef, state)(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_layer_norm_equals_that_of_flax(bias, dtype, tolerance):
    kwargs = dict(use_bias=bias, epsilon=1e-6, dtype=dtype, rngs=nnx.Rngs(0))
    ours, state = nnx.split(LayerNorm(16, **kwargs))
    theirs, _ = nnx.split(nnx.LayerNorm(16, **kwargs))
    state = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(2), x.shape), state)
    x = X.astype(dtype)
    found, wanted = (
        values_and_gradients(functools.partial(normalized, graphdef), state, x)
        for graphdef in (ours, theirs)
    )
    assert_close(found, wanted, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_gelu_equals_that_of_jax(dtype, tolerance):
    x = (4 * X).astype(dtype)  # both tails
    found = values_and_gradients(gelu_tanh, x)
    assert_close(found, values_and_gradients(jax.nn.gelu, x), tolerance)
