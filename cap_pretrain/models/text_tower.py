"""The text tower of dual encoders."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models.attention import causal
from cap_pretrain.models.elementwise import LayerNorm
from cap_pretrain.models.layers import Compute, constrain, encoder_blocks, run_encoder_blocks
from cap_pretrain.models.mlp import Details
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.text import PAD, embed

POOLS = ("last", "eos")


@dataclasses.dataclass(frozen=True)
class TextOptions(Details):
    """Options in which text towers of one size differ, besides the `Details` of their blocks.

    Attributes:
        causal: Whether a position attends only to itself and those before it (CLIP).
        pool: The position whose vector stands for the text: "last", the last of all, padding or
            not (SigLIP); "eos", the last that is not padding, which is that of EOS (CLIP).
    """

    causal: bool = False
    pool: str = "last"


class TextTower(nnx.Module):
    """A text encoder that pools one of its `length` positions.

    Padding is not masked. With the default options, the last position of a padded text serves as
    the read-out token, as in the authors' code (big_vision `text_transformer.py`, pool "last") and
    in SigLIP. Behind EOS, a causal tower with pool "eos" reads nothing. So weights of both CLIP and
    SigLIP can be converted.

    Args:
        size: shape of the transformer.
        vocab_size: number of tokens.
        length: T, number of positions.
        options: see `TextOptions`.
        compute: precision, kernels and dropout.
    """

    def __init__(
        self,
        size: Size,
        *,
        vocab_size: int,
        length: int,
        options: TextOptions = TextOptions(),
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.embedding = nnx.Embed(
            vocab_size,
            size.width,
            dtype=compute.dtype,
            embedding_init=nnx.initializers.normal(size.width**-0.5),
            rngs=rngs,
        )
        init = nnx.initializers.normal(size.width**-0.5)
        self.positions = nnx.Param(init(rngs.params(), (length, size.width)))
        self.blocks = encoder_blocks(size, details=options, compute=compute, rngs=rngs)
        self.norm = LayerNorm(size.width, epsilon=options.norm_eps, dtype=compute.dtype, rngs=rngs)
        self.size, self.options, self.compute = size, options, compute

    def __call__(
        self, text: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Encode text int32 [B, T] as vectors [B, D]."""
        x = embed(self.embedding, text, self.compute)
        x = constrain(x + self.positions[...].astype(x.dtype))
        x = run_encoder_blocks(
            self.blocks,
            x,
            key if train else None,
            depth=self.size.depth,
            compute=self.compute,
            mask=causal(text.shape[1]) if self.options.causal else None,
        )
        if self.options.pool == "last":
            return self.norm(x)[:, -1]
        last = jnp.maximum(jnp.sum(text != PAD, axis=1) - 1, 0)  # 0 in a row of only padding
        return self.norm(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])
