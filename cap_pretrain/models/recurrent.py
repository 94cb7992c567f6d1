"""Recurrent caption decoders: LSTM, GRU, LSTM with soft attention, and the merge model.

Each decoder reads a text word by word, conditioned on the image, and predicts the next word after
each. The input contributions to the gates are one matrix product for all positions, and so are the
logits. Only the recurrence itself runs position by position, in a `lax.scan`. Decoding calls the
same function with one position at a time, so it cannot differ from training.

Parameters are float32 and products are computed in `Compute.dtype`. States, gates and attention
weights are float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models.cells import GRU, LSTM, State, over_time
from cap_pretrain.models.layers import Compute, constrain, dropout, split_optional
from cap_pretrain.models.text import embed

Shared = Any  # leaves [B, ...], one row per image
Cache = tuple[State, Shared]


@dataclasses.dataclass(frozen=True)
class Options:
    """Kind and size of the decoder.

    Attributes:
        decoder: "lstm" reads the image before the first word (Vinyals et al. 2015, 1411.4555).
            "gru" uses the image as its initial state. "attention" attends to parts of the image
            at every word (Xu et al. 2015, 1502.03044, soft attention). "merge" adds the image to
            the output of an LSTM that reads the text alone (Tanti et al. 2017, 1708.02043).
        embed: Width of the word embedding.
        hidden: Width of the state.
        layers: Number of stacked LSTM layers.
        attention: Width of the layer that compares the state with a part of the image.
        gate: Whether the state gates each feature of the attended context with a sigmoid.
        grid: Number of rows and columns to which the encoder's square grid of tokens is pooled
            for attention (adaptive mean, also to larger grids). 0 disables pooling.
        reset: Whether the reset gate of a GRU applies "after" the matrix product of the state, as
            in cuDNN and most code since, or "before" it, as first published (Cho et al. 2014,
            1406.1078).
        dropout: Rate before the output layer; for "merge", on the image and the words instead.
    """

    decoder: str = "lstm"
    embed: int = 512
    hidden: int = 512
    layers: int = 1
    attention: int = 512
    gate: bool = True
    grid: int = 0
    reset: str = "after"
    dropout: float = 0.0

    def __post_init__(self):
        if self.decoder not in DECODERS:
            raise UserError(
                f"learner.decoder: {self.decoder!r} is unknown."
                f"{did_you_mean(self.decoder, DECODERS)}"
            )
        for field in ("embed", "hidden", "layers", "attention"):
            if getattr(self, field) < 1:
                raise UserError(f"learner.{field}: {getattr(self, field)} must be at least 1.")
        if self.layers > 1 and self.decoder != "lstm":
            raise UserError(
                f"learner.layers: decoder={self.decoder!r} has one layer, not {self.layers}."
            )
        if self.grid < 0 or (self.grid and self.decoder != "attention"):
            raise UserError(
                f"learner.grid: {self.grid} is invalid for decoder={self.decoder!r}; it must not "
                "be negative, and 0 without decoder=attention."
            )
        if self.reset not in ("after", "before"):
            raise UserError(f"learner.reset: {self.reset!r} is neither 'after' nor 'before'.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"learner.dropout: {self.dropout} is not in [0, 1).")


class Decoder(nnx.Module):
    """Base class of recurrent decoders. Subclasses add layers and implement `begin` and `run`.

    Subclasses also take `width`, the width D of the encoder's output.

    Args:
        options: see `Options`.
        vocab_size: V, number of tokens.
        compute: precision and rematerialization.

    Attributes:
        reads: Encoder output that the decoder reads, "pooled" [B, D] or "tokens" [B, N, D].
        attends: Whether the decoder attends to parts of the image.
    """

    reads = "pooled"
    attends = False

    def __init__(self, options: Options, *, vocab_size: int, compute: Compute, rngs: nnx.Rngs):
        kwargs = dict(dtype=compute.dtype, rngs=rngs)
        self.embedding = nnx.Embed(vocab_size, options.embed, **kwargs)
        self.logits = nnx.Linear(options.hidden, vocab_size, **kwargs)
        self.options, self.compute = options, compute

    def begin(self, encoded: jax.Array, texts: int = 1, key: jax.Array | None = None) -> Cache:
        """Return the decoding cache before the first word.

        Args:
            encoded: Encoder output of B images; see `reads`.
            texts: C, number of texts per image.
            key: Random key for dropout.

        Returns:
            The states of B * C texts, where the texts of an image are adjacent rows, and the
            image features that these texts share.
        """
        raise NotImplementedError

    def run(
        self, x: jax.Array, cache: Cache, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, State]:
        """Read embedded words.

        Args:
            x: [R, T, E].
            cache: The state before the first word, and the shared image features.
            key: Random key for dropout.

        Returns:
            Hidden states [R, T, H]; attention weights [R, T, N] over N parts of the image, or
            None; and the last recurrent state.
        """
        raise NotImplementedError

    def read(
        self, tokens: jax.Array, cache: Cache, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None, Cache]:
        """Read tokens int32 [R, T]; return hidden states [R, T, H], attention weights, cache."""
        x = constrain(embed(self.embedding, tokens, self.compute))
        states, weights, last = self.run(x, cache, key)
        return states, weights, (last, cache[1])

    def to_logits(self, states: jax.Array) -> jax.Array:
        """Return the logits float32 [..., V] of the next token for hidden states [..., H]."""
        return self.logits(states.astype(self.compute.dtype)).astype(jnp.float32)

    def __call__(
        self, encoded: jax.Array, tokens: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Predict the next token at every position of whole texts (teacher forcing).

        The arguments are those of `states`.

        Returns:
            Logits float32 [B * C, T, V], and attention weights float32 [B * C, T, N] or None.
        """
        states, weights = self.states(encoded, tokens, key=key)
        return self.to_logits(states), weights

    def states(
        self, encoded: jax.Array, tokens: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the hidden states of whole texts, for `to_logits`.

        Args:
            encoded: Encoder output of B images; see `reads`.
            tokens: Input tokens int32 [B * C, T]. The C texts of an image are adjacent rows.
            key: Random key for dropout. None disables dropout.

        Returns:
            Hidden states [B * C, T, H], and attention weights float32 [B * C, T, N] or None.
        """
        begin_key, run_key = split_optional(key, 2)
        cache = self.begin(encoded, len(tokens) // len(encoded), begin_key)
        return self.read(tokens, cache, run_key)[:2]

    def step(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Read tokens int32 [R]; return the next logits float32 [R, V] and the new cache."""
        states, _, cache = self.read(tokens[:, None], cache)
        return self.to_logits(states[:, 0]), cache


class LSTMDecoder(Decoder):
    """An LSTM that reads the image before the first word, and predicts nothing after the image."""

    def __init__(
        self, options: Options, *, vocab_size: int, width: int, compute: Compute, rngs: nnx.Rngs
    ):
        super().__init__(options, vocab_size=vocab_size, compute=compute, rngs=rngs)
        linear = dict(dtype=compute.dtype, rngs=rngs)
        o = options
        self.image = nnx.Linear(width, o.embed, **linear)
        self.layers = nnx.Dict(
            {
                str(n): LSTM(o.hidden if n else o.embed, o.hidden, compute=compute, rngs=rngs)
                for n in range(o.layers)
            }
        )

    def begin(
        self,
        encoded: jax.Array,
        texts: int = 1,
        key: jax.Array | None = None,  # noqa: ARG002  # there is no dropout on the image
    ) -> Cache:
        """Read the image as the first input; return the states after it."""
        zeros = tuple(layer.zero(len(encoded)) for layer in self._layers)
        _, state = self._through_layers(self.image(encoded)[:, None], zeros)
        return _repeated(state, texts), ()

    def run(
        self, x: jax.Array, cache: Cache, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, State]:
        """Read embedded words; see `Decoder.run`."""
        outputs, state = self._through_layers(x, cache[0])
        return dropout(outputs, self.options.dropout, key), None, state

    @property
    def _layers(self) -> list[LSTM]:
        return [self.layers[str(n)] for n in range(self.options.layers)]

    def _through_layers(self, x: jax.Array, states: State) -> tuple[jax.Array, State]:
        after = []
        for layer, state in zip(self._layers, states, strict=True):
            x, state = layer(x, state)
            after.append(state)
        return x, tuple(after)


class GRUDecoder(Decoder):
    """A GRU whose initial state is a linear function of the image."""

    def __init__(
        self, options: Options, *, vocab_size: int, width: int, compute: Compute, rngs: nnx.Rngs
    ):
        super().__init__(options, vocab_size=vocab_size, compute=compute, rngs=rngs)
        linear = dict(dtype=compute.dtype, rngs=rngs)
        o = options
        self.image = nnx.Linear(width, o.hidden, **linear)
        self.gru = GRU(o.embed, o.hidden, reset=o.reset, compute=compute, rngs=rngs)

    def begin(
        self,
        encoded: jax.Array,
        texts: int = 1,
        key: jax.Array | None = None,  # noqa: ARG002  # there is no dropout on the image
    ) -> Cache:
        """Return a linear function of the image as the initial state."""
        return _repeated(self.image(encoded).astype(jnp.float32), texts), ()

    def run(
        self, x: jax.Array, cache: Cache, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, State]:
        """Read embedded words; see `Decoder.run`."""
        outputs, state = self.gru(x, cache[0])
        return dropout(outputs, self.options.dropout, key), None, state


class AttentionDecoder(Decoder):
    """An LSTM that reads, with each word, an attention-weighted mean of the parts of the image.

    The weights are the softmax of a ReLU layer on state and part (the paper's `f_att`, as in widely
    used public code). The state gates the mean, with one gate per feature (section 4.2.1). The
    initial state is a linear function of the mean part.
    """

    reads = "tokens"
    attends = True

    def __init__(
        self, options: Options, *, vocab_size: int, width: int, compute: Compute, rngs: nnx.Rngs
    ):
        super().__init__(options, vocab_size=vocab_size, compute=compute, rngs=rngs)
        linear = dict(dtype=compute.dtype, rngs=rngs)
        o = options
        self.image = nnx.Linear(width, 2 * o.hidden, **linear)
        self.key = nnx.Linear(width, o.attention, **linear)
        self.query = nnx.Linear(o.hidden, o.attention, **linear)
        # A bias would shift the scores of all parts alike, and the softmax would cancel it.
        self.score = nnx.Linear(o.attention, 1, use_bias=False, **linear)
        if o.gate:
            self.gate = nnx.Linear(o.hidden, width, **linear)
        self.lstm = LSTM(o.embed, o.hidden, compute=compute, rngs=rngs)
        self.context = nnx.Linear(width, 4 * o.hidden, use_bias=False, **linear)

    def begin(
        self,
        encoded: jax.Array,
        texts: int = 1,
        key: jax.Array | None = None,  # noqa: ARG002  # there is no dropout on the image
    ) -> Cache:
        """Return the initial state, and the image parts with their attention keys."""
        if self.options.grid:
            encoded = pool_grid(encoded, self.options.grid)
        encoded = encoded.astype(self.compute.dtype)
        first = self.image(jnp.mean(encoded, axis=1)).astype(jnp.float32)
        state = tuple(jnp.split(first, 2, axis=-1))
        return _repeated(state, texts), (encoded, self.key(encoded))

    def run(
        self, x: jax.Array, cache: Cache, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, State]:
        """Read embedded words; see `Decoder.run`."""
        state, shared = cache

        def advance(state, gates):
            seen, weights = self.look(state[0], shared)
            state = self.lstm.advance(state, gates + self.context(seen))
            return state, (state[0], weights)

        gates = self.lstm.input(x)
        (outputs, weights), state = over_time(advance, state, gates, self.compute)
        return dropout(outputs, self.options.dropout, key), weights, state

    def look(self, h: jax.Array, shared: Shared) -> tuple[jax.Array, jax.Array]:
        """Attend with states h [B * C, H]: contexts [B * C, D], weights float32 [B * C, N]."""
        parts, keys = shared
        query = self.query(h).reshape(len(parts), -1, 1, keys.shape[-1])
        scores = jnp.matmul(
            jax.nn.relu(keys[:, None] + query),
            self.score.kernel[...].astype(keys.dtype),
            preferred_element_type=jnp.float32,
        )
        weights = jax.nn.softmax(scores[..., 0], axis=-1)  # [B, C, N]
        seen = jnp.einsum("bcn,bnd->bcd", weights.astype(parts.dtype), parts)
        seen = seen.reshape(len(h), -1)
        if self.options.gate:
            seen = seen * jax.nn.sigmoid(self.gate(h))
        return seen, weights.reshape(len(h), -1)


class MergeDecoder(Decoder):
    """An LSTM that reads only the text; the image is added to its output at every word.

    The sum passes one more ReLU layer of the same width before the logits.
    """

    def __init__(
        self, options: Options, *, vocab_size: int, width: int, compute: Compute, rngs: nnx.Rngs
    ):
        super().__init__(options, vocab_size=vocab_size, compute=compute, rngs=rngs)
        linear = dict(dtype=compute.dtype, rngs=rngs)
        o = options
        self.image = nnx.Linear(width, o.hidden, **linear)
        self.lstm = LSTM(o.embed, o.hidden, compute=compute, rngs=rngs)
        self.merged = nnx.Linear(o.hidden, o.hidden, **linear)

    def begin(self, encoded: jax.Array, texts: int = 1, key: jax.Array | None = None) -> Cache:
        """Return a zero state, and the image features that `run` adds."""
        image = jax.nn.relu(self.image(dropout(encoded, self.options.dropout, key)))
        return self.lstm.zero(len(encoded) * texts), image

    def run(
        self, x: jax.Array, cache: Cache, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, State]:
        """Read embedded words; see `Decoder.run`."""
        state, image = cache
        outputs, state = self.lstm(dropout(x, self.options.dropout, key), state)
        together = outputs.reshape(len(image), -1, *outputs.shape[1:]) + image[:, None, None]
        return jax.nn.relu(self.merged(together.reshape(outputs.shape))), None, state


DECODERS: dict[str, Callable[..., Decoder]] = {
    "lstm": LSTMDecoder,
    "gru": GRUDecoder,
    "attention": AttentionDecoder,
    "merge": MergeDecoder,
}


def pool_grid(tokens: jax.Array, side: int) -> jax.Array:
    """Pool a square grid of tokens [B, n * n, D], in row-major order, to [B, side * side, D].

    Row i of the result is the mean of rows floor(i n / side) to ceil((i + 1) n / side), so a larger
    grid repeats rows (torch's `AdaptiveAvgPool2d`).

    Raises:
        UserError: The tokens do not form a square grid.
    """
    n = round(tokens.shape[1] ** 0.5)
    if n * n != tokens.shape[1]:
        raise UserError(
            f"learner.grid: the encoder's {tokens.shape[1]} tokens do not form a square grid; set "
            "learner.grid=0, which attends to them without pooling."
        )
    rows = np.arange(side)[:, None]
    inside = (np.arange(n) >= rows * n // side) & (np.arange(n) < -(-(rows + 1) * n // side))
    mean = jnp.asarray(inside / inside.sum(1, keepdims=True), tokens.dtype)
    grid = tokens.reshape(len(tokens), n, n, -1)
    return jnp.einsum("pi,qj,bijd->bpqd", mean, mean, grid).reshape(len(tokens), side**2, -1)


def _repeated(state: State, times: int) -> State:
    """Repeat each row of leaves [B, ...] in adjacent rows: [B * times, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), state)
