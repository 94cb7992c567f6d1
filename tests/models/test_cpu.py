"""The forms of linear layers and attention for CPUs compute the same as the usual ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.models import cpu
from tests.models.test_attention import MASKS


def with_gradients(fn, *args):
    """Return the result of `fn` and the gradients for a random gradient of the result."""

    def both(*args):
        out, pull = jax.vjp(fn, *args)
        return out, pull(jax.random.normal(jax.random.key(1), out.shape))

    return jax.jit(both)(*args)


def assert_close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("mask", MASKS)
def test_attention(mask: str):
    sources = 7 if MASKS[mask] is not None else 5
    shapes = ((3, 7, 2, 8), (3, sources, 2, 8), (3, sources, 2, 8))
    keys = jax.random.split(jax.random.key(0), 3)
    args = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    got = with_gradients(lambda *args: cpu.attention(*args, MASKS[mask]), *args)
    plain = with_gradients(
        lambda *args: jax.nn.dot_product_attention(*args, mask=MASKS[mask]), *args
    )
    assert_close(got, plain)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6), (2, 3, 4, 6)])
def test_linear(shape: tuple[int, ...]):
    ours, plain = (
        nnx.split(kind(6, 5, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        for kind in (cpu.Linear, nnx.Linear)
    )
    x = jax.random.normal(jax.random.key(0), shape)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        assert_close(
            *(
                with_gradients(lambda params, x, g=graphdef: nnx.merge(g, params)(x), params, x)
                for graphdef, params in (ours, plain)
            )
        )
