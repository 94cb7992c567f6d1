"""The Vision Transformer: patches, learned position embedding, final LayerNorm.

By default as the paper has it, without a class token; its options make it the ViT of CLIP, of
SigLIP or of the original paper (Dosovitskiy et al. 2020), so that weights can travel (see convert).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import (
    XAVIER,
    Attention,
    Compute,
    Details,
    EncoderOutput,
    Mlp,
    encoder_blocks,
    run_encoder_blocks,
)
from cap_pretrain.models.sizes import Size


@dataclasses.dataclass(frozen=True)
class Options(Details):
    """In what ViTs of one size differ, besides the `Details` of their blocks.

    Attributes:
      pool: how the pooled vector is made: "gap", the mean of the patches' tokens; "map", attention
        pooling; "class", the token of the class.
      class_token: whether there is a learned token before those of the patches. It has no position
        embedding of its own: another would only be added to it.
      pre_norm: whether a LayerNorm comes before the first block (CLIP).
      final_norm: what the last LayerNorm is applied to: "tokens", of which one is pooled then, or
        "pooled" (CLIP), so that the tokens are as the last block leaves them.
    """

    pool: str = "gap"
    class_token: bool = False
    pre_norm: bool = False
    final_norm: str = "tokens"


class MapHead(nnx.Module):
    """Multi-head attention pooling (Zhai et al. 2021): a learned query attends to the tokens."""

    def __init__(self, size: Size, *, details: Details, compute: Compute, rngs: nnx.Rngs):
        kwargs = dict(compute=compute, rngs=rngs)
        self.probe = nnx.Param(XAVIER(rngs.params(), (1, size.width)))
        self.attention = Attention(size.width, size.heads, bias=True, **kwargs)
        self.norm = nnx.LayerNorm(
            size.width, epsilon=details.norm_eps, dtype=compute.dtype, rngs=rngs
        )
        self.mlp = Mlp(size.width, size.mlp, bias=True, activation=details.activation, **kwargs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, N, D] -> [B, D]."""
        probe = jnp.broadcast_to(self.probe[...], (len(tokens), *self.probe.shape))
        x = self.attention(probe.astype(tokens.dtype), tokens)
        return (x + self.mlp(self.norm(x)))[:, 0]


def resample_positions(positions: jax.Array, old: tuple[int, int], new: tuple[int, int]):
    """Resizes a grid of position embeddings [H * W, D] to another grid (bilinear, antialiased)."""
    grid = positions.reshape(*old, -1)
    return jax.image.resize(grid, (*new, grid.shape[-1]), "bilinear").reshape(-1, grid.shape[-1])


class ViT(ImageEncoder):
    """A ViT; its layers are block_1, block_2, …

    The tokens are those of the patches, row by row, after that of the class if there is one.

    Args:
      size: width, depth, mlp, heads.
      patch: patch size in pixels.
      image_size: side of the (square) images the position embedding is made for; other sizes
        that are multiples of `patch` are accepted and get a resampled embedding.
      options: see `Options`.
    """

    def __init__(
        self,
        size: Size,
        *,
        patch: int,
        image_size: int,
        options: Options = Options(),
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        norm = dict(epsilon=options.norm_eps, dtype=compute.dtype, rngs=rngs)
        kwargs = dict(details=options, compute=compute, rngs=rngs)
        self.patch_embedding = nnx.Linear(
            patch * patch * 3, size.width, dtype=compute.dtype, rngs=rngs
        )
        grid = image_size // patch
        init = nnx.initializers.normal(size.width**-0.5)
        self.positions = nnx.Param(init(rngs.params(), (grid * grid, size.width)))
        if options.class_token:
            self.class_token = nnx.Param(init(rngs.params(), (1, size.width)))
        if options.pre_norm:
            self.pre_norm = nnx.LayerNorm(size.width, **norm)
        self.blocks = encoder_blocks(size, **kwargs)
        self.norm = nnx.LayerNorm(size.width, **norm)
        if options.pool == "map":
            self.head = MapHead(size, **kwargs)
        self.size, self.patch, self.grid, self.options = size, patch, grid, options
        self.compute = compute

    def _encode(self, images: jax.Array, *, train: bool, key: jax.Array | None) -> EncoderOutput:
        x = self._embed(images)
        x = run_encoder_blocks(self.blocks, x, key, depth=self.size.depth, compute=self.compute)
        if self.options.final_norm == "pooled":
            return EncoderOutput(x, self.norm(self._pool(x)))
        tokens = self.norm(x)
        return EncoderOutput(tokens, self._pool(tokens))

    @property
    def width(self) -> int:
        return self.size.width

    @property
    def layers(self) -> dict[str, int]:
        return {f"block_{n + 1}": self.width for n in range(self.size.depth)}

    def _tokens_at(self, layer: str, images: jax.Array) -> jax.Array:
        depth = list(self.layers).index(layer) + 1
        graphdef, params = nnx.split(self.blocks)
        first = nnx.merge(graphdef, jax.tree.map(lambda p: p[:depth], params))
        x = self._embed(images)
        return run_encoder_blocks(first, x, None, depth=depth, compute=self.compute)

    def _embed(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, 3] -> what the first block reads, [B, N, D]."""
        x = self.patch_embedding(self._patchify(images.astype(self.compute.dtype)))
        x = x + self._positions(images.shape[1:3]).astype(x.dtype)
        if self.options.class_token:
            token = self.class_token[...].astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), *token.shape)), x], axis=1)
        return self.pre_norm(x) if self.options.pre_norm else x

    def _pool(self, tokens: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, D]."""
        if self.options.pool == "map":
            return self.head(tokens)
        if self.options.pool == "class":
            return tokens[:, 0]
        patches = tokens[:, 1:] if self.options.class_token else tokens
        return jnp.mean(patches, axis=1)

    def _patchify(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, N, patch * patch * 3], rows first: a convolution as a product."""
        b, h, w, c = images.shape
        p = self.patch
        x = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, (h // p) * (w // p), p * p * c)

    def _positions(self, shape: tuple[int, int]) -> jax.Array:
        new = (shape[0] // self.patch, shape[1] // self.patch)
        old = (self.grid, self.grid)
        positions = self.positions[...]
        return positions if new == old else resample_positions(positions, old, new)
