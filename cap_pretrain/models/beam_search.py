"""Beam search, and what it shares with the other decoding methods; see `models.decoding`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cap_pretrain.models.processors import Processor, in_turn
from cap_pretrain.models.sharded import at_tokens, count, sharded_top_k

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


class Written(NamedTuple):
    """Captions of B images, n of each.

    Attributes:
        tokens: int32 [B, n, length].
        log_p: Log-probabilities of the captions under the model [B, n]; -inf marks a caption that
            was not found.
    """

    tokens: jax.Array
    log_p: jax.Array


class Beam(NamedTuple):
    """Settings of a beam search.

    Attributes:
        beams: Number of live captions per image.
        length_norm: Exponent of the length normalization.
        groups: Number of groups that the beams are divided into.
        diversity: Penalty of a token for each time that earlier groups chose it at its position.
        captions: Number of captions to return per image, at most `beams`.
    """

    beams: int
    length_norm: float = 1.0
    groups: int = 1
    diversity: float = 0.0
    captions: int = 1


class _Best(NamedTuple):
    """The best complete captions of S searches, best first.

    Attributes:
        tokens: int32 [S, n, length].
        score: Their normalized scores [S, n]; -inf marks that there is none.
        log_p: Their log-probabilities under the model [S, n]; likewise.
    """

    tokens: jax.Array
    score: jax.Array
    log_p: jax.Array


class _Beams(NamedTuple):
    """Carry of S = B * groups searches, each with K = beams / groups live captions.

    Attributes:
        position: Number of tokens written.
        tokens: Live captions int32 [S, K, length].
        scores: Their scores [S, K]; -inf marks an unused beam.
        log_p: Their log-probabilities under the model [S, K].
        best: The best complete captions.
        complete: Number of complete captions int32 [S].
        done: bool [S], whether a search has ended.
        cache: Cache of the decoding step.
    """

    position: jax.Array
    tokens: jax.Array
    scores: jax.Array
    log_p: jax.Array
    best: _Best
    complete: jax.Array
    done: jax.Array
    cache: tuple[Any, Any]


class _Candidates(NamedTuple):
    """The `2 * K` best continuations of the live captions of each search, [S, 2 * K] each.

    Attributes:
        score: Score, descending.
        log_p: Log-probability under the model.
        parent: Beam that is continued.
        token: The next token.
    """

    score: jax.Array
    log_p: jax.Array
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
    """Return the best caption found by a plain beam search, int32 [B, length]; see `search`."""
    how = Beam(beams, length_norm)
    return search(step, cache, spec, how, prompt_length=prompt_length).tokens[:, 0]


def search(
    step: Step,
    cache: tuple[Any, Any],
    spec: CaptionSpec,
    how: Beam,
    *,
    process: Processor | None = None,
    prompt_length: jax.Array | int = 0,
) -> Written:
    """Return the best captions found by beam search; see `decode`.

    A caption of n tokens, including EOS, scores log p / n ** length_norm. With exponent 1 this is
    the mean log-probability of Cho et al. 2014 (1409.1259); in general it is fairseq's `lenpen`
    and Hugging Face's `length_penalty`. A caption is complete when it ends with EOS or has
    `length` tokens.

    At each position, the continuations of the `beams` live captions are ranked by log p. The
    complete ones among the best `beams` are retired; the best `beams` incomplete ones stay live.
    The search of an image ends when `beams` captions have been retired, or when no live caption
    can beat the worst of the captions to return any more: log p only falls, so a live caption ends
    with at most log p / length ** length_norm. With one beam, this is greedy decoding.

    Tokens that `process` excludes have no probability, the others keep theirs: the probabilities
    that are left are not normalized again. Where `process` lowers a logit, log p falls by as much.

    With groups, each is a separate search with `beams / groups` live captions, and a token loses
    `diversity` in log p for each live caption of the groups before it that has just been continued
    with this token: the Hamming diversity of Vijayakumar et al. 2016 (1610.02424). The result has
    the best caption of each group, ordered by their scores, then the second best of each, and so
    on. A caption that two groups found comes once, unless there are too few others.

    Args:
        step: Decoding step for B * beams captions.
        cache: Cache of `step` at position 0.
        spec: Size and special tokens of the captions.
        how: The settings.
        process: Rules on the next token, for B * beams captions.
        prompt_length: int32 [B], number of leading tokens excluded from n and `length`.

    Returns:
        `captions` captions per image. Their log-probabilities are those of the model, without
        `process` and diversity.
    """
    beams = how.beams // how.groups
    if jnp.ndim(prompt_length):
        prompt_length = jnp.repeat(jnp.asarray(prompt_length), how.groups)
    prompt_length = jnp.reshape(prompt_length, (-1, 1))
    most = (spec.length - prompt_length) ** how.length_norm

    def unfinished(now: _Beams) -> jax.Array:
        return (now.position < spec.length) & ~jnp.all(now.done)

    def body(now: _Beams) -> _Beams:
        free = ~now.done & (now.position >= prompt_length[:, 0])
        found, cache = _expand(step, now, spec, how, process or in_turn([]), free)
        ended = found.token == spec.eos
        ends = (ended | (now.position == spec.length - 1)) & (jnp.arange(2 * beams) < beams)
        ends = ends & (found.score > -jnp.inf)
        ends = ends & ~now.done[:, None]
        # No caption ends within its prompt, so the lower bound changes no score.
        tokens_so_far = jnp.maximum(now.position + 1.0 - prompt_length, 1.0)
        final = jnp.where(ends, found.score, -jnp.inf) / tokens_so_far**how.length_norm
        best = _retire(now, found, final)

        scores, which = _continued(found, beams, spec.eos)
        parent, token, log_p = (
            jnp.take_along_axis(x, which, axis=1) for x in (found.parent, found.token, found.log_p)
        )
        tokens = _take_beams(now.tokens, parent)
        tokens = tokens.at[:, :, now.position].set(token)
        own, shared = cache
        own = jax.tree.map(lambda leaf: _reorder(leaf, parent), own)

        complete = now.complete + jnp.sum(ends, axis=1)
        bound = jnp.max(scores / most, axis=1)
        done = now.done | (complete >= beams) | (bound <= best.score[:, -1])
        return _Beams(now.position + 1, tokens, scores, log_p, best, complete, done, (own, shared))

    begin = _begin(spec, how, cache)
    return _merged(jax.lax.while_loop(unfinished, body, begin).best, how)


def _begin(spec: CaptionSpec, how: Beam, cache: tuple[Any, Any]) -> _Beams:
    """Return the state of searches before the first token."""
    searches, beams = spec.batch * how.groups, how.beams // how.groups
    kept = min(beams, how.captions)
    nothing = jnp.full((searches, kept), -jnp.inf)
    # All captions are empty at first, so only one of them is live.
    scores = jnp.full((searches, beams), -jnp.inf).at[:, 0].set(0.0)
    return _Beams(
        position=jnp.int32(0),
        tokens=jnp.full((searches, beams, spec.length), spec.pad, jnp.int32),
        scores=scores,
        log_p=scores,
        best=_Best(jnp.full((searches, kept, spec.length), spec.pad, jnp.int32), nothing, nothing),
        complete=jnp.zeros(searches, jnp.int32),
        done=jnp.zeros(searches, bool),
        cache=cache,
    )


def _expand(
    step: Step,
    now: _Beams,
    spec: CaptionSpec,
    how: Beam,
    process: Processor,
    free: jax.Array,
) -> tuple[_Candidates, tuple[Any, Any]]:
    """Return the best continuations of the live captions, and the new cache.

    bool `free` [S] says which searches choose their next token.
    """
    searches, beams, length = now.tokens.shape
    last = jnp.where(now.position > 0, now.tokens[:, :, now.position - 1], spec.start)
    logits, cache = step(last.reshape(-1), now.position, now.cache)
    allowed = process(now.tokens.reshape(-1, length), now.position, logits)
    if how.groups == 1:
        return _candidates(now.scores, now.log_p, logits, allowed), cache

    size = logits.shape[-1]

    def of_group(x: jax.Array, group: int) -> jax.Array:
        """Return the rows of x [S, …], or [S * K, …], that belong to a group."""
        by_group = x.reshape(-1, how.groups, len(x) // searches, *x.shape[1:])[:, group]
        return by_group.reshape(-1, *x.shape[1:])

    chosen = jnp.zeros((searches // how.groups, size))  # how often, at this position [B, V]
    found = []
    for group in range(how.groups):
        scores, log_p = of_group(now.scores, group), of_group(now.log_p, group)
        lowered = of_group(allowed, group) - how.diversity * jnp.repeat(chosen, beams, axis=0)
        one = _candidates(scores, log_p, of_group(logits, group), lowered)
        found.append(one)
        live, which = _continued(one, beams, spec.eos)
        choose = (live > -jnp.inf) & of_group(free, group)[:, None]
        chosen += count(jnp.take_along_axis(one.token, which, axis=1), choose, size)
    together = [jnp.stack(parts, axis=1) for parts in zip(*found, strict=True)]
    return _Candidates(*(part.reshape(searches, -1) for part in together)), cache


def _candidates(
    scores: jax.Array, log_p: jax.Array, logits: jax.Array, allowed: jax.Array
) -> _Candidates:
    """Return the best continuations of live captions with these scores [S, K].

    There are `2 * K` per search, because at most K of them end with EOS. `logits` [S * K, V] are
    the model's, `allowed` those by which captions are chosen.
    """
    searches, beams = scores.shape
    # The best tokens of each caption suffice, so no array of [K, V] is sorted or written.
    gains, token = sharded_top_k(allowed, min(2 * beams, logits.shape[-1]))
    whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    gains = gains - whole
    own = gains if allowed is logits else at_tokens(logits, token) - whole
    candidates = scores[:, :, None] + gains.reshape(searches, beams, -1)
    score, which = sharded_top_k(candidates.reshape(searches, -1), 2 * beams)
    log_p = log_p[:, :, None] + own.reshape(searches, beams, -1)
    log_p = jnp.take_along_axis(log_p.reshape(searches, -1), which, axis=1)
    parent = which // gains.shape[-1]
    token = jnp.take_along_axis(token.reshape(searches, -1), which, axis=1)
    return _Candidates(score, log_p, parent, token)


def _continued(found: _Candidates, beams: int, eos: int) -> tuple[jax.Array, jax.Array]:
    """Return the scores [S, K] of the candidates that stay live, and which these are."""
    return sharded_top_k(jnp.where(found.token == eos, -jnp.inf, found.score), beams)


def _retire(now: _Beams, found: _Candidates, final: jax.Array) -> _Best:
    """Return the best complete captions so far.

    `final` [S, 2 * K] is the normalized score of each candidate, -inf if it is incomplete.
    """
    captions = _take_beams(now.tokens, found.parent).at[:, :, now.position].set(found.token)
    captions = jnp.concatenate([now.best.tokens, captions], axis=1)
    score = jnp.concatenate([now.best.score, final], axis=1)
    log_p = jnp.concatenate([now.best.log_p, found.log_p], axis=1)
    score, which = sharded_top_k(score, now.best.score.shape[1])  # of equal ones, the earlier
    log_p = jnp.take_along_axis(log_p, which, axis=1)
    return _Best(_take_beams(captions, which), score, log_p)


def _merged(best: _Best, how: Beam) -> Written:
    """Return the captions of all groups of an image in the order that `search` documents."""
    if how.groups > 1:
        # [B, rank in the group, group], then ordered by score within each rank.
        by_rank = [x.reshape(-1, how.groups, *x.shape[1:]).swapaxes(1, 2) for x in best]
        order = jnp.argsort(-by_rank[1], axis=2)
        found = [
            jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 3)), axis=2)
            for x in by_rank
        ]
        best = _Best(*(x.reshape(len(x), -1, *x.shape[3:]) for x in found))
        same = jnp.all(best.tokens[:, :, None] == best.tokens[:, None], axis=-1)
        again = jnp.any(jnp.tril(same, -1), axis=2) | (best.score == -jnp.inf)
        order = jnp.argsort(again, axis=1, stable=True)
        best = _Best(*(_take_beams(x, order) for x in best))
    log_p = jnp.where(best.score > -jnp.inf, best.log_p, -jnp.inf)
    return Written(best.tokens[:, : how.captions], log_p[:, : how.captions])


def _take_beams(x: jax.Array, beams: jax.Array) -> jax.Array:
    """Select beams int32 [B, n] of x [B, beams, ...] within each image: [B, n, ...]."""
    return jnp.take_along_axis(x, beams.reshape(*beams.shape, *(1,) * (x.ndim - 2)), axis=1)


def _reorder(leaf: jax.Array, parent: jax.Array) -> jax.Array:
    """Replace each row of leaf [B * beams, ...] by that of its parent, int32 [B, beams]."""
    rows = leaf.reshape(*parent.shape, *leaf.shape[1:])
    return _take_beams(rows, parent).reshape(leaf.shape)
