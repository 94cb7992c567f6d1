"""Recurrent caption decoders: LSTM, GRU, LSTM with soft attention, and the merge model.

Each reads a text word by word, knowing the image, and predicts after every word the next. What
words contribute to the gates is one matrix product for all positions, and so are the logits; only
the recurrence itself goes position by position, in a `lax.scan`. Decoding is the same function with
one position at a time, so it cannot differ from training.

Parameters are float32, products are computed in `Compute.dtype`; states, gates and attention
weights are float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models.cells import GRU, LSTM, State, over_time
from cap_pretrain.models.layers import Compute, constrain, dropout, split_optional
from cap_pretrain.models.text import embed

Shared = Any  # leaves [B, ...], a row an image
Cache = tuple[State, Shared]


@dataclasses.dataclass(frozen=True)
class Options:
    """What decoder, and how large.

    Attributes:
      decoder: "lstm" reads the image before the first word (Vinyals et al. 2015, 1411.4555); "gru"
        begins with it as its state; "attention" looks at parts of it at every word (Xu et al. 2015,
        1502.03044, soft attention); "merge" adds it to what an LSTM has read of the text alone
        (Tanti et al. 2017, 1708.02043).
      embed: width of the word embedding.
      hidden: width of the state.
      layers: of an LSTM, one above the other.
      attention: width of the layer that compares the state with a part of the image.
      gate: whether attention weighs each feature of what it sees by the state, by a sigmoid.
      grid: attention sees the encoder's tokens, a square grid, pooled to one of so many rows and
        columns (adaptive mean, also to larger ones); 0 leaves them.
      reset: whether the reset gate of a GRU applies "after" the product of the state, as everybody
        has it since cuDNN, or "before" it, as first published (Cho et al. 2014, 1406.1078).
      dropout: rate before the output layer; of "merge" on the image and on the words instead.
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
                f"learner.layers: a decoder {self.decoder!r} has one layer, not {self.layers}."
            )
        if self.grid < 0 or (self.grid and self.decoder != "attention"):
            raise UserError(
                f"learner.grid: {self.grid} is not for a decoder {self.decoder!r}; only attention "
                "sees a grid, of at least one row."
            )
        if self.reset not in ("after", "before"):
            raise UserError(f"learner.reset: {self.reset!r} is neither 'after' nor 'before'.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"learner.dropout: {self.dropout} is not in [0, 1).")


class Decoder(nnx.Module):
    """What recurrent decoders have in common; a kind of its own says `begin` and `run`.

    Args:
      options: see `Options`.
      vocab_size: V, the number of tokens.
      width: D, of what the encoder gives.

    Attributes:
      reads: what it wants of the encoder: "pooled" [B, D] or "tokens" [B, N, D].
      attends: whether it looks at parts of the image.
    """

    reads = "pooled"
    attends = False

    def __init__(
        self, options: Options, *, vocab_size: int, width: int, compute: Compute, rngs: nnx.Rngs
    ):
        kwargs = dict(dtype=compute.dtype, rngs=rngs)
        self.embedding = nnx.Embed(vocab_size, options.embed, **kwargs)
        self.logits = nnx.Linear(options.hidden, vocab_size, **kwargs)
        self.options, self.compute = options, compute
        self.build(width, dict(compute=compute, rngs=rngs), kwargs)

    def build(self, width: int, cell: dict[str, Any], linear: dict[str, Any]) -> None:
        """Makes the layers between embedding and logits, of these common arguments."""
        raise NotImplementedError

    def begin(self, encoded: jax.Array, texts: int = 1, key: jax.Array | None = None) -> Cache:
        """What is known of the images before the first word.

        Args:
          encoded: what `reads` says, of B images.
          texts: C, texts of each image.
          key: for dropout.

        Returns:
          The states of B * C texts, those of an image side by side, and what they share.
        """
        raise NotImplementedError

    def run(
        self, x: jax.Array, cache: Cache, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, State]:
        """Reads embedded words x [R, T, E].

        Returns:
          What the logits are made of, [R, T, H]; how much each word saw of each of N parts of the
          image, [R, T, N], or None; and the last state.
        """
        raise NotImplementedError

    def read(
        self, tokens: jax.Array, cache: Cache, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None, Cache]:
        """States [R, T, H] after each of tokens int32 [R, T]; attention weights; cache."""
        x = constrain(embed(self.embedding, tokens, self.compute))
        states, weights, last = self.run(x, cache, key)
        return states, weights, (last, cache[1])

    def to_logits(self, states: jax.Array) -> jax.Array:
        """States [..., H] -> logits float32 [..., V] of what comes next."""
        return self.logits(states.astype(self.compute.dtype)).astype(jnp.float32)

    def __call__(
        self, encoded: jax.Array, tokens: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Predicts what follows every token of whole texts (teacher forcing).

        Args:
          encoded, tokens, key: as for `states`.

        Returns:
          Logits float32 [B * C, T, V], and attention weights float32 [B * C, T, N] or None.
        """
        states, weights = self.states(encoded, tokens, key=key)
        return self.to_logits(states), weights

    def states(
        self, encoded: jax.Array, tokens: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What `to_logits` makes the logits of whole texts of.

        Args:
          encoded: what `reads` says, of B images.
          tokens: int32 [B * C, T], what is read, C texts of each image side by side.
          key: for dropout; None in evaluation.

        Returns:
          States [B * C, T, H], and attention weights float32 [B * C, T, N] or None.
        """
        begin_key, run_key = split_optional(key, 2)
        cache = self.begin(encoded, len(tokens) // len(encoded), begin_key)
        return self.read(tokens, cache, run_key)[:2]

    def step(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits float32 [R, V] of what follows tokens int32 [R], for `decoding`; the new cache."""
        states, _, cache = self.read(tokens[:, None], cache)
        return self.to_logits(states[:, 0]), cache


class LSTMDecoder(Decoder):
    """The image is what an LSTM reads first; what it would say to that is not asked."""

    def build(self, width, cell, linear):
        o = self.options
        self.image = nnx.Linear(width, o.embed, **linear)
        self.layers = nnx.Dict(
            {str(n): LSTM(o.hidden if n else o.embed, o.hidden, **cell) for n in range(o.layers)}
        )

    def begin(self, encoded, texts=1, key=None):
        zeros = tuple(layer.zero(len(encoded)) for layer in self._layers)
        _, state = self._through_layers(self.image(encoded)[:, None], zeros)
        return _repeated(state, texts), ()

    def run(self, x, cache, key):
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
    """A linear function of the image is the state that a GRU begins with."""

    def build(self, width, cell, linear):
        o = self.options
        self.image = nnx.Linear(width, o.hidden, **linear)
        self.gru = GRU(o.embed, o.hidden, reset=o.reset, **cell)

    def begin(self, encoded, texts=1, key=None):
        return _repeated(self.image(encoded).astype(jnp.float32), texts), ()

    def run(self, x, cache, key):
        outputs, state = self.gru(x, cache[0])
        return dropout(outputs, self.options.dropout, key), None, state


class AttentionDecoder(Decoder):
    """An LSTM that, before each word, sees a weighted mean of the image's parts.

    Weights are the softmax of what a layer of rectified units makes of state and part (the paper's
    `f_att`, as widely used public code has it); the mean is gated by the state (section 4.2.1, a
    gate for each feature) and read with the word. It begins with linear functions of the mean part.
    """

    reads = "tokens"
    attends = True

    def build(self, width, cell, linear):
        o = self.options
        self.image = nnx.Linear(width, 2 * o.hidden, **linear)
        self.key = nnx.Linear(width, o.attention, **linear)
        self.query = nnx.Linear(o.hidden, o.attention, **linear)
        # A bias would be the same for all parts.
        self.score = nnx.Linear(o.attention, 1, use_bias=False, **linear)
        if o.gate:
            self.gate = nnx.Linear(o.hidden, width, **linear)
        self.lstm = LSTM(o.embed, o.hidden, **cell)
        self.context = nnx.Linear(width, 4 * o.hidden, use_bias=False, **linear)

    def begin(self, encoded, texts=1, key=None):
        if self.options.grid:
            encoded = pool_grid(encoded, self.options.grid)
        encoded = encoded.astype(self.compute.dtype)
        first = self.image(jnp.mean(encoded, axis=1)).astype(jnp.float32)
        state = tuple(jnp.split(first, 2, axis=-1))
        return _repeated(state, texts), (encoded, self.key(encoded))

    def run(self, x, cache, key):
        state, shared = cache

        def advance(state, gates):
            seen, weights = self.look(state[0], shared)
            state = self.lstm.advance(state, gates + self.context(seen))
            return state, (state[0], weights)

        gates = self.lstm.input(x)
        (outputs, weights), state = over_time(advance, state, gates, self.compute)
        return dropout(outputs, self.options.dropout, key), weights, state

    def look(self, h: jax.Array, shared: Shared) -> tuple[jax.Array, jax.Array]:
        """What states h [B * C, H] see, [B * C, D], and their weights float32 [B * C, N]."""
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
    """An LSTM reads the text and never the image, which is added to its output at every word.

    Both pass one more layer of rectified units, of the same width, before the logits.
    """

    def build(self, width, cell, linear):
        o = self.options
        self.image = nnx.Linear(width, o.hidden, **linear)
        self.lstm = LSTM(o.embed, o.hidden, **cell)
        self.merged = nnx.Linear(o.hidden, o.hidden, **linear)

    def begin(self, encoded, texts=1, key=None):
        image = jax.nn.relu(self.image(dropout(encoded, self.options.dropout, key)))
        return self.lstm.zero(len(encoded) * texts), image

    def run(self, x, cache, key):
        state, image = cache
        outputs, state = self.lstm(dropout(x, self.options.dropout, key), state)
        together = outputs.reshape(len(image), -1, *outputs.shape[1:]) + image[:, None, None]
        return jax.nn.relu(self.merged(together.reshape(outputs.shape))), None, state


DECODERS: dict[str, type[Decoder]] = {
    "lstm": LSTMDecoder,
    "gru": GRUDecoder,
    "attention": AttentionDecoder,
    "merge": MergeDecoder,
}


def pool_grid(tokens: jax.Array, side: int) -> jax.Array:
    """A square grid of tokens [B, n * n, D], row by row -> [B, side * side, D].

    Row i of the result is the mean of rows floor(i n / side) to ceil((i + 1) n / side), so a larger
    grid repeats rows (`AdaptiveAvgPool2d` of torch).

    Raises:
      UserError: the tokens are no square grid.
    """
    n = round(tokens.shape[1] ** 0.5)
    if n * n != tokens.shape[1]:
        raise UserError(
            f"learner.grid: the encoder's {tokens.shape[1]} tokens are no square grid; set "
            "learner.grid=0, which attends to them as they are."
        )
    rows = np.arange(side)[:, None]
    inside = (np.arange(n) >= rows * n // side) & (np.arange(n) < -(-(rows + 1) * n // side))
    mean = jnp.asarray(inside / inside.sum(1, keepdims=True), tokens.dtype)
    grid = tokens.reshape(len(tokens), n, n, -1)
    return jnp.einsum("pi,qj,bijd->bpqd", mean, mean, grid).reshape(len(tokens), side**2, -1)


def _repeated(state: State, times: int) -> State:
    """Each row [B, ...] so many times, side by side: [B * times, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), state)
