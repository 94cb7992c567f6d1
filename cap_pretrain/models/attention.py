"""Attention with an explicit gradient, which stores little, and whether cuDNN's can be used.

Autodiff of `jax.nn.dot_product_attention` stores the weights [B, heads, T, S] of every layer, in
float32 and again rounded. With 196 tokens these exceed all other activations of the layer, and on a
TPU the memory traffic takes longer than the arithmetic. This implementation stores queries, keys,
values, the result and, if asked, the rounded weights. It has an explicit gradient (Dao et al. 2022,
2205.14135, appendix B.2, but without tiling, as the sequences are short).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name

from cap_pretrain.distributed.determinism import compiler_options
from cap_pretrain.distributed.platform import device_kind, platform

# Names under which rematerialization policies can keep the result, and the weights if `keep`.
ATTENDED, WEIGHTS = "attended", "weights"


def causal(length: int) -> jax.Array:
    """Return the causal mask bool [1, 1, T, T]: each position attends to itself and the past."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def explicit_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | None = None,
    keep: bool = False,
) -> jax.Array:
    """Compute the same as `jax.nn.dot_product_attention`.

    Args:
        query: [B, T, heads, D].
        keys: [B, S, heads, D].
        values: [B, S, heads, D].
        mask: bool [B | 1, 1, T, S], True where a query attends; each query needs at least one key.
        keep: Whether to store the weights, in the dtype of the values, for the backward pass.

    Returns:
        [B, T, heads, D] in the dtype of the queries.
    """
    return _forward(query, keys, values, mask, keep)[0]


def _weights(query: jax.Array, keys: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return weights float32 [B, heads, T, S], written so that XLA fuses product and softmax."""
    product = jnp.einsum("bthd,bshd->bhts", query, keys, preferred_element_type=jnp.float32)
    logits = product * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits)


def _forward(query, keys, values, mask, keep):
    weights = _weights(query, keys, mask).astype(values.dtype)
    kept = checkpoint_name(weights, WEIGHTS) if keep else None
    out = checkpoint_name(jnp.einsum("bhts,bshd->bthd", weights, values), ATTENDED)
    return out, (query, keys, values, mask, kept, out)


def _backward(keep, residuals, gradient):
    query, keys, values, mask, kept, out = residuals
    weights = kept.astype(jnp.float32) if keep else _weights(query, keys, mask)
    rounded = kept if keep else weights.astype(query.dtype)
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


explicit_attention.defvjp(_forward, _backward)


def usual_attention() -> str:
    """Return how attention is computed where neither cuDNN nor the form for CPUs serves.

    On a TPU v4, reading stored weights takes longer than computing them again; on v5e and v5p it
    does not (BENCHMARKS.md, "The step's memory traffic").
    """
    if platform() != "tpu":
        return "xla"
    return "recompute" if device_kind() == "TPU v4" else "keep"


def fused_attention_works(
    query: jax.Array, keys: jax.Array, masked: bool, deterministic: bool
) -> bool:
    """Return whether cuDNN's fused kernel supports these shapes, forward and backward."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if platform() != "gpu" or not half or query.shape[1] == 1:
        return False  # a single query, as in decoding, is too little work for it
    return not why_not_fused(query.shape[1:], keys.shape[1:], query.dtype, masked, deterministic)


@functools.cache
def why_not_fused(
    query: tuple[int, ...],
    keys: tuple[int, ...],
    dtype: Any,
    masked: bool,
    deterministic: bool,
    device: jax.Device | None = None,
) -> str:
    """Return why cuDNN's kernel does not support query [T, N, H] and keys [S, N, H]; "" if it does.

    `device` may be one that exists only for the compiler; None is the default device.
    """

    # Support depends on the versions of cuDNN and the GPU, so try to compile.
    def attend(q, k, v):
        mask = jnp.ones((1, 1, query[0], keys[0]), bool) if masked else None
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    where = jax.sharding.SingleDeviceSharding(device) if device else None
    shapes = [jax.ShapeDtypeStruct((1, *s), dtype, sharding=where) for s in (query, keys, keys)]
    try:
        options = compiler_options(deterministic)  # these exclude some kernels
        grad = jax.jit(jax.grad(attend, argnums=(0, 1, 2)), compiler_options=options)
        grad.lower(*shapes).compile()
    except Exception as e:  # any failure means that another kernel must be used
        logging.info("cuDNN attention does not support %s x %s: %s", query, keys, e)
        return str(e) or type(e).__name__
    return ""
