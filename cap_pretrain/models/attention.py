"""Attention that recomputes its weights in the backward pass.

Autodiff of `jax.nn.dot_product_attention` stores the weights [B, heads, T, S] of every layer, in
float32 and again rounded. With 196 tokens these exceed all other activations of the layer, and on a
TPU the memory traffic takes longer than the arithmetic. This implementation stores queries, keys,
values and the result, and has an explicit gradient (Dao et al. 2022, 2205.14135, appendix B.2, but
without tiling, as the sequences are short).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Name under which rematerialization policies can keep the result.
ATTENDED = "attended"


@jax.custom_vjp
def recomputing_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Compute the same as `jax.nn.dot_product_attention`.

    Args:
        query: [B, T, heads, D].
        keys: [B, S, heads, D].
        values: [B, S, heads, D].
        mask: bool [B | 1, 1, T, S], True where a query attends; each query needs at least one key.

    Returns:
        [B, T, heads, D] in the dtype of the queries.
    """
    return _forward(query, keys, values, mask)[0]


def _weights(query: jax.Array, keys: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return weights float32 [B, heads, T, S], written so that XLA fuses product and softmax."""
    product = jnp.einsum("bthd,bshd->bhts", query, keys, preferred_element_type=jnp.float32)
    logits = product * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits)


def _forward(query, keys, values, mask):
    weights = _weights(query, keys, mask).astype(values.dtype)
    out = checkpoint_name(jnp.einsum("bhts,bshd->bthd", weights, values), ATTENDED)
    return out, (query, keys, values, mask, out)


def _backward(residuals, gradient):
    query, keys, values, mask, out = residuals
    weights = _weights(query, keys, mask)
    rounded = weights.astype(query.dtype)
    value_gradient = jnp.einsum("bhts,bthd->bshd", rounded, gradient)
    weight_gradient = jnp.einsum(
        "bthd,bshd->bhts", gradient, values, preferred_element_type=jnp.float32
    )
    # The sum over S of weights x weight_gradient, computed from the result.
    mean = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    mean = jnp.swapaxes(mean, 1, 2)[..., None]
    scale = query.shape[-1] ** -0.5
    logit_gradient = (weights * ((weight_gradient - mean) * scale)).astype(query.dtype)
    query_gradient = jnp.einsum("bhts,bshd->bthd", logit_gradient, keys)
    key_gradient = jnp.einsum("bhts,bthd->bshd", logit_gradient, query)
    return query_gradient, key_gradient, value_gradient, None


recomputing_attention.defvjp(_forward, _backward)
