"""Building blocks of the transformers: attention, MLP, blocks, and stacks of blocks under scan.

Modules hold float32 parameters and compute in `dtype`; softmax and layer normalisation statistics
are float32. Initialisers follow the authors' code (big_vision `vit.py`): Xavier uniform kernels,
but LeCun normal (the default of Flax) for the patch embedding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from cap_pretrain.distributed.determinism import compiler_options
from cap_pretrain.models.attention import ATTENDED, recomputing_attention
from cap_pretrain.models.sizes import Size

XAVIER = nnx.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model computes, as opposed to what.

    Attributes:
      dtype: of activations and of the parameters as they enter a product.
      attention: "xla", "cudnn" (fused, GPU only), "recompute" (see models/attention.py) or "auto"
        (cudnn where it applies, recompute on TPUs, else xla).
      remat: what the backward pass keeps: "none" recomputes nothing; "full" recomputes all but the
        layer inputs; "dots" keeps the results of matrix products; "lean" what enters attention and
        comes out of it, and the hidden units of the MLP before their activation; "auto" is lean on
        TPUs, else none.
      unroll: layers per iteration of the scan over depth; the depth itself unrolls it whole; 0 is
        that on TPUs, else 1.
      logit_chunks: parts of a text for which the logits of a loss are made, one after the other.
      dropout: rate after attention and MLP.
      stochastic_depth: rate of dropping a residual branch, growing linearly with depth.
      deterministic: whether the gradients are to have the same bits each time on GPUs.
    """

    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    unroll: int = 1
    logit_chunks: int = 1
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    deterministic: bool = False


# What "lean" keeps, by the names given below. Normalisation and activation are cheap to
# compute again; on a TPU that is faster than to store and to load what they give.
KEPT = ("query", "key", "value", ATTENDED, "out", "hidden")

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "lean": jax.checkpoint_policies.save_only_these_names(*KEPT),
}


class EncoderOutput(NamedTuple):
    """What every encoder returns: `tokens` [B, N, D] and `pooled` [B, D]."""

    tokens: jax.Array
    pooled: jax.Array


def constrain(x: jax.Array) -> jax.Array:
    """Keeps the leading axis of `x` on the batch axes of the mesh in use, if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(("data", "fsdp")))


def normalize_images(images: jax.Array, dtype: Any) -> jax.Array:
    """uint8 [B, H, W, 3] -> values in [-1, 1], the recipe's range; stored features stay."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(dtype)
    return (images.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; does nothing without a key (evaluation)."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def drop_branch(x: jax.Array, rate: jax.Array | float, key: jax.Array | None) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): zeroes the whole branch of some examples."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split_optional(key: jax.Array | None, n: int) -> tuple[jax.Array | None, ...]:
    """Splits a key that may be None (no randomness wanted)."""
    return (None,) * n if key is None else tuple(jax.random.split(key, n))


# By the name in a config. Ours is the tanh approximation, as in the authors' code; quick_gelu is
# that of CLIP (Radford et al. 2021, `model.py` of their code).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": nnx.gelu,
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class Details:
    """In what encoder blocks of one size differ between families of models.

    Attributes:
      activation: of the MLP, one of ACTIVATIONS.
      norm_eps: what layer normalisation adds to the variance.
    """

    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool,
        activation: str = Details.activation,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(
            use_bias=bias,
            dtype=compute.dtype,
            kernel_init=XAVIER,
            bias_init=nnx.initializers.normal(1e-6),
            rngs=rngs,
        )
        self.up = nnx.Linear(width, hidden, **kwargs)
        self.down = nnx.Linear(hidden, width, **kwargs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = checkpoint_name(self.up(x), "hidden")
        return self.down(ACTIVATIONS[self.activation](hidden))


class Attention(nnx.Module):
    """Multi-head attention, of `x` to itself or to `context`; exposes its parts for decoding.

    Args:
      width: D, of `x` and of what comes out.
      heads: they share D.
      context_width: E, of what keys and values are made from; None is D.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        bias: bool,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(use_bias=bias, dtype=compute.dtype, kernel_init=XAVIER, rngs=rngs)
        self.query = nnx.Linear(width, width, **kwargs)
        self.key = nnx.Linear(context_width or width, width, **kwargs)
        self.value = nnx.Linear(context_width or width, width, **kwargs)
        self.out = nnx.Linear(width, width, **kwargs)
        self.heads = heads
        self.compute = compute

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def keys_values(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """context [B, S, E] -> keys and values, each [B, S, heads, D / heads]."""
        keys, values = self._split_heads(self.key(context)), self._split_heads(self.value(context))
        return checkpoint_name(keys, "key"), checkpoint_name(values, "value")

    def attend(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """x [B, T, D], keys and values [B, S, heads, D / heads], mask bool [B | 1, 1, T, S]."""
        query = checkpoint_name(self._split_heads(self.query(x)), "query")
        kind = self.compute.attention
        if kind == "auto":
            fused = fused_attention_works(query, keys, mask is not None, self.compute.deterministic)
            usual = "recompute" if jax.default_backend() == "tpu" else "xla"
            kind = "cudnn" if fused else usual
        if kind == "recompute":
            out = recomputing_attention(query, keys, values, mask)
        else:
            out = jax.nn.dot_product_attention(query, keys, values, mask=mask, implementation=kind)
            out = checkpoint_name(out, ATTENDED)
        return checkpoint_name(self.out(out.reshape(x.shape)), "out")

    def weights(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """What each of x [B, T, D] takes of each of context [B, S, E]: [B, heads, T, S] float32.

        To look at: `attend` computes the same in whatever kernel is fastest, and gives no weights.
        """
        query, keys = self._split_heads(self.query(x)), self._split_heads(self.key(context))
        logits = jnp.einsum("bthd,bshd->bhts", query, keys, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1)

    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        return self.attend(x, *self.keys_values(x if context is None else context), mask)


def fused_attention_works(
    query: jax.Array, keys: jax.Array, masked: bool, deterministic: bool
) -> bool:
    """Whether cuDNN's fused kernel takes attention of these shapes, forward and backward."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() != "gpu" or not half or query.shape[1] == 1:
        return False  # one query, as in decoding, is no work for it
    return _cudnn_compiles(query.shape[1:], keys.shape[1:], query.dtype, masked, deterministic)


@functools.cache
def _cudnn_compiles(
    query: tuple[int, ...], keys: tuple[int, ...], dtype: Any, masked: bool, deterministic: bool
) -> bool:
    # What it takes depends on the versions of cuDNN and of the GPU, so it is asked and not guessed.
    def attend(q, k, v):
        mask = jnp.ones((1, 1, query[0], keys[0]), bool) if masked else None
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    shapes = [jax.ShapeDtypeStruct((1, *shape), dtype) for shape in (query, keys, keys)]
    try:
        options = compiler_options(deterministic)  # which rule out some of its kernels
        grad = jax.jit(jax.grad(attend, argnums=(0, 1, 2)), compiler_options=options)
        grad.lower(*shapes).compile()
    except Exception as e:  # a choice of kernel, not an error: every refusal means "the other one"
        logging.info("cuDNN attention does not take %s x %s: %s", query, keys, e)
        return False
    return True


class EncoderBlock(nnx.Module):
    """Pre-norm self-attention and MLP, with biases (ViT; also the text tower)."""

    def __init__(self, size: Size, *, details: Details, compute: Compute, rngs: nnx.Rngs):
        kwargs = dict(compute=compute, rngs=rngs)
        norm = dict(epsilon=details.norm_eps, dtype=compute.dtype, rngs=rngs)
        self.norm1 = nnx.LayerNorm(size.width, **norm)
        self.attention = Attention(size.width, size.heads, bias=True, **kwargs)
        self.norm2 = nnx.LayerNorm(size.width, **norm)
        self.mlp = Mlp(size.width, size.mlp, bias=True, activation=details.activation, **kwargs)
        self.rate = compute.dropout

    def __call__(self, x: jax.Array, key: jax.Array | None, drop: jax.Array) -> jax.Array:
        """x [B, N, D]; `key` None means evaluation; `drop` is this layer's stochastic depth."""
        k1, k2, k3, k4 = split_optional(key, 4)
        y = dropout(self.attention(self.norm1(x)), self.rate, k1)
        x = constrain(x + drop_branch(y, drop, k2))
        y = dropout(self.mlp(self.norm2(x)), self.rate, k3)
        return constrain(x + drop_branch(y, drop, k4))


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns `depth` equal layers as one module whose parameters have a leading layer axis."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def scan_layers(
    layers: nnx.Module,
    body: Callable[..., tuple[jax.Array, Any]],
    x: jax.Array,
    per_layer: Any,
    *,
    depth: int,
    compute: Compute,
) -> tuple[jax.Array, Any]:
    """Runs stacked layers one after the other; compile time grows with those that are unrolled.

    Args:
      layers: from `stack_layers`.
      body: `(layer, x, inputs of this layer) -> (x, output of this layer)`.
      x: what flows through.
      per_layer: pytree of arrays with a leading layer axis (or None).
      depth: the number of layers.
      compute: gives rematerialisation and unrolling.
    """
    graphdef, params = nnx.split(layers)

    def step(x, inputs):
        params, inputs = inputs
        return body(nnx.merge(graphdef, params), x, inputs)

    on_tpu = jax.default_backend() == "tpu"
    remat, unroll = compute.remat, min(compute.unroll, depth)
    if remat == "auto":
        remat = "lean" if on_tpu else "none"
    if not unroll:
        unroll = depth if on_tpu else 1
    if remat != "none":
        # XLA merges nothing across two loops; without loops it would undo the recomputation.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=unroll == depth)
    return jax.lax.scan(step, x, (params, per_layer), length=depth, unroll=unroll)


def in_chunks(fn: Callable[..., Any], chunks: int, params: Any, *arrays: jax.Array) -> Any:
    """Returns `fn(params, *arrays)`, computed for one part of the second axis after the other.

    What `fn` computes on the way is kept no longer than a part lasts: the backward pass computes it
    again. Examples stay on the devices they are on, as they would not in parts of the first axis.

    Args:
      fn: of `params` and arrays [B, L, ...], for any L; gives a tree of arrays [B, L, ...].
      chunks: how many parts; the last may be shorter.
      params: what every part reads. What fsdp has split of it is gathered once and not for each
        part; the last axis of a matrix, which may be split over tensor, stays so.
      arrays: [B, T, ...] each.
    """
    total = arrays[0].shape[1]
    length = -(-total // chunks)
    if length == total:
        return fn(params, *arrays)
    if not jax.sharding.get_abstract_mesh().empty:
        params = jax.lax.with_sharding_constraint(params, P(None, P.UNCONSTRAINED))
    count = -(-total // length)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * length - total), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(len(x), count, length, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(parts):
        return fn(params, *map(constrain, parts))

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * length, *x.shape[3:])[:, :total]

    return jax.tree.map(join, jax.lax.map(one, tuple(map(split, arrays))))


def encoder_blocks(
    size: Size, *, details: Details = Details(), compute: Compute, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns the stacked blocks of a transformer encoder, of images or of text."""
    return stack_layers(
        lambda rngs: EncoderBlock(size, details=details, compute=compute, rngs=rngs),
        size.depth,
        rngs,
    )


def run_encoder_blocks(
    blocks: nnx.Module, x: jax.Array, key: jax.Array | None, *, depth: int, compute: Compute
) -> jax.Array:
    """Runs `encoder_blocks` on x [B, N, D]; `key` None means evaluation."""
    x, _ = scan_layers(
        blocks,
        lambda block, x, inputs: (block(x, *inputs), None),
        x,
        layer_randomness(key, depth, compute),
        depth=depth,
        compute=compute,
    )
    return x


def layer_randomness(
    key: jax.Array | None, depth: int, compute: Compute
) -> tuple[jax.Array | None, jax.Array]:
    """Returns one key a layer (None in evaluation) and the stochastic depth rates [depth]."""
    if not (compute.dropout or compute.stochastic_depth):
        key = None  # Nothing is random: no keys, no masks.
    keys = None if key is None else jax.random.split(key, depth)
    return keys, jnp.linspace(0.0, compute.stochastic_depth, depth)
