"""The Vision Transformer: no class token, learned position embedding, final LayerNorm."""

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models.layers import (
    XAVIER,
    Attention,
    Compute,
    EncoderOutput,
    Mlp,
    encoder_blocks,
    run_encoder_blocks,
)
from cap_pretrain.models.sizes import Size


class MapHead(nnx.Module):
    """Multi-head attention pooling (Zhai et al. 2021): a learned query attends to the tokens."""

    def __init__(self, size: Size, *, compute: Compute, rngs: nnx.Rngs):
        self.probe = nnx.Param(XAVIER(rngs.params(), (1, size.width)))
        self.attention = Attention(size.width, size.heads, bias=True, compute=compute, rngs=rngs)
        self.norm = nnx.LayerNorm(size.width, dtype=compute.dtype, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, bias=True, compute=compute, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, N, D] -> [B, D]."""
        probe = jnp.broadcast_to(self.probe[...], (len(tokens), *self.probe.shape))
        x = self.attention(probe.astype(tokens.dtype), tokens)
        return (x + self.mlp(self.norm(x)))[:, 0]


def resample_positions(positions: jax.Array, old: tuple[int, int], new: tuple[int, int]):
    """Resizes a grid of position embeddings [H * W, D] to another grid (bilinear, antialiased)."""
    grid = positions.reshape(*old, -1)
    return jax.image.resize(grid, (*new, grid.shape[-1]), "bilinear").reshape(-1, grid.shape[-1])


class ViT(nnx.Module):
    """An encoder: images in, patch tokens and one pooled vector out.

    Args:
      size: width, depth, mlp, heads.
      patch: patch size in pixels.
      image_size: side of the (square) images the position embedding is made for; other sizes
        that are multiples of `patch` are accepted and get a resampled embedding.
      pool: "gap" (mean of the tokens) or "map" (attention pooling head).
    """

    def __init__(
        self,
        size: Size,
        *,
        patch: int,
        image_size: int,
        pool: str = "gap",
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.patch_embedding = nnx.Linear(
            patch * patch * 3, size.width, dtype=compute.dtype, rngs=rngs
        )
        grid = image_size // patch
        init = nnx.initializers.normal(size.width**-0.5)
        self.positions = nnx.Param(init(rngs.params(), (grid * grid, size.width)))
        self.blocks = encoder_blocks(size, compute=compute, rngs=rngs)
        self.norm = nnx.LayerNorm(size.width, dtype=compute.dtype, rngs=rngs)
        if pool == "map":
            self.head = MapHead(size, compute=compute, rngs=rngs)
        self.size, self.patch, self.grid, self.pool = size, patch, grid, pool
        self.compute = compute

    def __call__(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> EncoderOutput:
        """images [B, H, W, 3] float in [-1, 1] -> tokens [B, N, D], pooled [B, D]."""
        key = key if train else None
        x = self._embed(images)
        x = run_encoder_blocks(self.blocks, x, key, depth=self.size.depth, compute=self.compute)
        tokens = self.norm(x)
        pooled = self.head(tokens) if self.pool == "map" else jnp.mean(tokens, axis=1)
        return EncoderOutput(tokens, pooled)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose output `tokens_at` gives, first to last."""
        return tuple(f"block_{n + 1}" for n in range(self.size.depth))

    def tokens_at(self, layer: str, images: jax.Array) -> jax.Array:
        """images as for `__call__` -> [B, N, D] as they leave a layer; those above do not run."""
        depth = self.layers.index(layer) + 1
        graphdef, params = nnx.split(self.blocks)
        first = nnx.merge(graphdef, jax.tree.map(lambda p: p[:depth], params))
        x = self._embed(images)
        return run_encoder_blocks(first, x, None, depth=depth, compute=self.compute)

    def _embed(self, images: jax.Array) -> jax.Array:
        """images [B, H, W, 3] -> what the first block reads, [B, N, D]."""
        x = self.patch_embedding(self._patchify(images.astype(self.compute.dtype)))
        return x + self._positions(images.shape[1:3]).astype(x.dtype)

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
