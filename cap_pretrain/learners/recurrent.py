"""Recurrent captioners: an encoder and an LSTM, GRU, attention or merge decoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.distributed.sharding import gathered
from cap_pretrain.errors import UserError
from cap_pretrain.learners.captioner import Captioner, is_learned, shift_right
from cap_pretrain.models import recurrent
from cap_pretrain.models.build import build_encoder, compute


class Recurrent(Captioner):
    """A captioner with a recurrent decoder, which predicts the caption word by word.

    Padding is what is read first, as `<start>`; a caption ends with EOS. What a decoder wants of
    the image is the encoder's tokens if it attends to them, else the pooled vector.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(recurrent.Options):
        """Settings of `config.learner`: the decoder's (see `models.recurrent.Options`), and

        Attributes:
          penalty: weight of the doubly stochastic penalty (Xu et al. 2015, 1502.03044, equation
            14): over a caption, every part of the image should be seen for one word in all. It is
            (1 - sum of its weights over the words)^2 for each part; in training only it is added to
            the loss, averaged over captions as that is.
          penalty_scale: "mean" of the parts of the image, or their "sum", as in the paper.
          label_smoothing: mass spread evenly over the vocabulary.
          scheduled_sampling: probability, in training, that a word is read not as it is in the
            caption but as the decoder, after what it has read so far, draws it (Bengio et al. 2015,
            1506.03099). Theirs grows from 0; a loss does not know its step, so this is constant.
          average: "token" averages over all tokens of the batch, as the sources do; "example" over
            the tokens of each caption, then over captions.
        """

        penalty: float = 0.0
        penalty_scale: str = "mean"
        label_smoothing: float = 0.0
        scheduled_sampling: float = 0.0
        average: str = "token"

        def __post_init__(self):
            super().__post_init__()
            if self.penalty < 0 or (self.penalty and self.decoder != "attention"):
                raise UserError(
                    f"learner.penalty: {self.penalty} is not for a decoder {self.decoder!r}; it "
                    "weighs what attention sees, and is not negative."
                )
            for field, choices in (
                ("penalty_scale", ("mean", "sum")),
                ("average", ("token", "example")),
            ):
                if getattr(self, field) not in choices:
                    raise UserError(
                        f"learner.{field}: {getattr(self, field)!r} is neither "
                        f"{choices[0]!r} nor {choices[1]!r}."
                    )
            if not 0 <= self.label_smoothing < 1:
                raise UserError(
                    f"learner.label_smoothing: {self.label_smoothing} is not in [0, 1)."
                )
            if not 0 <= self.scheduled_sampling <= 1:
                raise UserError(
                    f"learner.scheduled_sampling: {self.scheduled_sampling} is not in [0, 1]."
                )

    def __init__(self, encoder: nnx.Module, decoder: recurrent.Decoder, *, options: Options):
        self.encoder = encoder
        self.decoder = decoder
        self.options = options

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Recurrent":
        options = learners.options(config)
        encoder = build_encoder(config, rngs)
        decoder = recurrent.DECODERS[options.decoder](
            options,
            vocab_size=vocab_size,
            width=encoder.width,
            compute=compute(config),
            rngs=rngs,
        )
        return cls(encoder, decoder, options=options)

    def states(self, encoded: jax.Array, text: jax.Array) -> jax.Array:
        """What the logits of `text` int32 [B * C, T] are made of, as a `Captioner`'s."""
        return gathered(self.decoder).states(encoded, shift_right(text))[0]

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Cross-entropy of the captions; prompts, padding and masked examples do not count."""
        text, options, decoder = batch["text"], self.options, gathered(self.decoder)
        encoder_key, words_key, decoder_key = jax.random.split(key, 3)
        encoded = self.encode(batch["image"], train=train, key=encoder_key)
        encoded = getattr(encoded, self.decoder.reads)
        inputs, prompt = shift_right(text), batch.get("prompt", 0)
        if train and options.scheduled_sampling:
            rates = options.scheduled_sampling * is_learned(inputs, prompt + 1)
            inputs = sampled_inputs(decoder, encoded, inputs, rates, words_key)
        key = decoder_key if train else None
        states, attention = decoder.states(encoded, inputs, key=key)

        learned = is_learned(text, prompt)
        shares, weight = token_shares(learned, batch.get("mask"), options.average)
        nll, right = self.judged(states, text, options.label_smoothing if train else 0.0)
        loss = jnp.sum(nll * shares) / jnp.maximum(weight, 1)
        metrics = {
            "loss_weight": weight,
            "token_accuracy": jnp.sum(right * shares) / jnp.maximum(weight, 1),
        }
        if attention is not None:
            uneven = unevenness(attention, learned, options.penalty_scale)
            penalty = jnp.sum(uneven * jnp.sum(shares, axis=1)) / jnp.maximum(weight, 1)
            metrics["penalty"] = penalty
            if train:
                loss = loss + options.penalty * penalty
        return loss, metrics

    def image_features(self, images: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] -> what the decoder reads, [B, D] or [B, N, D]."""
        return getattr(self.encode(images), self.decoder.reads)

    def attend(self, images: jax.Array, text: jax.Array) -> jax.Array:
        """How much was seen of each part of the image for each token of its caption.

        Args:
          images: uint8 [B, H, W, 3].
          text: int32 [B, T]; what is seen for padding means nothing.

        Returns:
          float32 [B, T, N], of which every [N] sums to 1: the encoder's tokens, or the parts of
          `learner.grid`, row by row.

        Raises:
          UserError: the decoder has no attention.
        """
        if not self.decoder.attends:
            raise UserError(
                f"learner.decoder: a decoder {self.options.decoder!r} has no attention to look at; "
                "take a run with decoder=attention."
            )
        return self.decoder(self.image_features(images), shift_right(text))[1]

    def init_decoding(self, images: jax.Array, beams: int = 1) -> recurrent.Cache:
        """uint8 images [B, H, W, 3] -> the cache that `decoding` carries along."""
        return self.decoder.begin(self.image_features(images), beams)

    def decode_step(
        self, tokens: jax.Array, position: jax.Array, cache: recurrent.Cache
    ) -> tuple[jax.Array, recurrent.Cache]:
        """Logits [B * beams, V] of what follows `tokens` int32 [B * beams]; cache."""
        return self.decoder.step(tokens, cache)


def token_shares(
    learned: jax.Array, mask: jax.Array | None, average: str
) -> tuple[jax.Array, jax.Array]:
    """What each token counts in a loss, and what all of them count together.

    Args:
      learned: bool [B, T], which tokens are predicted.
      mask: bool [B], which examples count; None: all.
      average: "token": every token 1; "example": those of a caption 1 together.

    Returns:
      float32 [B, T], and their sum.
    """
    shares = learned.astype(jnp.float32)
    if mask is not None:
        shares = shares * mask[:, None]
    if average == "example":
        shares = shares / jnp.maximum(jnp.sum(shares, axis=1, keepdims=True), 1)
    return shares, jnp.sum(shares)


def unevenness(weights: jax.Array, learned: jax.Array, scale: str) -> jax.Array:
    """The doubly stochastic penalty of each caption, [B]; see `Recurrent.Options.penalty`.

    Args:
      weights: attention [B, T, N].
      learned: bool [B, T], which tokens are predicted.
      scale: "mean" or "sum", over parts of the image.
    """
    seen = jnp.sum(weights * learned[..., None], axis=1)
    over_parts = jnp.mean if scale == "mean" else jnp.sum
    return over_parts((1 - seen) ** 2, axis=-1)


def sampled_inputs(
    decoder: recurrent.Decoder,
    encoded: jax.Array,
    inputs: jax.Array,
    rates: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """What is read where some words are the decoder's own, [B, T], of inputs int32 [B, T].

    Each word but the first is, with its probability of `rates` [B, T], drawn from what the decoder
    predicts after the words before it as they are read here. It does so without dropout, and
    nothing is learned from the choice.
    """
    own, shared = decoder.begin(encoded)

    def read(carry, now):
        own, drawn = carry
        word, rate, key = now
        coin_key, draw_key = jax.random.split(key)
        word = jnp.where(jax.random.bernoulli(coin_key, rate), drawn, word)
        logits, (own, _) = decoder.step(word, (own, shared))
        drawn = jax.random.categorical(draw_key, logits).astype(word.dtype)
        return (jax.lax.stop_gradient(own), drawn), word

    carry = (jax.lax.stop_gradient(own), inputs[:, 0])
    keys = jax.random.split(key, inputs.shape[1])
    return jax.lax.scan(read, carry, (inputs.T, rates.T, keys))[1].T
