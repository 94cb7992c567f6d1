"""Attention with an explicit gradient has the values and gradients of standard attention."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.distributed.platform import tracing_for
from cap_pretrain.models import layers
from cap_pretrain.models.attention import explicit_attention, usual_attention
from cap_pretrain.models.mlp import Details
from cap_pretrain.models.sizes import Size

MASKS = {
    "none": None,
    "causal": jnp.tril(jnp.ones((7, 7), bool))[None, None],
    "by example": jnp.ones((3, 1, 7, 7), bool).at[1, :, :, 4:].set(False),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("keep", [True, False])
def test_value_and_gradients(mask: str, dtype, tolerance: float, keep: bool):
    sources = 7 if MASKS[mask] is not None else 5
    keys = jax.random.split(jax.random.key(0), 4)
    query, gradient = (jax.random.normal(k, (3, 7, 2, 8), dtype) for k in keys[:2])
    key, value = (jax.random.normal(k, (3, sources, 2, 8), dtype) for k in keys[2:])

    @jax.jit
    def both(*args):
        results = []
        explicit = functools.partial(explicit_attention, keep=keep)
        for attend in (explicit, jax.nn.dot_product_attention):
            out, pull = jax.vjp(lambda q, k, v, f=attend: f(q, k, v, mask=MASKS[mask]), *args)
            results.append((out, pull(gradient)))
        return results

    ours, plain = both(query, key, value)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def gradients(remat: str, attention: str):
    compute = layers.Compute(remat=remat, attention=attention)
    size = Size(16, 3, 32, 2)
    blocks = layers.encoder_blocks(
        size, details=Details(), compute=compute, rngs=layers.nnx.Rngs(0)
    )
    graphdef, params = layers.nnx.split(blocks)
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))

    def loss(params, x):
        blocks = layers.nnx.merge(graphdef, params)
        return jnp.sum(layers.run_encoder_blocks(blocks, x, None, depth=3, compute=compute) ** 3)

    step = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(step)(params, x), jax.make_jaxpr(step)(params, x)


def test_blocks_that_keep_little_have_the_same_gradients():
    expected, plain = gradients("none", "xla")
    got, lean = gradients("lean", "recompute")
    # The gradient of the key biases is 0 up to rounding, so compare relative to the largest one.
    largest = max(float(jnp.abs(b).max()) for b in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6 * largest)
    # No weights [layers, batch, heads, T, T] are stored for the backward pass.
    kept = re.compile(r"f32\[3,[\d,]*5,5\]")
    assert kept.search(str(plain)) and not kept.search(str(lean))


@pytest.mark.parametrize(
    ("kind", "wanted"), [("TPU v4", "recompute"), ("TPU v5 lite", "keep"), ("TPU v5", "keep")]
)
def test_tpus_keep_weights_where_that_is_faster(kind, wanted):
    with tracing_for(SimpleNamespace(platform="tpu", device_kind=kind)):
        assert usual_attention() == wanted
