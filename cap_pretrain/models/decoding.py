"""Writes captions with a decoder: greedy decoding, beam search and sampling; batched and jitted.

All methods work with any decoder, transformer or recurrent, through one function

    step(tokens int32 [R], position, cache) -> (logits float32 [R, V], cache)

which reads the last token of each of R captions and predicts the next. R is the batch size B; in
beam search it is B * beams, and the captions of an image are adjacent rows. The cache is up to the
decoder. For beam search it is a pair `(own, shared)`: the leaves of `own` are [R, ...], one row per
caption, and are permuted when captions are reordered; `shared` is not. Large arrays belong in
`shared`: see `models/text.py`, which never moves keys and values.

Captions may begin with a prompt, tokens that are given (see `decode`). All methods implement this
in the same way, by a step that assigns these tokens probability 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.distributed import sharding
from cap_pretrain.models import processors
from cap_pretrain.models.beam_search import (
    Beam,
    CaptionSpec,
    Step,
    Written,
    beam_search,
    search,
)
from cap_pretrain.models.decoding_options import METHODS, Decoding
from cap_pretrain.models.processors import Processor, restrict
from cap_pretrain.models.sharded import at_tokens
from cap_pretrain.models.text import PAD, Decoder

__all__ = ["METHODS", "CaptionSpec", "Decoding", "Written", "beam_search", "restrict"]


def decode(
    step: Step,
    cache: Any,
    how: Decoding,
    spec: CaptionSpec,
    *,
    keys: jax.Array | None = None,
    prompt: jax.Array | None = None,
) -> jax.Array:
    """Return the first caption of each image, int32 [B, length], by `decode_all`."""
    return decode_all(step, cache, how, spec, keys=keys, prompt=prompt).tokens[:, 0]


def decode_all(
    step: Step,
    cache: Any,
    how: Decoding,
    spec: CaptionSpec,
    *,
    keys: jax.Array | None = None,
    prompt: jax.Array | None = None,
) -> Written:
    """Write captions by the method `how`.

    Args:
        step: Decoding step for `spec.batch * how.rows` captions.
        cache: Cache of `step` at position 0.
        how: The method.
        spec: Size and special tokens of the captions.
        keys: Random keys [B], required for sampling.
        prompt: int32 [B, length], the tokens that each caption begins with, followed by `pad`.
            They contain neither `pad` nor `eos`. They have log-probability 0 and are excluded
            from the token count of the length normalization and from `min_length`. The other rules
            take them for a part of the caption.

    Returns:
        `how.captions` captions per image, including the prompt: the best first, or samples in the
        order in which they were drawn; and their log-probabilities. These are sums over tokens,
        including EOS, of log-probabilities of the model: of the softmax of its logits, before
        rules, temperature, restrictions and diversity.
    """
    lengths: jax.Array | int = 0
    of_rows: jax.Array | int = 0
    if prompt is not None:
        step = prompted(step, jnp.repeat(prompt, how.rows, axis=0), spec.pad)
        lengths = jnp.sum(prompt != spec.pad, axis=1)
        of_rows = jnp.repeat(lengths, how.rows)
    process = how.rules(spec, of_rows)
    if how.method == "beam":
        beam = Beam(how.beams, how.length_norm, how.groups, how.diversity, how.captions)
        return search(step, cache, spec, beam, process=process, prompt_length=lengths)
    if how.method == "greedy":
        return _token_by_token(step, cache, _likeliest, spec, process)
    if keys is None:
        raise ValueError("decode: sampling needs random keys.")
    several = spec._replace(batch=spec.batch * how.captions)
    options = dict(temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)
    draw = _draw(_keys_of_samples(keys, how.captions, spec.length), options)
    found = _token_by_token(step, cache, draw, several, process)
    return Written(*(x.reshape(spec.batch, how.captions, *x.shape[2:]) for x in found))


def prompted(step: Step, prompt: jax.Array, pad: int) -> Step:
    """Return a step that predicts prompt int32 [R, length] with probability 1, up to its `pad`."""

    def prompted_step(tokens: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits, cache = step(tokens, position, cache)
        given = jax.lax.dynamic_index_in_dim(prompt, position, axis=1)  # [R, 1]
        certain = jnp.where(jnp.arange(logits.shape[-1]) == given, 0.0, -jnp.inf)
        return jnp.where(given == pad, logits, certain), cache

    return prompted_step


def greedy(step: Step, cache: Any, spec: CaptionSpec) -> jax.Array:
    """Choose the most likely token at every position; see `decode`."""
    return _token_by_token(step, cache, _likeliest, spec).tokens[:, 0]


def _likeliest(logits: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1)


def sample(
    step: Step,
    cache: Any,
    keys: jax.Array,
    spec: CaptionSpec,
    **options: Any,
) -> jax.Array:
    """Draw each token from the distribution that `restrict` leaves; see `decode`.

    Args:
        step: Decoding step for B captions.
        cache: Cache of `step` at position 0.
        keys: Random keys [B]. A caption depends on its own key, not on the batch it is in.
        spec: Size and special tokens of the captions.
        options: Those of `restrict`.
    """
    return _token_by_token(step, cache, _draw(keys, options), spec).tokens[:, 0]


def _draw(keys: jax.Array, options: dict[str, Any]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return a function (logits [R, V], position) -> int32 [R] that draws with keys [R]."""

    def draw(logits: jax.Array, position: jax.Array) -> jax.Array:
        logits = restrict(logits, **options)
        at_position = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        return jax.vmap(jax.random.categorical)(at_position, logits)

    return draw


def _keys_of_samples(keys: jax.Array, samples: int, length: int) -> jax.Array:
    """Return keys [B * samples] for keys [B]; those of the first samples are `keys`.

    Keys of positions are `keys` folded with numbers below `length`, so others are used here.
    """

    def of_image(key: jax.Array) -> jax.Array:
        others = length + jnp.arange(1, samples)
        further = jax.vmap(jax.random.fold_in, (None, 0))(key, others)
        return jnp.concatenate([key[None], further])

    return keys if samples == 1 else jax.vmap(of_image)(keys).reshape(-1)


def _token_by_token(
    step: Step,
    cache: Any,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    spec: CaptionSpec,
    process: Processor | None = None,
) -> Written:
    """Apply `choose(logits [B, V], position)` at every position until all captions have ended.

    `process` are rules on the next token. Returns one caption per row.
    """
    process = process or processors.in_turn([])

    def unfinished(carry):
        position, _, _, _, done, _ = carry
        return (position < spec.length) & ~jnp.all(done)

    def body(carry):
        position, last, tokens, log_p, done, cache = carry
        logits, cache = step(last, position, cache)
        allowed = process(tokens, position, logits)
        token = jnp.where(done, spec.pad, choose(allowed, position).astype(jnp.int32))
        own = at_tokens(logits, token[:, None])[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        log_p = jnp.where(done, log_p, log_p + own)
        tokens = tokens.at[:, position].set(token)
        return position + 1, token, tokens, log_p, done | (token == spec.eos), cache

    carry = (
        jnp.int32(0),
        jnp.full(spec.batch, spec.start, jnp.int32),
        jnp.full((spec.batch, spec.length), spec.pad, jnp.int32),
        jnp.zeros(spec.batch),
        jnp.zeros(spec.batch, bool),
        cache,
    )
    _, _, tokens, log_p, _, _ = jax.lax.while_loop(unfinished, body, carry)
    return Written(tokens[:, None], log_p[:, None])


def for_decoding(learner: nnx.Module) -> Any:
    """Return `learner` with its parameters in the form in which a step of decoding uses them.

    They are whole on every device, matrices have the dtype of their products, and each layer of a
    transformer has its own arrays. The loop over tokens would do all this again in each iteration.
    """
    learner = nnx.clone(sharding.gathered(learner))
    for _, module in nnx.iter_modules(learner):
        if isinstance(module, (nnx.Linear, nnx.Conv)) and module.dtype:
            module.kernel = nnx.Param(module.kernel[...].astype(module.dtype))
        elif isinstance(module, nnx.Embed) and module.dtype:
            module.embedding = nnx.Param(module.embedding[...].astype(module.dtype))
    for _, module in nnx.iter_modules(learner):
        if isinstance(module, Decoder):
            module.separate()
    return learner


def write_captions(learner: Any, images: jax.Array, how: Decoding, **options: Any) -> jax.Array:
    """Return the first caption of each image, int32 [B, length], by `write_all`."""
    return write_all(learner, images, how, **options).tokens[:, 0]


def write_all(
    learner: Any,
    images: jax.Array,
    how: Decoding,
    *,
    length: int,
    eos: int,
    keys: jax.Array | None = None,
    prompt: jax.Array | None = None,
) -> Written:
    """Write captions of images with a captioner.

    Args:
        learner: A learner that implements `learners.protocols.WritesCaptions`.
        images: uint8 [B, H, W, 3].
        how: The decoding method.
        length: Maximum number of tokens per caption.
        eos: Token that ends a caption.
        keys: See `decode_all`, as for `prompt`.
        prompt: See `decode_all`.

    Returns:
        `how.captions` captions per image and their log-probabilities, see `decode_all`.
    """
    return decode_all(
        for_decoding(learner).decode_step,
        learner.init_decoding(images, how.rows),
        how,
        CaptionSpec(batch=len(images), length=length, start=PAD, eos=eos),
        keys=keys,
        prompt=prompt,
    )
