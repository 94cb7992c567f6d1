"""Transformers over text: the caption decoder and the tower of the dual encoders."""

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.determinism import rows_of
from cap_pretrain.models.layers import (
    Attention,
    Compute,
    Mlp,
    constrain,
    dropout,
    encoder_blocks,
    layer_randomness,
    run_encoder_blocks,
    scan_layers,
    split_optional,
    stack_layers,
)
from cap_pretrain.models.sizes import Size


def embed(embedding: nnx.Embed, tokens: jax.Array, compute: Compute) -> jax.Array:
    """The embeddings [B, T, D] of tokens int32 [B, T]."""
    if not compute.deterministic:
        return embedding(tokens)
    return rows_of(embedding.embedding[...].astype(compute.dtype), tokens)


class DecoderBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention and MLP, without biases."""

    def __init__(self, size: Size, *, compute: Compute, rngs: nnx.Rngs):
        norm = dict(use_bias=False, dtype=compute.dtype, rngs=rngs)
        kwargs = dict(bias=False, compute=compute, rngs=rngs)
        self.norm1 = nnx.LayerNorm(size.width, **norm)
        self.self_attention = Attention(size.width, size.heads, **kwargs)
        self.norm2 = nnx.LayerNorm(size.width, **norm)
        self.cross_attention = Attention(size.width, size.heads, **kwargs)
        self.norm3 = nnx.LayerNorm(size.width, **norm)
        self.mlp = Mlp(size.width, size.mlp, **kwargs)
        self.rate = compute.dropout

    def __call__(
        self, x: jax.Array, encoded: jax.Array, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """x [B * C, T, D], encoded [B, N, D], mask bool [B * C | 1, 1, T, T] -> [B * C, T, D].

        The C texts of an image ask it in one go, so its keys and values are made once.
        """
        k1, k2, k3 = split_optional(key, 3)
        x = constrain(x + dropout(self.self_attention(self.norm1(x), mask=mask), self.rate, k1))
        queries = self.norm2(x).reshape(len(encoded), -1, x.shape[-1])
        seen = self.cross_attention(queries, encoded).reshape(x.shape)
        x = constrain(x + dropout(seen, self.rate, k2))
        return constrain(x + dropout(self.mlp(self.norm3(x)), self.rate, k3))

    def step(
        self, x: jax.Array, position: jax.Array, cache: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One position, x [B, 1, D], with this layer's cache; returns the cache with it added."""
        y = self.norm1(x)
        keys, values = self.self_attention.keys_values(y)
        at = (0, position, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache["keys"], keys, at)
        values = jax.lax.dynamic_update_slice(cache["values"], values, at)
        seen = (jnp.arange(keys.shape[1]) <= position)[None, None, None]
        x = x + self.self_attention.attend(y, keys, values, seen)
        x = x + self.cross_attention.attend(
            self.norm2(x), cache["cross_keys"], cache["cross_values"]
        )
        return x + self.mlp(self.norm3(x)), cache | {"keys": keys, "values": values}


class Decoder(nnx.Module):
    """A caption decoder that cross-attends to all tokens of an encoder.

    The embedding has one row more than the vocabulary: the mask token of parallel prediction.
    The output layer starts at zero, keeps its bias and is not tied to the embedding.

    Args:
      size: width, depth, mlp, heads of the decoder.
      vocab_size: V, the number of tokens that can be predicted.
    """

    def __init__(self, size: Size, *, vocab_size: int, compute: Compute, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            vocab_size + 1,
            size.width,
            dtype=compute.dtype,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.blocks = stack_layers(
            lambda rngs: DecoderBlock(size, compute=compute, rngs=rngs), size.depth, rngs
        )
        self.norm = nnx.LayerNorm(size.width, use_bias=False, dtype=compute.dtype, rngs=rngs)
        self.logits = nnx.Linear(
            size.width,
            vocab_size,
            dtype=compute.dtype,
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )
        self.size, self.vocab_size, self.compute = size, vocab_size, compute

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts every position at once (teacher forcing).

        Args:
          tokens: int32 [B * C, T] inputs, already shifted or masked; the C texts of an image (in
            training one) lie side by side.
          positions: [T, D] position embeddings.
          encoded: [B, N, D] tokens of the encoder.
          mask: bool [B * C | 1, 1, T, T], True where a position may look.
          key: for dropout; None in evaluation.

        Returns:
          logits [B * C, T, V] float32.
        """
        x = embed(self.embedding, tokens, self.compute)
        x = constrain(x + positions.astype(x.dtype))
        keys, _ = layer_randomness(key, self.size.depth, self.compute)
        x, _ = scan_layers(
            self.blocks,
            lambda block, x, key: (block(x, encoded, mask, key), None),
            x,
            keys,
            depth=self.size.depth,
            compute=self.compute,
        )
        return self.logits(self.norm(x)).astype(jnp.float32)

    def init_cache(self, encoded: jax.Array, length: int) -> dict[str, jax.Array]:
        """Returns the key-value cache for `length` positions; leaves [layers, B, ...]."""
        batch, heads = encoded.shape[0], self.size.heads
        shape = (batch, length, heads, self.size.width // heads)

        def cache_of(block, x, _):
            cross_keys, cross_values = block.cross_attention.keys_values(encoded)
            empty = jnp.zeros(shape, cross_keys.dtype)
            return x, dict(
                keys=empty, values=empty, cross_keys=cross_keys, cross_values=cross_values
            )

        _, cache = scan_layers(
            self.blocks, cache_of, (), None, depth=self.size.depth, compute=self.compute
        )
        return cache

    def step(
        self,
        tokens: jax.Array,
        position: jax.Array,
        positions: jax.Array,
        cache: dict[str, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Predicts what follows `tokens` int32 [B] at `position`: logits [B, V], new cache."""
        x = self.embedding(tokens)[:, None]
        x = x + jax.lax.dynamic_slice_in_dim(positions, position, 1).astype(x.dtype)
        x, cache = scan_layers(
            self.blocks,
            lambda block, x, cache: block.step(x, position, cache),
            x,
            cache,
            depth=self.size.depth,
            compute=self.compute,
        )
        return self.logits(self.norm(x))[:, 0].astype(jnp.float32), cache


class TextTower(nnx.Module):
    """A bidirectional text encoder that reads out at the last of its `length` positions.

    Padding is not masked: a text of fixed length ends in padding, whose last position serves as the
    read-out token, as in the authors' code (big_vision `text_transformer.py`, pool "last") and in
    SigLIP, so that weights can travel.
    """

    def __init__(
        self,
        size: Size,
        *,
        vocab_size: int,
        length: int,
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
        self.blocks = encoder_blocks(size, compute=compute, rngs=rngs)
        self.norm = nnx.LayerNorm(size.width, dtype=compute.dtype, rngs=rngs)
        self.size, self.compute = size, compute

    def __call__(
        self, text: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """text int32 [B, T] -> [B, D]."""
        x = embed(self.embedding, text, self.compute)
        x = constrain(x + self.positions[...].astype(x.dtype))
        key = key if train else None
        x = run_encoder_blocks(self.blocks, x, key, depth=self.size.depth, compute=self.compute)
        return self.norm(x)[:, -1]
