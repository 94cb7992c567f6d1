"""Building blocks of the transformers: attention, blocks, and scanned stacks of blocks.

Modules hold float32 parameters and compute in `Compute.dtype`. Softmax and layer-normalization
statistics are float32. Initializers follow the authors' code (big_vision `vit.py`): Xavier uniform
kernels, except LeCun normal (the default of Flax) for the patch embedding.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from cap_pretrain.distributed.platform import platform
from cap_pretrain.models import cpu, native
from cap_pretrain.models.attention import (
    ATTENDED,
    explicit_attention,
    fused_attention_works,
    usual_attention,
)
from cap_pretrain.models.compute import REMAT_POLICIES, Compute
from cap_pretrain.models.mlp import XAVIER, Details, mlp_of
from cap_pretrain.models.positions import Rotation, rotate
from cap_pretrain.models.sizes import Size

# Depth from which layers are unrolled on CPUs: those of S/16 (12 and 6 layers) train 1.06 times as
# fast unrolled, and compile 1.3 times as long (one core, commit 3307208).
FEW_LAYERS = 6


class EncoderOutput(NamedTuple):
    """Output of every encoder: `tokens` [B, N, D] and `pooled` [B, D].

    Tokens of images in their own aspect ratio have one more channel; see `models.native`.
    """

    tokens: jax.Array
    pooled: jax.Array


def constrain(x: jax.Array) -> jax.Array:
    """Constrain the leading axis of `x` to the batch axes of the mesh in use, if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(("data", "fsdp")))


def normalize_images(images: jax.Array, dtype: Any) -> Any:
    """Scale uint8 images [B, H, W, 3] to [-1, 1], the recipe's range.

    Stored features are only cast, and packed images become `native.Patches`.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(dtype)
    if native.is_packed(images):
        pixels, grid = native.separate(images)
        return native.Patches(normalize_images(pixels[..., None], dtype)[..., 0], grid)
    return (images.astype(jnp.float32) / 127.5 - 1.0).astype(dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Apply inverted dropout; without a key (evaluation), return `x`."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def drop_branch(x: jax.Array, rate: jax.Array | float, key: jax.Array | None) -> jax.Array:
    """Apply stochastic depth (Huang et al. 2016): zero the branch `x` for some examples."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split_optional(key: jax.Array | None, n: int) -> tuple[jax.Array | None, ...]:
    """Split a key, or return `n` times None if it is None (no randomness)."""
    return (None,) * n if key is None else tuple(jax.random.split(key, n))


class Attention(nnx.Module):
    """Multi-head self-attention or cross-attention; exposes its parts for decoding.

    Args:
        width: D, width of input and output.
        heads: number of heads, which must divide D.
        context_width: E, width of the context for keys and values. None is D.
        bias: whether the linear layers have biases.
        compute: precision and attention kernel.
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
        self.query = cpu.Linear(width, width, **kwargs)
        self.key = cpu.Linear(context_width or width, width, **kwargs)
        self.value = cpu.Linear(context_width or width, width, **kwargs)
        self.out = cpu.Linear(width, width, **kwargs)
        self.heads = heads
        self.compute = compute

    def _split_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def seen(self, context: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return context [B, S, E], and which of it is no padding, bool [B, 1, 1, S], or None."""
        context, real = native.unmarked(context, self.key.in_features)
        return context, None if real is None else real[:, None, None]

    def keys_values(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return keys and values [B, S, heads, D / heads] of context [B, S, E] of `seen`."""
        keys, values = self._split_heads(self.key(context)), self._split_heads(self.value(context))
        return checkpoint_name(keys, "key"), checkpoint_name(values, "value")

    def attend(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        mask: jax.Array | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Attend to keys and values.

        Args:
            x: [B, T, D].
            keys: [B, S, heads, D / heads].
            values: [B, S, heads, D / heads].
            mask: bool [B | 1, 1, T | 1, S], True where a position attends.
            rotation: of the queries; `keys` are rotated already.

        Returns:
            [B, T, D].
        """
        query = checkpoint_name(rotate(self._split_heads(self.query(x)), rotation), "query")
        kind = self.compute.attention
        if kind == "auto":
            fused = fused_attention_works(query, keys, mask is not None, self.compute.deterministic)
            kind = "cudnn" if fused else "cpu" if cpu.serves(query.dtype) else usual_attention()
        if kind == "cpu":
            out = cpu.attention(query, keys, values, mask)
        elif kind in ("recompute", "keep"):
            out = explicit_attention(query, keys, values, mask, kind == "keep")
        else:
            implementation = cast(Literal["xla", "cudnn"], kind)
            if mask is not None:
                mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], keys.shape[1]))
            out = jax.nn.dot_product_attention(
                query, keys, values, mask=mask, implementation=implementation
            )
            out = checkpoint_name(out, ATTENDED)
        return checkpoint_name(self.out(out.reshape(x.shape)), "out")

    def weights(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """Return attention weights float32 [B, heads, T, S] of x [B, T, D] over context [B, S, E].

        They are for inspection: `attend` uses the fastest kernel, which does not return weights.
        """
        context, real = self.seen(context)
        return self.weights_over(x, self._split_heads(self.key(context)), real)

    def weights_over(
        self, x: jax.Array, keys: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Return what `weights` does, over keys [B, S, heads, D / heads]."""
        query = self._split_heads(self.query(x))
        logits = jnp.einsum("bthd,bshd->bhts", query, keys, preferred_element_type=jnp.float32)
        logits = logits * query.shape[-1] ** -0.5
        if mask is not None:
            logits = jnp.where(mask, logits, -jnp.inf)
        return jax.nn.softmax(logits, axis=-1)

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Attend from x [B, T, D] to context [B, S, E], or to x itself; return [B, T, D].

        The context may have a channel that marks padding, which is then not attended to. Queries
        and keys of x itself are rotated by `rotation`.
        """
        if context is None:
            keys, values = self.keys_values(x)
            return self.attend(x, rotate(keys, rotation), values, mask, rotation)
        context, real = self.seen(context)
        if real is not None:
            mask = real if mask is None else mask & real
        return self.attend(x, *self.keys_values(context), mask)


class EncoderBlock(nnx.Module):
    """Pre-norm self-attention and MLP, for ViTs and text towers.

    Args:
        size: shape of the transformer.
        details: normalization, MLP and biases.
        compute: precision, kernels and dropout.
    """

    def __init__(self, size: Size, *, details: Details, compute: Compute, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = dict(compute=compute, rngs=rngs)
        self.norm1 = details.normalization(size.width, **kwargs)
        self.attention = Attention(size.width, size.heads, bias=details.bias, **kwargs)
        self.norm2 = details.normalization(size.width, **kwargs)
        self.mlp = mlp_of(size.width, size.mlp, details, **kwargs)
        self.rate = compute.dropout

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None,
        drop: jax.Array,
        mask: jax.Array | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Map x [B, N, D] to [B, N, D].

        Args:
            x: [B, N, D].
            key: Random key. None in evaluation.
            drop: Stochastic-depth rate of this layer.
            mask: bool [B | 1, 1, N | 1, N], True where a position attends. None is everywhere.
            rotation: of queries and keys. None is none.
        """
        k1, k2, k3, k4 = split_optional(key, 4)
        y = dropout(self.attention(self.norm1(x), mask=mask, rotation=rotation), self.rate, k1)
        x = constrain(x + drop_branch(y, drop, k2))
        y = dropout(self.mlp(self.norm2(x)), self.rate, k3)
        return constrain(x + drop_branch(y, drop, k4))


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Return `depth` equal layers as one module whose parameters have a leading layer axis."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def scan_layers(
    layers: nnx.Module,
    body: Callable[..., tuple[Any, Any]],
    x: Any,
    per_layer: Any,
    *,
    depth: int,
    compute: Compute,
) -> tuple[Any, Any]:
    """Run stacked layers sequentially; compile time grows with the number of unrolled layers.

    Args:
        layers: Result of `stack_layers`.
        body: `(layer, x, inputs of this layer) -> (x, output of this layer)`.
        x: Carry, a tree of arrays.
        per_layer: Tree of arrays with a leading layer axis, or None.
        depth: Number of layers.
        compute: Rematerialization and unrolling.

    Returns:
        The last carry, and the outputs with a leading layer axis.
    """
    graphdef, params = nnx.split(layers)

    def step(x, inputs):
        params, inputs = inputs
        return body(nnx.merge(graphdef, params), x, inputs)

    where, remat, unroll = platform(), compute.remat, min(compute.unroll, depth)
    if remat == "auto":
        remat = "lean" if where == "tpu" else "none"
    if not unroll:
        # On GPUs, "full" keeps so little that stacking it is cheap, and without a loop XLA computes
        # several layers again at the same time (BENCHMARKS.md).
        # On CPUs, the step of few layers compiles sooner in a loop.
        loops = (where == "cpu" and depth < FEW_LAYERS) or (where == "gpu" and remat == "full")
        unroll = 1 if loops else depth
    if remat != "none":
        # XLA does not merge computations across two loops. Without loops, it would merge the
        # recomputation with the original and so undo it.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=unroll == depth)
    return jax.lax.scan(step, x, (params, per_layer), length=depth, unroll=unroll)


def encoder_blocks(size: Size, *, details: Details, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
    """Return the stacked blocks of a transformer encoder for images or text."""
    return stack_layers(
        lambda rngs: EncoderBlock(size, details=details, compute=compute, rngs=rngs),
        size.depth,
        rngs,
    )


def run_encoder_blocks(
    blocks: nnx.Module,
    x: jax.Array,
    key: jax.Array | None,
    *,
    depth: int,
    compute: Compute,
    mask: jax.Array | None = None,
    rotation: Rotation | None = None,
) -> jax.Array:
    """Run `encoder_blocks` on x [B, N, D].

    `key` is None in evaluation; `mask` and `rotation` are those of `EncoderBlock`.
    """
    x, _ = scan_layers(
        blocks,
        lambda block, x, inputs: (block(x, *inputs, mask, rotation), None),
        x,
        layer_randomness(key, depth, compute),
        depth=depth,
        compute=compute,
    )
    return x


def layer_randomness(
    key: jax.Array | None, depth: int, compute: Compute
) -> tuple[jax.Array | None, jax.Array]:
    """Return one key per layer (None in evaluation) and the stochastic-depth rates [depth]."""
    if not (compute.dropout or compute.stochastic_depth):
        key = None  # nothing is random, so no keys and masks are needed
    keys = None if key is None else jax.random.split(key, depth)
    return keys, jnp.linspace(0.0, compute.stochastic_depth, depth)
