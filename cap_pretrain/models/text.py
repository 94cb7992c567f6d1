"""The caption decoder, a text transformer that attends to an image."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.distributed.determinism import rows_of
from cap_pretrain.models import cpu
from cap_pretrain.models.caches import (
    attend_cached,
    for_queries,
    of_image,
    padded,
    separated,
    written,
)
from cap_pretrain.models.elementwise import LayerNorm
from cap_pretrain.models.layers import (
    Attention,
    Compute,
    constrain,
    dropout,
    layer_randomness,
    scan_layers,
    split_optional,
    stack_layers,
)
from cap_pretrain.models.mlp import Mlp
from cap_pretrain.models.sizes import Size

PAD = 0  # the padding token, which also serves as the start token

Cache = tuple[jax.Array, Any]


def embed(embedding: nnx.Embed, tokens: jax.Array, compute: Compute) -> jax.Array:
    """Return the embeddings [B, T, D] of tokens int32 [B, T]."""
    if not compute.deterministic:
        return embedding(tokens)
    return rows_of(embedding.embedding[...].astype(compute.dtype), tokens)


class DecoderBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention and MLP, without biases.

    Args:
        size: shape of the transformer.
        encoder_width: E, width of the encoder tokens. None is D.
        compute: precision, kernels and dropout.
    """

    def __init__(self, size: Size, *, encoder_width: int | None, compute: Compute, rngs: nnx.Rngs):
        norm = dict(use_bias=False, dtype=compute.dtype, rngs=rngs)
        kwargs: dict[str, Any] = dict(bias=False, compute=compute, rngs=rngs)
        self.norm1 = LayerNorm(size.width, **norm)
        self.self_attention = Attention(size.width, size.heads, **kwargs)
        self.norm2 = LayerNorm(size.width, **norm)
        self.cross_attention = Attention(
            size.width, size.heads, context_width=encoder_width, **kwargs
        )
        self.norm3 = LayerNorm(size.width, **norm)
        self.mlp = Mlp(size.width, size.mlp, **kwargs)
        self.rate = compute.dropout

    def __call__(
        self, x: jax.Array, encoded: jax.Array, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Map hidden states to hidden states, [B * C, T, D].

        The C texts of an image attend to it together, so its keys and values are computed once.

        Args:
            x: [B * C, T, D].
            encoded: Encoder tokens [B, N, E].
            mask: bool [B * C | 1, 1, T, T], True where a position attends.
            key: Random key for dropout. None in evaluation.
        """
        k1, k2, k3 = split_optional(key, 3)
        x = constrain(x + dropout(self.self_attention(self.norm1(x), mask=mask), self.rate, k1))
        queries = self.norm2(x).reshape(len(encoded), -1, x.shape[-1])
        context = self.cross_attention(queries, encoded).reshape(x.shape)
        x = constrain(x + dropout(context, self.rate, k2))
        return constrain(x + dropout(self.mlp(self.norm3(x)), self.rate, k3))

    def attention(self, x: jax.Array, encoded: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the cross-attention weights [B, heads, T, N], for one text per image."""
        x = x + self.self_attention(self.norm1(x), mask=mask)
        return self.cross_attention.weights(self.norm2(x), encoded)

    def step(
        self,
        x: jax.Array,
        mask: jax.Array,
        start: jax.Array,
        own: tuple[jax.Array, jax.Array],
        cross: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Process one position of the C captions of each image.

        Args:
            x: [B, C, D].
            mask: bool [B, 1, C, S], which of the S keys each caption attends to.
            start: Index in S for the keys of this position.
            own: Self-attention keys and values of this layer, of `for_queries`.
            cross: Keys and values of the image for this layer, of `for_queries` or `padded`.

        Returns:
            [B, C, D], and `own` updated with the keys and values of this position.
        """
        y = self.norm1(x)
        keys, values = for_queries(*self.self_attention.keys_values(y))
        own = (
            jax.lax.dynamic_update_slice_in_dim(own[0], keys, start, axis=-1),
            jax.lax.dynamic_update_slice_in_dim(own[1], values, start, axis=-2),
        )
        x = x + attend_cached(self.self_attention, y, *own, mask)
        x = x + attend_cached(self.cross_attention, self.norm2(x), *cross)
        return x + self.mlp(self.norm3(x)), own


class Decoder(nnx.Module):
    """A caption decoder that cross-attends to all tokens of an encoder.

    The embedding has one row more than the vocabulary: the mask token of parallel prediction.
    The output layer starts at zero, keeps its bias and is not tied to the embedding.

    Args:
        size: shape of the decoder.
        vocab_size: V, number of tokens that can be predicted.
        encoder_width: E, width of the encoder tokens. None is D.
        compute: precision, kernels and dropout.
    """

    def __init__(
        self,
        size: Size,
        *,
        vocab_size: int,
        encoder_width: int | None = None,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.embedding = nnx.Embed(
            vocab_size + 1,
            size.width,
            dtype=compute.dtype,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.blocks = stack_layers(
            lambda rngs: self._block(size, encoder_width, compute, rngs), size.depth, rngs
        )
        self.norm = LayerNorm(size.width, use_bias=False, dtype=compute.dtype, rngs=rngs)
        self.logits = cpu.Linear(
            size.width,
            vocab_size,
            dtype=compute.dtype,
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )
        self.size, self.vocab_size, self.compute = size, vocab_size, compute

    @staticmethod
    def _block(
        size: Size, encoder_width: int | None, compute: Compute, rngs: nnx.Rngs
    ) -> nnx.Module:
        """Return a new layer."""
        return DecoderBlock(size, encoder_width=encoder_width, compute=compute, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return logits float32 [B * C, T, V] of every position; arguments as for `states`."""
        return self.to_logits(self.states(tokens, positions, encoded, mask, key=key))

    def states(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the final hidden states [B * C, T, D], for `to_logits`.

        Args:
            tokens: Input tokens int32 [B * C, T], already shifted or masked. The C texts of an
                image (one in training) are adjacent rows.
            positions: Position embeddings [T, D].
            encoded: Encoder tokens [B, N, E].
            mask: bool [B * C | 1, 1, T, T], True where a position attends.
            key: Random key for dropout. None in evaluation.
        """
        return self._decode(self._read(tokens, positions), encoded, mask, key)

    def _decode(
        self, x: jax.Array, encoded: jax.Array, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Return the final hidden states for the input x [B * C, T, D] of the first layer."""
        keys, _ = layer_randomness(key, self.size.depth, self.compute)
        x, _ = scan_layers(
            self.blocks,
            lambda block, x, key: (block(x, encoded, mask, key), None),
            x,
            keys,
            depth=self.size.depth,
            compute=self.compute,
        )
        return self.norm(x)

    def to_logits(self, states: jax.Array) -> jax.Array:
        """Return logits float32 [..., V] of hidden states [..., D]."""
        return self.logits(states).astype(jnp.float32)

    def attention(
        self, tokens: jax.Array, positions: jax.Array, encoded: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Return the cross-attention weights of every layer, for one text per image.

        The arguments are those of `states`.

        Returns:
            float32 [depth, B, heads, T, N]; each row [N] sums to 1.
        """

        def look(block, x, _):
            return block(x, encoded, mask, None), block.attention(x, encoded, mask)

        x = self._read(tokens, positions)
        depth, compute = self.size.depth, self.compute
        return scan_layers(self.blocks, look, x, None, depth=depth, compute=compute)[1]

    def _read(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Return the input [B, T, D] of the first layer: token plus position embeddings."""
        x = embed(self.embedding, tokens, self.compute)
        return constrain(x + positions.astype(x.dtype))

    def init_cache(self, encoded: jax.Array, length: int, beams: int = 1) -> Cache:
        """Return the decoding cache of `length` positions for `beams` captions per image.

        Keys and values are never moved, even when beam search reorders captions. Only a table moves
        with a caption, which says where the keys and values of its past tokens are.

        Args:
            encoded: Encoder tokens [B, N, E].
            length: T, maximum number of tokens.
            beams: C, number of captions per image.

        Returns:
            The part that moves with a caption, int32 [B * C, T]: which of the C rows of its image
            wrote its token at each position, or -1 if there is none yet. And the shared part: keys
            and values of the T * C tokens, ordered by position, and those of the image.
        """
        batch, heads = len(encoded), self.size.heads
        cross = [of_image(block.cross_attention, encoded) for block in self.layers()]
        if beams > 1:
            cross = [padded(*image) for image in cross]
        keys = jnp.zeros((batch, heads, self.size.width // heads, length * beams))
        keys = keys.astype(cross[0][0].dtype)
        own = [(keys, keys.swapaxes(-1, -2))] * self.size.depth
        return jnp.full((batch * beams, length), -1, jnp.int32), (own, cross)

    def layers(self) -> list[DecoderBlock]:
        """Return the layers in order, each with its own parameters."""
        return separated(self.blocks, self.size.depth)

    def separate(self) -> None:
        """Give each layer its own arrays, for decoding."""
        self.blocks = nnx.List(self.layers())

    def step(
        self, tokens: jax.Array, position: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Read tokens int32 [B * C] at `position`; return the next logits [B * C, V], cache."""
        writers, (own, cross) = cache
        batch = len(cross[0][0])
        beams = len(tokens) // batch
        writers, mask = written(writers, position, batch)
        x = self._read_one(tokens, position, positions, batch)
        after = []
        for block, mine, image in zip(self.layers(), own, cross, strict=True):
            x, mine = block.step(x, mask, position * beams, mine, image)
            after.append(mine)
        logits = self.to_logits(self.norm(x))
        return logits.reshape(batch * beams, -1), (writers, (after, cross))

    def _read_one(
        self, tokens: jax.Array, position: jax.Array, positions: jax.Array, batch: int
    ) -> jax.Array:
        """Return the input [B, C, D] of the first layer for tokens int32 [B * C] at `position`."""
        x = self.embedding(tokens).reshape(batch, len(tokens) // batch, -1)
        return x + jax.lax.dynamic_slice_in_dim(positions, position, 1).astype(x.dtype)
