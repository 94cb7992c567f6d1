"""The Vision Transformer: patches with positions, blocks, a final norm, pooling.

The default is that of the captioning paper, without a class token. Options turn it into the ViT of
CLIP, of SigLIP or of the original paper (Dosovitskiy et al. 2020), so weights can be converted (see
`cap_pretrain.convert`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.distributed.determinism import rows_of
from cap_pretrain.models import cpu, native, tokens
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import (
    Attention,
    Compute,
    EncoderOutput,
    encoder_blocks,
    run_encoder_blocks,
)
from cap_pretrain.models.mlp import XAVIER, Details, mlp_of
from cap_pretrain.models.positions import Grid, Rotation, centers, rotation, sines
from cap_pretrain.models.sizes import Size


@dataclasses.dataclass(frozen=True)
class Options(Details):
    """Options in which ViTs of one size differ, besides the `Details` of their blocks.

    Attributes:
        pool: Pooling: "gap", the mean of the patch tokens; "map", attention pooling; "class", the
            class token.
        class_token: Whether there is a learned token before the patch tokens. It has no position
            embedding, which would only be added to it.
        registers: Further learned tokens after the class token (Darcet et al. 2023, 2309.16588).
        pre_norm: Whether there is a norm before the first block (CLIP).
        patch_norm: Whether there is a norm of the patch embeddings, before positions are added.
        positions: Positions of the patches: "learned" embeddings; or computed, "sines" that are
            added, or "rotary" ones in attention. See `models.positions`.
        rope_base: Base of rotary positions; that of DINOv3 by default.
        final_norm: Input of the last norm: "tokens", which are then pooled, or "pooled"
            (CLIP), so that the tokens are the output of the last block.
    """

    pool: str = "gap"
    class_token: bool = False
    registers: int = 0
    pre_norm: bool = False
    patch_norm: bool = False
    positions: str = "learned"
    rope_base: float = 100.0
    final_norm: str = "tokens"


class Masks(NamedTuple):
    """What a pass over images does not see; see `ViT.masked`.

    Attributes:
        attention: bool [B | 1, 1, N, N], True where a token attends to another. None is everywhere.
        hidden: bool [B, P], which of the P patches are hidden. None is none.
        token: [D], what replaces the embedding of a hidden patch, before its position is added.
    """

    attention: jax.Array | None = None
    hidden: jax.Array | None = None
    token: jax.Array | None = None


class MapHead(nnx.Module):
    """Multi-head attention pooling (Zhai et al. 2021): a learned query attends to the tokens.

    Args:
        size: shape of the transformer.
        details: normalization and MLP; all linear layers have biases.
        compute: precision and kernels.
    """

    def __init__(self, size: Size, *, details: Details, compute: Compute, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = dict(compute=compute, rngs=rngs)
        self.probe = nnx.Param(XAVIER(rngs.params(), (1, size.width)))
        self.attention = Attention(size.width, size.heads, bias=True, **kwargs)
        self.norm = details.normalization(size.width, **kwargs)
        own = dataclasses.replace(details, bias=True)
        self.mlp = mlp_of(size.width, size.mlp, own, **kwargs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Pool tokens [B, N, D], with padding perhaps marked (`models.native`), to [B, D]."""
        probe = jnp.broadcast_to(self.probe[...], (len(tokens), *self.probe.shape))
        x = self.attention(probe.astype(tokens.dtype), tokens)
        return (x + self.mlp(self.norm(x)))[:, 0]


Resample = Callable[[jax.Array, tuple[int, int], tuple[int, int]], jax.Array]
"""A function with the arguments of `resample_positions`."""


def resample_positions(
    positions: jax.Array, old: tuple[int, int], new: tuple[int, int]
) -> jax.Array:
    """Resize position embeddings [H * W, D] from an old to a new grid (bilinear, antialiased)."""
    grid = positions.reshape(*old, -1)
    return jax.image.resize(grid, (*new, grid.shape[-1]), "bilinear").reshape(-1, grid.shape[-1])


class ViT(ImageEncoder):
    """A Vision Transformer; its layers are block_1, block_2 and so on.

    The tokens are the optional class token, then the patch tokens in row-major order. Images may
    also be `native.Patches`, whose positions are resampled to the grid of each image and whose
    padding is marked in the tokens; all of these are kept in training.

    Args:
        size: shape of the transformer.
        patch: patch size in pixels.
        image_size: side in pixels of the square images for the position embeddings. Images of other
            sizes that are multiples of `patch` get resampled position embeddings.
        options: see `Options`.
        keep: share of the patch tokens that are kept in training; see `models.tokens`.
        compute: precision, kernels and dropout.
    """

    def __init__(
        self,
        size: Size,
        *,
        patch: int,
        image_size: int,
        options: Options = Options(),
        keep: float = 1.0,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = dict(compute=compute, rngs=rngs)
        self.patch_embedding = cpu.Linear(
            patch * patch * 3, size.width, dtype=compute.dtype, rngs=rngs
        )
        grid = image_size // patch
        init = nnx.initializers.normal(size.width**-0.5)
        if options.positions == "learned":
            self.positions = nnx.Param(init(rngs.params(), (grid * grid, size.width)))
        if options.class_token:
            shape = (1 + options.registers, size.width)
            self.class_token = nnx.Param(init(rngs.params(), shape))
        if options.patch_norm:
            self.patch_norm = options.normalization(size.width, **kwargs)
        if options.pre_norm:
            self.pre_norm = options.normalization(size.width, **kwargs)
        self.blocks = encoder_blocks(size, details=options, **kwargs)
        self.norm = options.normalization(size.width, **kwargs)
        if options.pool == "map":
            self.head = MapHead(size, details=options, **kwargs)
        self.size, self.patch, self.grid, self.options = size, patch, grid, options
        self.keep, self.compute = keep, compute

    def _encode(
        self,
        images: jax.Array | native.Patches,
        *,
        train: bool,  # noqa: ARG002  # `key` decides
        key: jax.Array | None,
    ) -> EncoderOutput:
        kept = None
        if key is not None and not isinstance(images, native.Patches):
            total = self._grid(images).patches
            kept = tokens.draw(key, len(images), total, self.keep, self.leading)
        return self._output(images, key, Masks(), kept)

    def masked(
        self,
        images: jax.Array,
        masks: Masks,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> EncoderOutput:
        """Encode images of which parts are hidden; the other arguments are those of a call.

        All patches are kept.
        """
        train = train and not self.frozen
        return self._output(self._seen(images), key if train else None, masks)

    def _output(
        self,
        images: jax.Array | native.Patches,
        key: jax.Array | None,
        masks: Masks,
        kept: jax.Array | None = None,
    ) -> EncoderOutput:
        real = self._real(images)
        x = run_encoder_blocks(
            self.blocks,
            self._embed(images, masks, kept),
            key,
            depth=self.size.depth,
            compute=self.compute,
            mask=masks.attention if real is None else real[:, None, None],
            rotation=self._rotation(images, kept),
        )
        marked = x if real is None else native.marked(x, real)
        if self.options.final_norm == "pooled":
            return EncoderOutput(marked, self.norm(self._pool(marked)))
        marked = self.norm(x) if real is None else native.marked(self.norm(x), real)
        return EncoderOutput(marked, self._pool(marked))

    def _real(self, images: jax.Array | native.Patches) -> jax.Array | None:
        """Return which tokens are no padding, bool [B, N], or None if all are."""
        if not isinstance(images, native.Patches):
            return None
        return jnp.pad(images.real, ((0, 0), (self.leading, 0)), constant_values=True)

    @property
    def width(self) -> int:  # type: ignore[override]  # read-only here
        """Width of the tokens and the pooled vector."""
        return self.size.width

    @property
    def layers(self) -> dict[str, int]:  # type: ignore[override]  # read-only here
        """Width of each block's output, by name."""
        return {f"block_{n + 1}": self.width for n in range(self.size.depth)}

    @property
    def leading(self) -> int:  # type: ignore[override]  # read-only here
        """Number of tokens before those of the patches."""
        return 1 + self.options.registers if self.options.class_token else 0

    def _tokens_at(self, layer: str, images: jax.Array | native.Patches) -> jax.Array:
        depth = list(self.layers).index(layer) + 1
        graphdef, params = nnx.split(self.blocks)
        first = nnx.merge(graphdef, jax.tree.map(lambda p: p[:depth], params))
        x, real = self._embed(images, Masks()), self._real(images)
        x = run_encoder_blocks(
            first,
            x,
            None,
            depth=depth,
            compute=self.compute,
            mask=None if real is None else real[:, None, None],
            rotation=self._rotation(images, None),
        )
        return x if real is None else native.marked(x, real)

    def _embed(
        self,
        images: jax.Array | native.Patches,
        masks: Masks,
        kept: jax.Array | None = None,
    ) -> jax.Array:
        """Return the input [B, N, D] of the first block for images [B, H, W, 3] or patches.

        With `kept`, int32 [B, K], only these patches are embedded, with their own positions.
        """
        x = images.pixels if isinstance(images, native.Patches) else self.patchify(images)
        x = x.astype(self.compute.dtype)
        x = self.patch_embedding(x if kept is None else tokens.take(x, kept))
        if self.options.patch_norm:
            x = self.patch_norm(x)
        if masks.hidden is not None and masks.token is not None:
            x = jnp.where(masks.hidden[..., None], masks.token.astype(x.dtype), x)
        if self.options.positions != "rotary":
            positions = self._positions(images).astype(x.dtype)
            x = x + (positions if kept is None else rows_of(positions, kept))
        if self.options.class_token:
            token = self.class_token[...].astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), *token.shape)), x], axis=1)
        return self.pre_norm(x) if self.options.pre_norm else x

    def _pool(self, tokens: jax.Array) -> jax.Array:
        """Pool tokens [B, N, D], with padding perhaps marked, to [B, D]."""
        if self.options.pool == "map":
            return self.head(tokens)
        if self.options.pool == "class":
            return tokens[:, 0, : self.width]
        return native.mean(tokens[:, self.leading :], self.width)

    def patchify(self, images: jax.Array) -> jax.Array:
        """Split [B, H, W, 3] into flat patches [B, N, patch * patch * 3] in row-major order."""
        b, h, w, c = images.shape
        p = self.patch
        x = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, (h // p) * (w // p), p * p * c)

    def _positions(self, images: jax.Array | native.Patches) -> jax.Array:
        """Return the position embeddings [N, D] of images, or [B, N, D] of patches."""
        grid = self._grid(images)
        if self.options.positions == "sines":
            computed = sines(grid, self.width)
            return computed if isinstance(images, native.Patches) else computed[0]
        positions, old = self.positions[...], (self.grid, self.grid)
        if isinstance(images, native.Patches):
            return native.positions(positions.reshape(*old, -1), images.grid, grid.patches)
        new = self._sides(images)
        return positions if new == old else resample_positions(positions, old, new)

    def _rotation(
        self, images: jax.Array | native.Patches, kept: jax.Array | None
    ) -> Rotation | None:
        """Return the rotation of the tokens, of which `kept`, int32 [B, K], or all are there."""
        if self.options.positions != "rotary":
            return None
        places = centers(self._grid(images))
        if kept is not None:
            places = rows_of(places[0], kept)
        dim = self.width // self.size.heads
        return rotation(places, self.options.rope_base, dim, self.leading)

    def _grid(self, images: jax.Array | native.Patches) -> Grid:
        """Return rows, columns and number of the patches of images [B, H, W, 3] or patches."""
        if isinstance(images, native.Patches):
            return Grid(images.grid[:, :1], images.grid[:, 1:], images.pixels.shape[1])
        rows, columns = self._sides(images)
        return Grid(rows, columns, rows * columns)

    def _sides(self, images: jax.Array) -> tuple[int, int]:
        """Return rows and columns of the patches of images [B, H, W, 3]."""
        return images.shape[1] // self.patch, images.shape[2] // self.patch
