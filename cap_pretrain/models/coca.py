"""The text transformer of CoCa: half of its layers see the text alone, half the image, too.

Yu et al. 2022 (2205.01917), section 3.2. All layers are causal. The first half has no
cross-attention, so its output for a token appended to the text, [CLS], embeds the text without an
image. The second half attends to the image and predicts the next token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models.caches import separated, written
from cap_pretrain.models.elementwise import LayerNorm
from cap_pretrain.models.layers import (
    Attention,
    Compute,
    constrain,
    layer_randomness,
    scan_layers,
    split_optional,
    stack_layers,
)
from cap_pretrain.models.mlp import XAVIER
from cap_pretrain.models.multimodal import MultimodalBlock
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.text import PAD, Cache, Decoder


class Pooler(nnx.Module):
    """Attentional pooling: one layer of attention from learned queries to tokens, and a norm.

    Args:
        size: shape of the result: its width and the number of heads.
        queries: Q, number of vectors of the result.
        context_width: E, width of the tokens.
        compute: precision and kernels.
    """

    def __init__(
        self, size: Size, *, queries: int, context_width: int, compute: Compute, rngs: nnx.Rngs
    ):
        self.probe = nnx.Param(XAVIER(rngs.params(), (queries, size.width)))
        self.attention = Attention(
            size.width,
            size.heads,
            context_width=context_width,
            bias=True,
            compute=compute,
            rngs=rngs,
        )
        self.norm = LayerNorm(size.width, dtype=compute.dtype, rngs=rngs)

    def _queries(self, tokens: jax.Array) -> jax.Array:
        probe = self.probe[...].astype(tokens.dtype)
        return jnp.broadcast_to(probe, (len(tokens), *probe.shape))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Pool tokens [B, N, E] to [B, Q, D]."""
        return self.norm(self.attention(self._queries(tokens), tokens))

    def weights(self, tokens: jax.Array) -> jax.Array:
        """Return the weights of the queries over tokens, float32 [B, Q, N], the mean of heads."""
        return jnp.mean(self.attention.weights(self._queries(tokens), tokens), axis=1)


class ContrastiveDecoder(Decoder):
    """A caption decoder whose first half embeds texts.

    It has `size.depth` layers without and as many layers with cross-attention.

    Args:
        size: shape of the decoder.
        queries: Number of vectors that the tokens of the image are pooled to. 0 leaves them as they
            are.
        vocab_size: V, number of tokens that can be predicted.
        encoder_width: E, width of the encoder tokens.
        compute: precision, kernels and dropout.
    """

    def __init__(
        self,
        size: Size,
        *,
        queries: int,
        vocab_size: int,
        encoder_width: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        width = size.width if queries else encoder_width
        super().__init__(
            size, vocab_size=vocab_size, encoder_width=width, compute=compute, rngs=rngs
        )
        self.unimodal = stack_layers(
            lambda rngs: MultimodalBlock(size, compute=compute, rngs=rngs), size.depth, rngs
        )
        init = nnx.initializers.normal(size.width**-0.5)
        self.class_token = nnx.Param(init(rngs.params(), (1, size.width)))
        self.text_norm = LayerNorm(size.width, use_bias=False, dtype=compute.dtype, rngs=rngs)
        pooling: dict[str, Any] = dict(
            queries=queries, context_width=encoder_width, compute=compute, rngs=rngs
        )
        self.pooling = nnx.data(Pooler(size, **pooling) if queries else None)

    def both(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the final hidden states [B, T, D], and the embeddings [B, D] of the texts.

        The arguments are those of `states`, for one text per image.
        """
        first, second = split_optional(key, 2)
        x = self._unimodal(tokens, positions, mask, first, embeds=True)
        states = self._decode(x[:, :-1], self._pooled(encoded), mask, second)
        return states, self.text_norm(x[:, -1])

    def states(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the final hidden states [B * C, T, D] of texts; see `Decoder.states`."""
        first, second = split_optional(key, 2)
        x = self._unimodal(tokens, positions, mask, first)
        return self._decode(x, self._pooled(encoded), mask, second)

    def embed(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the embeddings [B, D] of texts, without an image; arguments as for `states`."""
        first, _ = split_optional(key, 2)
        return self.text_norm(self._unimodal(tokens, positions, mask, first, embeds=True)[:, -1])

    def _unimodal(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        key: jax.Array | None,
        embeds: bool = False,
    ) -> jax.Array:
        """Return the hidden states [B, T, D] of the first layers; `embeds` appends that of [CLS].

        [CLS] attends to itself, the start token and all tokens that are not padding.
        """
        x = self._read(tokens, positions)
        if embeds:
            batch, length, width = x.shape
            own = jnp.broadcast_to(self.class_token[...], (batch, 1, width)).astype(x.dtype)
            x = constrain(jnp.concatenate([x, own], axis=1))
            seen = (tokens != PAD) | (jnp.arange(length) == 0)
            seen = jnp.pad(seen, ((0, 0), (0, 1)), constant_values=True)[:, None, None]
            mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
            mask = jnp.concatenate([jnp.pad(mask, [(0, 0)] * 3 + [(0, 1)]), seen], axis=2)
        keys, _ = layer_randomness(key, self.size.depth, self.compute)
        return scan_layers(
            self.unimodal,
            lambda block, x, key: (block(x, mask, key)[0], None),
            x,
            keys,
            depth=self.size.depth,
            compute=self.compute,
        )[0]

    def _pooled(self, encoded: jax.Array) -> jax.Array:
        return encoded if self.pooling is None else self.pooling(encoded)

    def attention(
        self, tokens: jax.Array, positions: jax.Array, encoded: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Return the cross-attention weights of every layer; see `Decoder.attention`.

        With pooling they are weights over its queries, times the weights of these over the tokens.
        """
        context = self._pooled(encoded)

        def look(block, x, _):
            return block(x, context, mask, None), block.attention(x, context, mask)

        x = self._unimodal(tokens, positions, mask, None)
        depth, compute = self.size.depth, self.compute
        found = scan_layers(self.blocks, look, x, None, depth=depth, compute=compute)[1]
        if self.pooling is None:
            return found
        return jnp.einsum("lbhtq,bqn->lbhtn", found, self.pooling.weights(encoded))

    def init_cache(self, encoded: jax.Array, length: int, beams: int = 1) -> Cache:
        """Return the decoding cache; see `Decoder.init_cache`.

        The shared part begins with the keys and values of the tokens in the first layers.
        """
        writers, (own, cross) = super().init_cache(self._pooled(encoded), length, beams)
        return writers, (list(own), own, cross)

    def step(
        self, tokens: jax.Array, position: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Read tokens int32 [B * C] at `position`; return the next logits [B * C, V], cache."""
        writers, (first, own, cross) = cache
        batch = len(cross[0][0])
        beams = len(tokens) // batch
        writers, mask = written(writers, position, batch)
        x = self._read_one(tokens, position, positions, batch)
        alone: list[Any] = []
        for early, mine in zip(separated(self.unimodal, self.size.depth), first, strict=True):
            x, mine = early.step(x, mask, position * beams, mine)
            alone.append(mine)
        after: list[Any] = []
        for block, mine, image in zip(self.layers(), own, cross, strict=True):
            x, mine = block.step(x, mask, position * beams, mine, image)
            after.append(mine)
        logits = self.to_logits(self.norm(x))
        return logits.reshape(batch * beams, -1), (writers, (alone, after, cross))

    def separate(self) -> None:
        """Give each layer its own arrays, for decoding."""
        super().separate()
        self.unimodal = nnx.List(separated(self.unimodal, self.size.depth))
