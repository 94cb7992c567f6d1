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

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models.beam_search import CaptionSpec, Step, beam_search, sharded_top_k
from cap_pretrain.models.text import PAD, Decoder

METHODS = ("greedy", "beam", "sample")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decoding method. Base of the options of evaluators that write captions.

    Attributes:
        method: "greedy", "beam" or "sample".
        beams: Beam search: number of live captions per image. 1 is greedy decoding.
        length_norm: Beam search: a caption of n tokens scores its log-probability divided by
            n ** length_norm. 0 is the log-probability, 1 its mean over tokens (see `beam_search`).
        temperature: Sampling: divisor of the logits.
        top_k: Sampling: number of most likely tokens to draw from. 0 is all.
        top_p: Sampling: probability mass of the smallest set of most likely tokens to draw from.
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
        for field, valid, rule in (
            ("beams", self.beams >= 1, "must be at least 1"),
            ("length_norm", self.length_norm >= 0, "must not be negative"),
            (
                "temperature",
                self.temperature > 0,
                "must be positive; for the limit 0 use method=greedy",
            ),
            ("top_k", self.top_k >= 0, "must not be negative; 0 is all tokens"),
            ("top_p", 0 < self.top_p <= 1, "is not in (0, 1]"),
        ):
            if not valid:
                raise UserError(f"{field}: {getattr(self, field)} {rule}.")

    @property
    def rows(self) -> int:
        """Number of live captions per image, for which the cache is allocated."""
        return self.beams if self.method == "beam" else 1

    @property
    def described(self) -> str:
        """Readable description of the method and its settings."""
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
    spec: CaptionSpec,
    *,
    keys: jax.Array | None = None,
    prompt: jax.Array | None = None,
) -> jax.Array:
    """Write captions by the method `how`.

    Args:
        step: Decoding step for `spec.batch * how.rows` captions.
        cache: Cache of `step` at position 0.
        how: The method.
        spec: Size and special tokens of the captions.
        keys: Random keys [B], required for sampling.
        prompt: int32 [B, length], the tokens that each caption begins with, followed by `pad`.
            They contain neither `pad` nor `eos`. They have log-probability 0 and are excluded
            from the token count of the length normalization.

    Returns:
        int32 [B, length], including the prompt.
    """
    prompt_length: jax.Array | int = 0
    if prompt is not None:
        step = prompted(step, jnp.repeat(prompt, how.rows, axis=0), spec.pad)
        prompt_length = jnp.sum(prompt != spec.pad, axis=1)
    if how.method == "greedy":
        return greedy(step, cache, spec)
    if how.method == "beam":
        return beam_search(
            step,
            cache,
            spec,
            beams=how.beams,
            length_norm=how.length_norm,
            prompt_length=prompt_length,
        )
    if keys is None:
        raise ValueError("decode: sampling needs random keys.")
    return sample(
        step,
        cache,
        keys,
        spec,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
    )


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
    return _token_by_token(step, cache, lambda logits, _: jnp.argmax(logits, axis=-1), spec)


def sample(
    step: Step,
    cache: Any,
    keys: jax.Array,
    spec: CaptionSpec,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """Draw each token from the distribution that `restrict` leaves; see `decode`.

    Args:
        step: Decoding step for B captions.
        cache: Cache of `step` at position 0.
        keys: Random keys [B]. A caption depends on its own key, not on the batch it is in.
        spec: Size and special tokens of the captions.
        temperature: See `restrict`, as for `top_k` and `top_p`.
        top_k: See `restrict`.
        top_p: See `restrict`.
    """

    def draw(logits: jax.Array, position: jax.Array) -> jax.Array:
        logits = restrict(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        at_position = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        return jax.vmap(jax.random.categorical)(at_position, logits)

    return _token_by_token(step, cache, draw, spec)


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


def _token_by_token(
    step: Step,
    cache: Any,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    spec: CaptionSpec,
) -> jax.Array:
    """Apply `choose(logits [B, V], position)` at every position until all captions have ended."""

    def unfinished(carry):
        position, _, _, done, _ = carry
        return (position < spec.length) & ~jnp.all(done)

    def body(carry):
        position, last, tokens, done, cache = carry
        logits, cache = step(last, position, cache)
        token = jnp.where(done, spec.pad, choose(logits, position).astype(jnp.int32))
        tokens = tokens.at[:, position].set(token)
        return position + 1, token, tokens, done | (token == spec.eos), cache

    carry = (
        jnp.int32(0),
        jnp.full(spec.batch, spec.start, jnp.int32),
        jnp.full((spec.batch, spec.length), spec.pad, jnp.int32),
        jnp.zeros(spec.batch, bool),
        cache,
    )
    return jax.lax.while_loop(unfinished, body, carry)[2]


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
            module.blocks = nnx.List(module.layers())
    return learner


def write_captions(
    learner: Any,
    images: jax.Array,
    how: Decoding,
    *,
    length: int,
    eos: int,
    keys: jax.Array | None = None,
    prompt: jax.Array | None = None,
) -> jax.Array:
    """Write captions of images with a captioner.

    Args:
        learner: A learner that implements `learners.protocols.WritesCaptions`.
        images: uint8 [B, H, W, 3].
        how: The decoding method.
        length: Maximum number of tokens per caption.
        eos: Token that ends a caption.
        keys: See `decode`, as for `prompt`.
        prompt: See `decode`.

    Returns:
        int32 [B, length].
    """
    return decode(
        for_decoding(learner).decode_step,
        learner.init_decoding(images, how.rows),
        how,
        CaptionSpec(batch=len(images), length=length, start=PAD, eos=eos),
        keys=keys,
        prompt=prompt,
    )
