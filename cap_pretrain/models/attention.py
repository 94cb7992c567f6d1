"""Attention that keeps no weights for the backward pass: it computes them again.

Autodiff of `jax.nn.dot_product_attention` keeps the weights [B, heads, T, S], in float32 and again
rounded, of every layer: with 196 tokens more than all that the layer has besides, and on a TPU the
traffic takes longer than the arithmetic. Here queries, keys, values and the result are kept, and
the gradient is written out (as Dao et al. 2022, 2205.14135, appendix B.2, but in one piece: the
sequences are short).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# What rematerialisation may keep of it by name.
ATTENDED = "attended"


@jax.custom_vjp
def recomputing_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """What `jax.nn.dot_product_attention` gives.

    Args:
      query: [B, T, heads, D].
      keys: [B, S, heads, D].
      values: [B, S, heads, D].
      mask: bool [B | 1, 1, T, S], True where a query may look; each must look at something.

    Returns:
      [B, T, heads, D] of the queries' dtype.
    """
    return _forward(query, keys, values, mask)[0]


def _weights(query: jax.Array, keys: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[B, heads, T, S] float32. XLA joins product and softmax to one loop if this is written so."""
    product = jnp.einsum("bthd,bshd->bhts", query, keys, preferred_element_type=jnp.float32)
    logits = product * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits)


def _forward(query, keys, values, mask):
    weights = _weights(query, keys, mask).astype(values.dtype)
    out = checkpoint_name(jnp.einsum("bhts,bshd->bthd", weights, values), ATTENDED)
    return out, (query, keys, values, mask, out)


def _backward(kept, gradient):
    query, keys, values, mask, out = kept
    weights = _weights(query, keys, mask)
    rounded = weights.astype(query.dtype)
    of_values = jnp.einsum("bhts,bthd->bshd", rounded, gradient)
    of_weights = jnp.einsum("bthd,bshd->bhts", gradient, values, preferred_element_type=jnp.float32)
    # The sum over S of weights x of_weights, by way of the result.
    mean = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    mean = jnp.swapaxes(mean, 1, 2)[..., None]
    scale = query.shape[-1] ** -0.5
    of_logits = (weights * ((of_weights - mean) * scale)).astype(query.dtype)
    of_query = jnp.einsum("bhts,bshd->bthd", of_logits, keys)
    of_keys = jnp.einsum("bhts,bthd->bshd", of_logits, query)
    return of_query, of_keys, of_values, None


recomputing_attention.defvjp(_forward, _backward)
