"""Normalization, GELU and SiLU with explicit gradients, which keep and move fewer arrays.

The gradients recompute from the input what automatic differentiation would keep, in float32, as
extra arrays of the size of the activations. By XLA's GPU compiler this halves the memory traffic
of a step besides its matrix products (BENCHMARKS.md, "The step's memory traffic").
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.distributed.platform import platform


class LayerNorm(nnx.LayerNorm):
    """Flax's layer normalization over the last axis, with a scale and statistics in float32.

    Except on TPUs, the rows of the input are normalized as one matrix: with more axes, XLA's GPU
    compiler lays out activations for the sums over examples in the gradient of the scale, and
    transposes them for each product. On TPUs, whose layouts pad each example, that would itself be
    a transposition.
    """

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # always over one axis
        """Normalize x [..., D]."""
        assert self.scale is not None
        bias = None if self.bias is None else self.bias[...]
        rows = x if platform() == "tpu" else x.reshape(-1, x.shape[-1])
        return _normalize(rows, self.scale[...], bias, self.epsilon).reshape(x.shape)


class RMSNorm(nnx.RMSNorm):
    """Flax's RMSNorm over the last axis, computed as `LayerNorm` is, without mean and bias."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # always over one axis
        """Divide x [..., D] by its root mean square."""
        assert self.scale is not None
        rows = x if platform() == "tpu" else x.reshape(-1, x.shape[-1])
        return _normalize(rows, self.scale[...], None, self.epsilon, False).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float, centered: bool = True
) -> jax.Array:
    """Normalize the rows of x [..., D]; the result has the dtype of `x`.

    Unless they are `centered`, their mean is taken to be 0.
    """
    return _normalize_forward(x, scale, bias, epsilon, centered)[0]


def _normalize_forward(x, scale, bias, epsilon, centered):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True) if centered else jnp.float32(0)
    variance = jnp.mean(wide * wide, axis=-1, keepdims=True) - mean * mean
    factor = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
    y = (wide - mean) * (factor * scale)
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype), (x, mean, factor, scale, bias)


def _normalize_backward(epsilon, centered: bool, residuals: Any, gradient: jax.Array):  # noqa: ARG001
    x, mean, factor, scale, bias = residuals
    gradient = gradient.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * factor
    scaled = gradient * scale
    level = jnp.mean(scaled, axis=-1, keepdims=True) if centered else jnp.float32(0)
    along = jnp.mean(scaled * normal, axis=-1, keepdims=True)
    by_x = factor * (scaled - level - normal * along)
    examples = tuple(range(x.ndim - 1))
    by_scale = jnp.sum(gradient * normal, axis=examples)
    by_bias = None if bias is None else jnp.sum(gradient, axis=examples)
    return by_x.astype(x.dtype), by_scale, by_bias


_normalize.defvjp(_normalize_forward, _normalize_backward)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """Apply GELU in its tanh approximation (Hendrycks and Gimpel 2016, 1606.08415, section 2).

    XLA fuses this forward pass into the matrix product before it on NVIDIA GPUs.
    """
    return jax.nn.gelu(x, approximate=True)


_SCALE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_backward(x, gradient):
    wide = x.astype(jnp.float32)
    tanh = jnp.tanh(_SCALE * (wide + _CUBIC * wide**3))
    slope = 0.5 * (1 + tanh) * (1 + wide * (1 - tanh) * _SCALE * (1 + 3 * _CUBIC * wide**2))
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_backward)


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
    """Apply SiLU, x * sigmoid(x) (Hendrycks and Gimpel 2016, 1606.08415)."""
    return jax.nn.silu(x)


def _silu_backward(x, gradient):
    wide = x.astype(jnp.float32)
    gate = jax.nn.sigmoid(wide)
    slope = gate * (1 + wide * (1 - gate))
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


silu.defvjp(lambda x: (silu(x), x), _silu_backward)
