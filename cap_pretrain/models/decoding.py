"""Turning a decoder's step into captions: greedy, beam search, sampling; batched, jitted, cached.

Any decoder is served alike, transformer or recurrent, through one function,

  step(tokens int32 [R], position, cache) -> (logits float32 [R, V], cache)

which reads the last token of each of R captions and predicts the next. R is the batch size B, or
for beam search B * beams, the captions of an image side by side. The cache is whatever the decoder
likes, for beam search a pair `(own, shared)`: the leaves of `own` are [R, ...], a row a caption,
and move when one caption takes the place of another; `shared` stays where it is. What is large
belongs there: see `models/text.py`, where no keys and values are ever moved.

Captions may begin with a prompt, tokens that are given (see `decode`). For all methods that is one
thing: a step that gives those tokens all of the probability.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from cap_pretrain.distributed import sharding
from cap_pretrain.distributed.sharding import BATCH_AXES
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models.text import PAD

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

METHODS = ("greedy", "beam", "sample")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How captions are chosen. Options of evaluators that write captions begin with these.

    Attributes:
      method: "greedy", "beam" or "sample".
      beams: of beam search: captions that are followed up at once. With 1 it is greedy.
      length_norm: of beam search: a caption of n tokens is judged by its log-probability divided by
        n ** length_norm; 0 is the log-probability, 1 its mean over tokens (see `beam_search`).
      temperature: of sampling: the logits are divided by it.
      top_k: of sampling: only the so many most likely tokens; 0 is all.
      top_p: of sampling: only the fewest most likely tokens with so much probability together.
    """

    method: str = "greedy"
    beams: int = 4
    length_norm: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(
                f"method: no decoding method {self.method!r}.{did_you_mean(self.method, METHODS)}"
            )
        for field, fine, wanted in (
            ("beams", self.beams >= 1, "must be at least 1"),
            ("length_norm", self.length_norm >= 0, "must not be negative"),
            ("temperature", self.temperature > 0, "must be positive; method=greedy is its limit 0"),
            ("top_k", self.top_k >= 0, "must not be negative; 0 is all tokens"),
            ("top_p", 0 < self.top_p <= 1, "is not in (0, 1]"),
        ):
            if not fine:
                raise UserError(f"{field}: {getattr(self, field)} {wanted}.")

    @property
    def rows(self) -> int:
        """Captions followed up at once for each image: what the cache is made for."""
        return self.beams if self.method == "beam" else 1

    @property
    def described(self) -> str:
        """The method and its settings, for people."""
        if self.method == "greedy":
            return "greedy decoding"
        if self.method == "beam":
            return f"beam search, {self.beams} beams, log p / tokens ** {self.length_norm:g}"
        return (
            f"sampling, temperature {self.temperature:g}, top_k {self.top_k}, top_p {self.top_p:g}"
        )


def decode(
    step: Step,
    cache: Any,
    how: Decoding,
    *,
    batch: int,
    length: int,
    start: int,
    eos: int,
    pad: int = 0,
    keys: jax.Array | None = None,
    prompt: jax.Array | None = None,
) -> jax.Array:
    """Captions by the method `how` says.

    Args:
      step: one decoding step, of `batch * how.rows` captions.
      cache: what `step` needs at position 0.
      how: the method.
      batch: B.
      length: the most tokens a caption may have.
      start: the token read at position 0.
      eos: the token that ends a caption; it is kept in the result.
      pad: what follows the end.
      keys: random keys [B], for sampling.
      prompt: int32 [B, length], the tokens that each caption begins with, then `pad`; they hold
        neither `pad` nor `eos`. They cost no log-probability and do not count as tokens where that
        is normalised by their number.

    Returns:
      int32 [B, length], the prompt included.
    """
    given: jax.Array | int = 0
    if prompt is not None:
        step = prompted(step, jnp.repeat(prompt, how.rows, axis=0), pad)
        given = jnp.sum(prompt != pad, axis=1)
    common = dict(batch=batch, length=length, start=start, eos=eos, pad=pad)
    if how.method == "greedy":
        return greedy(step, cache, **common)
    if how.method == "beam":
        options = dict(beams=how.beams, length_norm=how.length_norm, given=given)
        return beam_search(step, cache, **options, **common)
    restrict = dict(temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)
    return sample(step, cache, keys, **restrict, **common)


def prompted(step: Step, prompt: jax.Array, pad: int) -> Step:
    """A step that predicts, for certain, the tokens of prompt [R, length] where it is not `pad`."""

    def prompted_step(tokens: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits, cache = step(tokens, position, cache)
        given = jax.lax.dynamic_index_in_dim(prompt, position, axis=1)  # [R, 1]
        certain = jnp.where(jnp.arange(logits.shape[-1]) == given, 0.0, -jnp.inf)
        return jnp.where(given == pad, logits, certain), cache

    return prompted_step


def greedy(
    step: Step, cache: Any, *, batch: int, length: int, start: int, eos: int, pad: int = 0
) -> jax.Array:
    """The most likely token at every position, until all captions have ended; see `decode`."""
    common = dict(batch=batch, length=length, start=start, eos=eos, pad=pad)
    return _token_by_token(step, cache, lambda logits, _: jnp.argmax(logits, axis=-1), **common)


def sample(
    step: Step,
    cache: Any,
    keys: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch: int,
    length: int,
    start: int,
    eos: int,
    pad: int = 0,
) -> jax.Array:
    """Each token drawn from what `restrict` leaves of the distribution; see `decode`.

    Args:
      keys: random keys [B]: a caption depends on its own key and not on the batch it is in.
    """

    def draw(logits: jax.Array, position: jax.Array) -> jax.Array:
        logits = restrict(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        at_position = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        return jax.vmap(jax.random.categorical)(at_position, logits)

    common = dict(batch=batch, length=length, start=start, eos=eos, pad=pad)
    return _token_by_token(step, cache, draw, **common)


def restrict(
    logits: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """The logits [R, V] to draw from: first the temperature, then top-k, then the nucleus.

    Tokens that are ruled out get -inf. Of equally likely tokens at a limit, all are left. The order
    is that of Hugging Face's `generate`.

    Args:
      logits: [R, V].
      temperature: positive; below 1 sharpens.
      top_k: so many tokens are left (Fan et al. 2018, arXiv 1805.04833); 0 is all.
      top_p: the nucleus: the fewest most likely tokens whose probabilities, after top-k, sum to at
        least this (Holtzman et al. 2019, arXiv 1904.09751).
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = _top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        falling = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(falling, axis=-1)
        needed = jnp.cumsum(shares, axis=-1) - shares < top_p  # what comes before does not suffice
        least = jnp.min(jnp.where(needed, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _token_by_token(
    step: Step,
    cache: Any,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    batch: int,
    length: int,
    start: int,
    eos: int,
    pad: int,
) -> jax.Array:
    """`choose(logits [B, V], position)` at every position, until all captions have ended."""

    def unfinished(carry):
        position, _, _, done, _ = carry
        return (position < length) & ~jnp.all(done)

    def body(carry):
        position, last, tokens, done, cache = carry
        logits, cache = step(last, position, cache)
        token = jnp.where(done, pad, choose(logits, position).astype(jnp.int32))
        tokens = tokens.at[:, position].set(token)
        return position + 1, token, tokens, done | (token == eos), cache

    carry = (
        jnp.int32(0),
        jnp.full(batch, start, jnp.int32),
        jnp.full((batch, length), pad, jnp.int32),
        jnp.zeros(batch, bool),
        cache,
    )
    return jax.lax.while_loop(unfinished, body, carry)[2]


def beam_search(
    step: Step,
    cache: tuple[Any, Any],
    *,
    beams: int,
    length_norm: float = 1.0,
    given: jax.Array | int = 0,
    batch: int,
    length: int,
    start: int,
    eos: int,
    pad: int = 0,
) -> jax.Array:
    """The best caption that beam search finds; see `decode`.

    A caption of n tokens, EOS included, scores log p / n ** length_norm, with exponent 1 the mean
    log-probability of Cho et al. 2014 (arXiv 1409.1259), in general `lenpen` of fairseq and
    `length_penalty` of Hugging Face. It is complete when it ends with EOS or is `length` tokens
    long.

    At each position, the continuations of the `beams` captions that are followed up are ranked by
    log p. Those that are complete and among the best `beams` are put aside; the best `beams`
    incomplete ones are followed up. The search of an image ends when `beams` captions were put
    aside, or when no unfinished one can beat the best of them any more: log p only falls, so it
    ends with at most log p / length ** length_norm. With one beam, that is greedy.

    Of `given` tokens (int32 [B]) that each caption begins with, n and `length` do not count.
    """
    wide = 2 * beams  # at most `beams` of these end
    given = jnp.reshape(given, (-1, 1))
    most = (length - given) ** length_norm

    def unfinished(carry):
        position, *_, done, _ = carry
        return (position < length) & ~jnp.all(done)

    def body(carry):
        position, tokens, scores, best, best_score, complete, done, cache = carry
        last = jnp.where(position > 0, tokens[:, :, position - 1], start)
        logits, cache = step(last.reshape(-1), position, cache)

        # The best of each caption suffice, so no array of [beams, V] is sorted or even written.
        gains, token = _top_k(logits, min(wide, logits.shape[-1]))
        gains = gains - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        candidates = scores[:, :, None] + gains.reshape(batch, beams, -1)
        score, which = _top_k(candidates.reshape(batch, -1), wide)
        parent = which // gains.shape[-1]
        token = jnp.take_along_axis(token.reshape(batch, -1), which, axis=1)

        ended = token == eos
        ends = (ended | (position == length - 1)) & (jnp.arange(wide) < beams) & (score > -jnp.inf)
        ends = ends & ~done[:, None]
        count = jnp.maximum(position + 1.0 - given, 1.0)  # of nothing that ends before
        final = jnp.where(ends, score, -jnp.inf) / count**length_norm
        winner = jnp.argmax(final, axis=1)[:, None]
        caption = _of_row(tokens, jnp.take_along_axis(parent, winner, axis=1))[:, 0]
        caption = caption.at[:, position].set(jnp.take_along_axis(token, winner, axis=1)[:, 0])
        final = jnp.max(final, axis=1)
        best = jnp.where((final > best_score)[:, None], caption, best)
        best_score = jnp.maximum(final, best_score)

        scores, which = _top_k(jnp.where(ended, -jnp.inf, score), beams)
        parent = jnp.take_along_axis(parent, which, axis=1)
        tokens = _of_row(tokens, parent)
        tokens = tokens.at[:, :, position].set(jnp.take_along_axis(token, which, axis=1))
        own, shared = cache
        own = jax.tree.map(lambda leaf: _moved(leaf, parent), own)

        complete = complete + jnp.sum(ends, axis=1)
        hope = jnp.max(scores / most, axis=1)
        done = done | (complete >= beams) | (hope <= best_score)
        return position + 1, tokens, scores, best, best_score, complete, done, (own, shared)

    carry = (
        jnp.int32(0),
        jnp.full((batch, beams, length), pad, jnp.int32),
        # All captions are the same at first, so one of them is followed up.
        jnp.full((batch, beams), -jnp.inf).at[:, 0].set(0.0),
        jnp.full((batch, length), pad, jnp.int32),
        jnp.full(batch, -jnp.inf),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        cache,
    )
    return jax.lax.while_loop(unfinished, body, carry)[3]


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of x [R, V], each row where it lies: the compiler would gather them all."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(x) % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return jax.lax.top_k(x, k)
    rows = P(BATCH_AXES)
    return jax.shard_map(lambda x: tuple(jax.lax.top_k(x, k)), in_specs=rows, out_specs=rows)(x)


def _of_row(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x [B, beams, ...], rows int32 [B, n] -> [B, n, ...], row by row of the same image."""
    return jnp.take_along_axis(x, rows.reshape(*rows.shape, *(1,) * (x.ndim - 2)), axis=1)


def _moved(leaf: jax.Array, parent: jax.Array) -> jax.Array:
    """leaf [B * beams, ...]: to each row what its parent, int32 [B, beams], had."""
    return _of_row(leaf.reshape(*parent.shape, *leaf.shape[1:]), parent).reshape(leaf.shape)


def write_captions(
    learner: nnx.Module,
    images: jax.Array,
    how: Decoding,
    *,
    length: int,
    eos: int,
    keys: jax.Array | None = None,
    prompt: jax.Array | None = None,
) -> jax.Array:
    """A captioner's captions of uint8 images [B, H, W, 3]: int32 [B, length]; see `decode`."""
    return decode(
        sharding.gathered(learner).decode_step,
        learner.init_decoding(images, how.rows),
        how,
        batch=len(images),
        length=length,
        start=PAD,
        eos=eos,
        keys=keys,
        prompt=prompt,
    )
