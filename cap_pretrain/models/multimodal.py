"""The multimodal decoder of AIMv2: a causal transformer over an image and then a text.

Fini et al. 2024 (2411.14402), section 2. All positions attend to themselves and to the past, so the
image's hidden states do not depend on the text. They are computed first, and a text attends to
their keys and values, which equals one pass over the joined sequence. Several texts of an image
share them, and so do the steps of decoding.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models import cpu
from cap_pretrain.models.attention import causal
from cap_pretrain.models.caches import attend_cached, for_queries, written
from cap_pretrain.models.elementwise import LayerNorm
from cap_pretrain.models.layers import (
    Attention,
    Compute,
    constrain,
    dropout,
    layer_randomness,
    scan_layers,
    split_optional,
)
from cap_pretrain.models.mlp import XAVIER, Mlp
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.text import Cache, Decoder

KeysValues = tuple[jax.Array, jax.Array]


class MultimodalBlock(nnx.Module):
    """Pre-norm self-attention and MLP, without biases.

    Args:
        size: shape of the transformer.
        compute: precision, kernels and dropout.
    """

    def __init__(self, size: Size, *, compute: Compute, rngs: nnx.Rngs):
        norm = dict(use_bias=False, dtype=compute.dtype, rngs=rngs)
        kwargs: dict[str, Any] = dict(bias=False, compute=compute, rngs=rngs)
        self.norm1 = LayerNorm(size.width, **norm)
        self.attention = Attention(size.width, size.heads, **kwargs)
        self.norm2 = LayerNorm(size.width, **norm)
        self.mlp = Mlp(size.width, size.mlp, **kwargs)
        self.rate = compute.dropout

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        key: jax.Array | None,
        image: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Map hidden states to hidden states, and return their keys and values, too.

        Args:
            x: [B * C, T, D]; the C texts of an image are adjacent rows.
            mask: bool [B * C | 1, 1, T, S], True where a position attends. S counts the positions
                of the image, if it is given, and then T.
            key: Random key for dropout. None in evaluation.
            image: Keys and values [B, N, heads, D / heads] of the image before the text.

        Returns:
            [B * C, T, D], and the keys and values [B * C, T, heads, D / heads] of x.
        """
        k1, k2 = split_optional(key, 2)
        y = self.norm1(x)
        own = self.attention.keys_values(y)
        keys, values = (
            own if image is None else (_after(*pair) for pair in zip(image, own, strict=True))
        )
        y = self.attention.attend(y, keys, values, mask)
        x = constrain(x + dropout(y, self.rate, k1))
        return constrain(x + dropout(self.mlp(self.norm2(x)), self.rate, k2)), own

    def step(
        self, x: jax.Array, mask: jax.Array, start: jax.Array, cache: KeysValues
    ) -> tuple[jax.Array, KeysValues]:
        """Process one position of the C captions of each image.

        Args:
            x: [B, C, D].
            mask: bool [B, 1, C, S], which of the S keys each caption attends to.
            start: Index in S for the keys of this position.
            cache: Keys and values of this layer, of `for_queries`.

        Returns:
            [B, C, D], and the cache with the keys and values of this position.
        """
        y = self.norm1(x)
        keys, values = for_queries(*self.attention.keys_values(y))
        cache = (
            jax.lax.dynamic_update_slice_in_dim(cache[0], keys, start, axis=-1),
            jax.lax.dynamic_update_slice_in_dim(cache[1], values, start, axis=-2),
        )
        x = x + attend_cached(self.attention, y, *cache, mask)
        return x + self.mlp(self.norm2(x)), cache


def _after(image: jax.Array, text: jax.Array) -> jax.Array:
    """Join [B, N, ...] of images and [B * C, T, ...] of their texts: [B * C, N + T, ...]."""
    texts = len(text) // len(image)
    image = image if texts == 1 else jnp.repeat(image, texts, axis=0)
    return jnp.concatenate([image, text], axis=1)


class MultimodalDecoder(Decoder):
    """Reads the tokens of an image and then a text; predicts the next patch and the next token.

    Args:
        size: shape of the decoder.
        vocab_size: V, number of tokens that can be predicted.
        encoder_width: E, width of the encoder tokens.
        patch_values: Number of values of a patch, patch * patch * 3.
        compute: precision, kernels and dropout.
    """

    def __init__(
        self,
        size: Size,
        *,
        vocab_size: int,
        encoder_width: int,
        patch_values: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        super().__init__(size, vocab_size=vocab_size, compute=compute, rngs=rngs)
        kwargs: dict[str, Any] = dict(dtype=compute.dtype, kernel_init=XAVIER, rngs=rngs)
        self.connector = cpu.Linear(encoder_width, size.width, **kwargs)
        self.pixels = cpu.Linear(size.width, patch_values, **kwargs)

    @staticmethod
    def _block(
        size: Size,
        encoder_width: int | None,  # noqa: ARG004  # the connector has it
        compute: Compute,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        return MultimodalBlock(size, compute=compute, rngs=rngs)

    def both(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the final hidden states of images [B, N, D] and texts [B * C, T, D].

        The arguments are those of `states`.
        """
        image_key, text_key = split_optional(key, 2)
        image, past = self._read_image(encoded, image_key)
        keys, _ = layer_randomness(text_key, self.size.depth, self.compute)
        mask = _with_image(mask, encoded.shape[1])
        text, _ = scan_layers(
            self.blocks,
            lambda block, x, inputs: (block(x, mask, *inputs)[0], None),
            self._read(tokens, positions),
            (keys, past),
            depth=self.size.depth,
            compute=self.compute,
        )
        return self.norm(image), self.norm(text)

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
        return self.both(tokens, positions, encoded, mask, key=key)[1]

    def to_pixels(self, states: jax.Array) -> jax.Array:
        """Predict patches float32 [..., patch_values] from hidden states [..., D] of an image."""
        return self.pixels(states).astype(jnp.float32)

    def _read_image(
        self, encoded: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """Return the output [B, N, D] of the last layer, and keys and values of all layers.

        The latter have a leading layer axis: [depth, B, N, heads, D / heads].
        """
        mask = causal(encoded.shape[1])
        keys, _ = layer_randomness(key, self.size.depth, self.compute)
        return scan_layers(
            self.blocks,
            lambda block, x, key: block(x, mask, key),
            constrain(self.connector(encoded)),
            keys,
            depth=self.size.depth,
            compute=self.compute,
        )

    def attention(
        self, tokens: jax.Array, positions: jax.Array, encoded: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Return the attention weights of texts over the tokens of their image, in every layer.

        They are normalized over the image. The arguments are those of `states`, for one text per
        image.

        Returns:
            float32 [depth, B, heads, T, N]; each row [N] sums to 1.
        """
        mask = _with_image(mask, encoded.shape[1])

        def look(block, x, image):
            weights = block.attention.weights_over(block.norm1(x), image[0])
            return block(x, mask, None, image)[0], weights

        _, past = self._read_image(encoded)
        x = self._read(tokens, positions)
        depth, compute = self.size.depth, self.compute
        return scan_layers(self.blocks, look, x, past, depth=depth, compute=compute)[1]

    def init_cache(self, encoded: jax.Array, length: int, beams: int = 1) -> Cache:
        """Return the decoding cache; see `Decoder.init_cache`.

        The shared part is one pair of keys and values for each layer: first those of the N tokens
        of the image, then of the T * C tokens.
        """
        more = length * beams
        _, (keys, values) = self._read_image(encoded)
        own = [
            (
                jnp.pad(layer[0], [(0, 0)] * 3 + [(0, more)]),
                jnp.pad(layer[1], [(0, 0)] * 2 + [(0, more), (0, 0)]),
            )
            for layer in map(for_queries, keys, values)
        ]
        return jnp.full((len(encoded) * beams, length), -1, jnp.int32), own

    def step(
        self, tokens: jax.Array, position: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Read tokens int32 [B * C] at `position`; return the next logits [B * C, V], cache."""
        writers, own = cache
        batch = len(own[0][0])
        beams = len(tokens) // batch
        writers, mask = written(writers, position, batch)
        image = own[0][0].shape[-1] - mask.shape[-1]
        mask = jnp.concatenate([jnp.ones((*mask.shape[:-1], image), bool), mask], axis=-1)
        x, after = self._read_one(tokens, position, positions, batch), []
        for block, mine in zip(self.layers(), own, strict=True):
            x, mine = cast(Any, block).step(x, mask, image + position * beams, mine)
            after.append(mine)
        logits = self.to_logits(self.norm(x))
        return logits.reshape(batch * beams, -1), (writers, after)


def _with_image(mask: jax.Array, tokens: int) -> jax.Array:
    """Let all positions of a mask bool [B | 1, 1, T, T] attend to `tokens` of an image, too."""
    return jnp.concatenate([jnp.ones((*mask.shape[:-1], tokens), bool), mask], axis=-1)
