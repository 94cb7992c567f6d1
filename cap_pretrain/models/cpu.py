"""Linear layers and attention in the forms that XLA's CPU compiler makes fast programs of.

They compute the same as `nnx.Linear` and `jax.nn.dot_product_attention`, up to rounding, and serve
float32 on CPUs. BENCHMARKS.md has their times.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from cap_pretrain.distributed.platform import platform
from cap_pretrain.models.attention import ATTENDED


def serves(dtype: Any) -> bool:
    """Return whether products of this dtype are computed by the forms of this module."""
    return dtype == jnp.float32 and platform() == "cpu"


def _several_devices() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return (jax.device_count() if mesh.empty else mesh.size) > 1


class Linear(nnx.Linear):
    """A linear layer that multiplies matrices on CPUs: all leading axes of the input are one.

    For an input [B, T, D], XLA otherwise transposes input and gradient in memory before it computes
    the gradient of the kernel. On several devices this form is not used: the partitioner of jaxlib
    0.10.2 then computes wrong gradients.
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Map inputs [..., D] to [..., E]."""
        if inputs.ndim < 3 or not serves(self.dtype) or _several_devices():
            return super().__call__(inputs, out_sharding)
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return rows.reshape(*inputs.shape[:-1], -1)


@jax.custom_vjp
def attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Compute the same as `jax.nn.dot_product_attention`.

    Heads come before positions in memory, so that each head is one matrix; the gradient is that of
    `models.attention`, but with stored weights.

    Args:
        query: float32 [B, T, heads, D].
        keys: float32 [B, S, heads, D].
        values: float32 [B, S, heads, D].
        mask: bool [B | 1, 1, T, S], True where a query attends; each query needs at least one key.

    Returns:
        float32 [B, T, heads, D].
    """
    return _forward(query, keys, values, mask)[0]


def _swapped(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


def _forward(query, keys, values, mask):
    scale = query.shape[-1] ** -0.5
    query, keys, values = _swapped(query) * scale, _swapped(keys), _swapped(values)
    logits = jnp.einsum("bhtd,bhsd->bhts", query, keys)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits)
    out = checkpoint_name(jnp.einsum("bhts,bhsd->bhtd", weights, values), ATTENDED)
    return _swapped(out), (query, keys, values, weights, out)


def _backward(residuals, gradient):
    query, keys, values, weights, out = residuals
    scale, gradient = query.shape[-1] ** -0.5, _swapped(gradient)
    value_gradient = jnp.einsum("bhts,bhtd->bhsd", weights, gradient)
    weight_gradient = jnp.einsum("bhtd,bhsd->bhts", gradient, values)
    # The sum over S of weights x weight_gradient, computed from the result.
    mean = jnp.sum(gradient * out, axis=-1, keepdims=True)
    logit_gradient = weights * (weight_gradient - mean)
    query_gradient = jnp.einsum("bhts,bhsd->bhtd", logit_gradient, keys) * scale
    key_gradient = jnp.einsum("bhts,bhtd->bhsd", logit_gradient, query)
    return _swapped(query_gradient), _swapped(key_gradient), _swapped(value_gradient), None


attention.defvjp(_forward, _backward)
