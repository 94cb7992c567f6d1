"""Rules on the next token, which every decoding method applies to the logits.

A processor is a function of the tokens written so far and of the logits of the next one:

    process(tokens int32 [R, length], position, logits float32 [R, V]) -> logits float32 [R, V]

It reads `tokens[:, :position]`, which begin with the prompt, if any. A token that must not come
next gets the logit -inf. The rules and their order are those of Hugging Face's `generate`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cap_pretrain.models.sharded import mark, sharded_top_k

Processor = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def repetition_penalty(penalty: float) -> Processor:
    """Make tokens that were written less likely (Keskar et al. 2019, 1909.05858, section 4.1).

    The logit of such a token is divided by `penalty` if it is positive, and multiplied by it if it
    is negative, as in `transformers`: both make the token less likely if `penalty` is above 1.
    """

    def process(tokens: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
        written = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < position, tokens.shape)
        penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
        return jnp.where(mark(tokens, written, logits.shape[-1]), penalized, logits)

    return process


def no_repeat_ngram(size: int) -> Processor:
    """Exclude tokens that would repeat `size` successive tokens (Paulus et al. 2017, 1705.04304).

    With size 1, no token occurs twice.
    """

    def process(tokens: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        if size > length:
            return logits
        starts = length - size + 1  # n-grams [R, starts] begin at each position that has room
        first = jnp.maximum(position - size + 1, 0)
        recent = jax.lax.dynamic_slice_in_dim(tokens, first, size - 1, axis=1)
        repeated = jnp.broadcast_to(
            jnp.arange(starts) + size <= position, (len(tokens), starts)
        )  # the n-gram is complete
        for n in range(size - 1):
            repeated &= tokens[:, n : n + starts] == recent[:, n : n + 1]
        excluded = mark(tokens[:, size - 1 :], repeated, logits.shape[-1])
        return jnp.where(excluded, -jnp.inf, logits)

    return process


def min_length(least: int, eos: int, prompt_length: jax.Array | int) -> Processor:
    """Exclude `eos` until `least` tokens have followed the prompt, of length int32 [R]."""

    def process(tokens: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
        early = position - jnp.broadcast_to(prompt_length, len(tokens)) < least
        ends = jnp.arange(logits.shape[-1]) == eos
        return jnp.where(early[:, None] & ends, -jnp.inf, logits)

    return process


def after_prompt(process: Processor, prompt_length: jax.Array) -> Processor:
    """Apply `process` only after the prompt, of length int32 [R], whose tokens are given."""

    def processed(tokens: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
        free = position >= prompt_length
        return jnp.where(free[:, None], process(tokens, position, logits), logits)

    return processed


def in_turn(processors: list[Processor]) -> Processor:
    """Apply processors one after the other; none of them leave the logits as they are."""

    def process(tokens: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
        for one in processors:
            logits = one(tokens, position, logits)
        return logits

    return process


def restrict(
    logits: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Apply temperature, then top-k, then nucleus filtering to logits [R, V].

    Excluded tokens get -inf. Tokens that tie at a limit are all kept. The order is that of Hugging
    Face's `generate`.

    Args:
        logits: [R, V].
        temperature: Positive; values below 1 sharpen the distribution.
        top_k: Number of most likely tokens to keep (Fan et al. 2018, 1805.04833). 0 keeps all.
        top_p: Nucleus: keep the smallest set of most likely tokens whose probabilities, after
            top-k, sum to at least this value (Holtzman et al. 2019, 1904.09751).
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = sharded_top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token is needed if the more likely ones do not sum to top_p.
        needed = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        least = jnp.min(jnp.where(needed, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
