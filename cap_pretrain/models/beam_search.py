"""Beam search, and what it shares with the other decoding methods; see `models.decoding`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from cap_pretrain.distributed.sharding import BATCH_AXES

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class CaptionSpec(NamedTuple):
    """Size and special tokens of the captions to write.

    Attributes:
        batch: B, number of images.
        length: Maximum number of tokens per caption.
        start: Token read at position 0.
        eos: Token that ends a caption. It is part of the result.
        pad: Token that fills the positions after the end.
    """

    batch: int
    length: int
    start: int
    eos: int
    pad: int = 0


class _Beams(NamedTuple):
    """Carry of the beam search over B images, each with `beams` live captions.

    Attributes:
        position: Number of tokens written.
        tokens: Live captions int32 [B, beams, length].
        scores: Their log-probabilities [B, beams]; -inf marks an unused beam.
        best: The best complete caption int32 [B, length].
        best_score: Its normalized log-probability [B].
        complete: Number of complete captions int32 [B].
        done: bool [B], whether the search of an image has ended.
        cache: Cache of the decoding step.
    """

    position: jax.Array
    tokens: jax.Array
    scores: jax.Array
    best: jax.Array
    best_score: jax.Array
    complete: jax.Array
    done: jax.Array
    cache: tuple[Any, Any]


class _Candidates(NamedTuple):
    """The `2 * beams` best continuations of an image's live captions, [B, 2 * beams] each.

    Attributes:
        score: Log-probability, descending.
        parent: Beam that is continued.
        token: The next token.
    """

    score: jax.Array
    parent: jax.Array
    token: jax.Array


def beam_search(
    step: Step,
    cache: tuple[Any, Any],
    spec: CaptionSpec,
    *,
    beams: int,
    length_norm: float = 1.0,
    prompt_length: jax.Array | int = 0,
) -> jax.Array:
    """Return the best caption found by beam search; see `decode`.

    A caption of n tokens, including EOS, scores log p / n ** length_norm. With exponent 1 this is
    the mean log-probability of Cho et al. 2014 (1409.1259); in general it is fairseq's `lenpen`
    and Hugging Face's `length_penalty`. A caption is complete when it ends with EOS or has
    `length` tokens.

    At each position, the continuations of the `beams` live captions are ranked by log p. The
    complete ones among the best `beams` are retired; the best `beams` incomplete ones stay live.
    The search of an image ends when `beams` captions have been retired, or when no live caption
    can beat the best retired one any more: log p only falls, so a live caption ends with at most
    log p / length ** length_norm. With one beam, this is greedy decoding.

    Args:
        step: Decoding step for B * beams captions.
        cache: Cache of `step` at position 0.
        spec: Size and special tokens of the captions.
        beams: Number of live captions per image.
        length_norm: Exponent of the length normalization.
        prompt_length: int32 [B], number of leading tokens excluded from n and `length`.

    Returns:
        int32 [B, length].
    """
    prompt_length = jnp.reshape(prompt_length, (-1, 1))
    most = (spec.length - prompt_length) ** length_norm

    def unfinished(now: _Beams) -> jax.Array:
        return (now.position < spec.length) & ~jnp.all(now.done)

    def body(now: _Beams) -> _Beams:
        found, cache = _expand(step, now, spec)
        ended = found.token == spec.eos
        ends = (ended | (now.position == spec.length - 1)) & (jnp.arange(2 * beams) < beams)
        ends = ends & (found.score > -jnp.inf)
        ends = ends & ~now.done[:, None]
        # No caption ends within its prompt, so the lower bound changes no score.
        count = jnp.maximum(now.position + 1.0 - prompt_length, 1.0)
        final = jnp.where(ends, found.score, -jnp.inf) / count**length_norm
        best, best_score = _retire(now, found, final)

        scores, which = sharded_top_k(jnp.where(ended, -jnp.inf, found.score), beams)
        parent = jnp.take_along_axis(found.parent, which, axis=1)
        tokens = _take_beams(now.tokens, parent)
        token = jnp.take_along_axis(found.token, which, axis=1)
        tokens = tokens.at[:, :, now.position].set(token)
        own, shared = cache
        own = jax.tree.map(lambda leaf: _reorder(leaf, parent), own)

        complete = now.complete + jnp.sum(ends, axis=1)
        bound = jnp.max(scores / most, axis=1)
        done = now.done | (complete >= beams) | (bound <= best_score)
        return _Beams(
            now.position + 1, tokens, scores, best, best_score, complete, done, (own, shared)
        )

    begin = _Beams(
        position=jnp.int32(0),
        tokens=jnp.full((spec.batch, beams, spec.length), spec.pad, jnp.int32),
        # All captions are empty at first, so only one of them is live.
        scores=jnp.full((spec.batch, beams), -jnp.inf).at[:, 0].set(0.0),
        best=jnp.full((spec.batch, spec.length), spec.pad, jnp.int32),
        best_score=jnp.full(spec.batch, -jnp.inf),
        complete=jnp.zeros(spec.batch, jnp.int32),
        done=jnp.zeros(spec.batch, bool),
        cache=cache,
    )
    return jax.lax.while_loop(unfinished, body, begin).best


def _expand(step: Step, now: _Beams, spec: CaptionSpec) -> tuple[_Candidates, tuple[Any, Any]]:
    """Return the best continuations of the live captions, and the new cache.

    There are `2 * beams` per image, because at most `beams` of them end with EOS.
    """
    batch, beams, _ = now.tokens.shape
    last = jnp.where(now.position > 0, now.tokens[:, :, now.position - 1], spec.start)
    logits, cache = step(last.reshape(-1), now.position, now.cache)

    # The best tokens of each caption suffice, so no array of [beams, V] is sorted or written.
    gains, token = sharded_top_k(logits, min(2 * beams, logits.shape[-1]))
    gains = gains - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    candidates = now.scores[:, :, None] + gains.reshape(batch, beams, -1)
    score, which = sharded_top_k(candidates.reshape(batch, -1), 2 * beams)
    parent = which // gains.shape[-1]
    token = jnp.take_along_axis(token.reshape(batch, -1), which, axis=1)
    return _Candidates(score, parent, token), cache


def _retire(now: _Beams, found: _Candidates, final: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the best complete caption so far and its score.

    `final` [B, 2 * beams] is the normalized score of each candidate, -inf if it is incomplete.
    """
    winner = jnp.argmax(final, axis=1)[:, None]
    caption = _take_beams(now.tokens, jnp.take_along_axis(found.parent, winner, axis=1))[:, 0]
    token = jnp.take_along_axis(found.token, winner, axis=1)[:, 0]
    caption = caption.at[:, now.position].set(token)
    score = jnp.max(final, axis=1)
    best = jnp.where((score > now.best_score)[:, None], caption, now.best)
    return best, jnp.maximum(score, now.best_score)


def _take_beams(x: jax.Array, beams: jax.Array) -> jax.Array:
    """Select beams int32 [B, n] of x [B, beams, ...] within each image: [B, n, ...]."""
    return jnp.take_along_axis(x, beams.reshape(*beams.shape, *(1,) * (x.ndim - 2)), axis=1)


def _reorder(leaf: jax.Array, parent: jax.Array) -> jax.Array:
    """Replace each row of leaf [B * beams, ...] by that of its parent, int32 [B, beams]."""
    rows = leaf.reshape(*parent.shape, *leaf.shape[1:])
    return _take_beams(rows, parent).reshape(leaf.shape)


def sharded_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return `jax.lax.top_k` of x [R, V], computed where each row is sharded.

    Without the `shard_map`, the compiler gathers all rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(x) % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return jax.lax.top_k(x, k)

    def local(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, indices = jax.lax.top_k(x, k)
        return values, indices

    rows = P(BATCH_AXES)
    return jax.shard_map(local, in_specs=rows, out_specs=rows)(x)
