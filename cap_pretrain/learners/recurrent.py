"""Recurrent captioners: an encoder with an LSTM, GRU, attention or merge decoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.distributed.sharding import gathered
from cap_pretrain.errors import UserError
from cap_pretrain.learners.captioner import Captioner, shift_right
from cap_pretrain.learners.token_losses import is_target, token_weights, weighted_loss
from cap_pretrain.models import recurrent, tokens
from cap_pretrain.models.build import build_encoder, compute, kept_tokens
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.naflex import SQUARE


class Recurrent(Captioner):
    """A captioner with a recurrent decoder, which predicts the caption word by word.

    The padding token serves as `<start>`; a caption ends with EOS. A decoder with attention reads
    the encoder's tokens, every other decoder reads the pooled vector.

    Args:
        encoder: image encoder.
        decoder: recurrent decoder.
        options: see `Options`.
    """

    keeps_tokens_at = (tokens.ENCODER,)
    layouts = (SQUARE,)
    joins = False  # its penalty is not a function of `rows`
    decoder: recurrent.Decoder  # type: ignore[assignment]  # replaces the transformer decoder
    options: Any  # `Recurrent.Options`, which are not those of a `Captioner`

    @dataclasses.dataclass(frozen=True)
    class Options(recurrent.Options):
        """Settings of `config.learner`, besides those of the decoder (`models.recurrent.Options`).

        Attributes:
            penalty: Weight of the doubly stochastic penalty (Xu et al. 2015, 1502.03044, equation
                14), which encourages the attention weights of each image part to sum to 1 over
                the words of a caption. It is (1 - sum of weights over the words)^2 per part,
                averaged over captions like the loss, and is added to the loss in training only.
            penalty_scale: "mean" over the parts of the image, or their "sum" as in the paper.
            label_smoothing: Probability mass spread evenly over the vocabulary.
            scheduled_sampling: Probability, in training, that the decoder reads a word drawn from
                its own prediction instead of the word of the caption (Bengio et al. 2015,
                1506.03099). In the paper it grows from 0. Here it is constant, because a loss
                does not know the training step.
            average: "token" averages over all tokens of the batch, as the sources do. "example"
                averages over the tokens of each caption, then over captions.
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
                    f"learner.penalty: {self.penalty} is invalid for decoder={self.decoder!r}; it "
                    "must not be negative, and 0 without decoder=attention."
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

    def __init__(self, encoder: ImageEncoder, decoder: recurrent.Decoder, *, options: Options):
        self.encoder = encoder
        self.decoder = decoder
        self.options = options

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Recurrent":
        """Build the learner that `config` describes."""
        options = learners.options(config)
        if options.grid and kept_tokens(config, tokens.ENCODER) < 1:
            raise UserError(
                f"learner.grid: {options.grid} needs all tokens of an image, but model.keep_tokens "
                f"is {config.model.keep_tokens}; set one of them to its default."
            )
        encoder = build_encoder(config, rngs)
        decoder = recurrent.DECODERS[options.decoder](
            options,
            vocab_size=vocab_size,
            width=encoder.width,
            compute=compute(config),
            rngs=rngs,
        )
        return cls(encoder, decoder, options=options)

    def states(  # type: ignore[override]  # there is no parallel prediction
        self, encoded: jax.Array, text: jax.Array
    ) -> jax.Array:
        """Return the final hidden states [B * C, T, H] for text int32 [B * C, T]."""
        decoder: Any = gathered(self.decoder)
        return decoder.states(encoded, shift_right(text))[0]

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Compute the cross-entropy of the captions, see `Captioner.loss`, and the penalty."""
        text, options = batch["text"], self.options
        decoder: Any = gathered(self.decoder)
        encoder_key, words_key, decoder_key = jax.random.split(key, 3)
        output = self.encode(batch["image"], train=train, key=encoder_key)
        encoded = getattr(output, self.decoder.reads)
        inputs, prompt = shift_right(text), batch.get("prompt", 0)
        if train and options.scheduled_sampling:
            rates = options.scheduled_sampling * is_target(inputs, prompt + 1)
            inputs = sampled_inputs(decoder, encoded, inputs, rates, words_key)
        dropout_key = decoder_key if train else None
        states, attention = decoder.states(encoded, inputs, key=dropout_key)

        targets = is_target(text, prompt)
        weights = token_weights(targets, batch.get("mask"), options.average)
        total = jnp.sum(weights)
        smoothing = options.label_smoothing if train else 0.0
        nll, correct = self.token_losses(states, text, smoothing)
        loss, metrics = weighted_loss(nll, correct, weights, total)
        if attention is not None:
            uneven = attention_penalty(attention, targets, options.penalty_scale)
            penalty = jnp.sum(uneven * jnp.sum(weights, axis=1)) / jnp.maximum(total, 1)
            metrics["penalty"] = penalty
            if train:
                loss = loss + options.penalty * penalty
        return loss, metrics

    def image_features(self, images: jax.Array) -> jax.Array:
        """Encode uint8 images [B, H, W, 3] as the decoder reads them, [B, D] or [B, N, D]."""
        return getattr(self.encode(images), self.decoder.reads)

    def attend(  # type: ignore[override]  # there is one attention, not one per layer
        self, images: jax.Array, text: jax.Array
    ) -> jax.Array:
        """Return the attention weights of each caption token over the parts of the image.

        Args:
            images: uint8 [B, H, W, 3].
            text: int32 [B, T]. Weights at padding are meaningless.

        Returns:
            float32 [B, T, N]; each row [N] sums to 1. The parts are the encoder's tokens, or the
            cells of `learner.grid` in row-major order.

        Raises:
            UserError: The decoder has no attention.
        """
        if not self.decoder.attends:
            raise UserError(
                f"learner.decoder: decoder={self.options.decoder!r} has no attention; use a run "
                "with decoder=attention."
            )
        weights = self.decoder(self.image_features(images), shift_right(text))[1]
        assert weights is not None  # because of `attends`
        return weights

    def init_decoding(self, images: jax.Array, beams: int = 1) -> recurrent.Cache:
        """Encode uint8 images [B, H, W, 3] and return the cache of `models.decoding`."""
        return self.decoder.begin(self.image_features(images), beams)

    def decode_step(
        self,
        tokens: jax.Array,
        position: jax.Array,  # noqa: ARG002  # part of the decoding interface; the state has it
        cache: recurrent.Cache,
    ) -> tuple[jax.Array, recurrent.Cache]:
        """Read tokens int32 [B * beams]; return the next logits [B * beams, V] and the cache."""
        return self.decoder.step(tokens, cache)


def attention_penalty(attention: jax.Array, targets: jax.Array, scale: str) -> jax.Array:
    """Return the doubly stochastic penalty of each caption, [B]; see `Recurrent.Options.penalty`.

    Args:
        attention: Attention weights [B, T, N].
        targets: bool [B, T], the predicted tokens.
        scale: "mean" or "sum" over the parts of the image.
    """
    per_part = jnp.sum(attention * targets[..., None], axis=1)
    over_parts = jnp.mean if scale == "mean" else jnp.sum
    return over_parts((1 - per_part) ** 2, axis=-1)


def sampled_inputs(
    decoder: recurrent.Decoder,
    encoded: jax.Array,
    inputs: jax.Array,
    rates: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Replace some input words by words that the decoder draws (scheduled sampling).

    A replaced word is drawn from the prediction after the inputs before it, themselves possibly
    replaced. This prediction has no dropout, and no gradient flows through it.

    Args:
        decoder: Recurrent decoder.
        encoded: What the decoder reads of the images.
        inputs: int32 [B, T]; the first word is kept.
        rates: Probability of replacing each word, [B, T].
        key: Random key.

    Returns:
        int32 [B, T].
    """
    state, shared = decoder.begin(encoded)

    def read(carry, now):
        state, drawn = carry
        word, rate, key = now
        coin_key, draw_key = jax.random.split(key)
        word = jnp.where(jax.random.bernoulli(coin_key, rate), drawn, word)
        logits, (state, _) = decoder.step(word, (state, shared))
        drawn = jax.random.categorical(draw_key, logits).astype(word.dtype)
        return (jax.lax.stop_gradient(state), drawn), word

    carry = (jax.lax.stop_gradient(state), inputs[:, 0])
    keys = jax.random.split(key, inputs.shape[1])
    return jax.lax.scan(read, carry, (inputs.T, rates.T, keys))[1].T
