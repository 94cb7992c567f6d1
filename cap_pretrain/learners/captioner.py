"""Cap and CapPa: pretraining an encoder by captioning (Tschannen et al. 2023, 2306.07915)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners.parts import Part
from cap_pretrain.learners.token_losses import (
    is_first_maximum,
    is_target,
    mean_where,
    token_loss,
    token_weights,
    weighted_loss,
)
from cap_pretrain.models import tokens
from cap_pretrain.models.attention import causal
from cap_pretrain.models.build import (
    build_encoder,
    compute,
    decoder_size,
    encoder_width,
    kept_tokens,
)
from cap_pretrain.models.chunks import in_chunks
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import EncoderOutput, normalize_images
from cap_pretrain.models.text import PAD, Cache, Decoder
from cap_pretrain.naflex import LAYOUTS


def shift_right(text: jax.Array, start: jax.Array | None = None) -> jax.Array:
    """Return the decoder inputs [B, T] for text int32 [B, T]: the previous token.

    The first one is padding, or `start`, int32 [B].
    """
    inputs = jnp.pad(text, ((0, 0), (1, 0)), constant_values=PAD)[:, :-1]
    return inputs if start is None else inputs.at[:, 0].set(start)


class Captioner(Part):
    """An encoder and a transformer decoder that predicts the caption from the encoder's tokens.

    With CapPa, each training example is predicted in parallel with probability
    `parallel_fraction`: every input is the mask token and there is no causal mask, so each token
    must be inferred from the image and its position. All other predictions, including all of
    evaluation, are autoregressive.

    A text may begin with a prompt, such as a question. The decoder always reads the prompt, also
    in parallel prediction. Prompt tokens do not count in losses, accuracies and likelihoods.

    Args:
        encoder: image encoder.
        decoder: transformer decoder.
        length: number of position embeddings, the longest text.
        options: see `Options`.
        keep: share of the patch tokens that the decoder reads in training; see `models.tokens`.
    """

    keeps_tokens_at: tuple[str, ...] = tokens.PLACES
    layouts: tuple[str, ...] = LAYOUTS

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
            parallel_fraction: Probability of parallel prediction. 0 is Cap, 0.75 the paper's CapPa.
            label_smoothing: Probability mass spread evenly over the vocabulary.
            average: "example" averages over the tokens of each caption, then over captions (as in
                the paper). "token" averages over all tokens of the batch.
        """

        parallel_fraction: float = 0.0
        label_smoothing: float = 0.0
        average: str = "example"

        def __post_init__(self):
            if not 0 <= self.parallel_fraction <= 1:
                raise UserError(
                    f"learner.parallel_fraction: {self.parallel_fraction} is not in [0, 1]."
                )
            if not 0 <= self.label_smoothing < 1:
                raise UserError(
                    f"learner.label_smoothing: {self.label_smoothing} is not in [0, 1)."
                )
            if self.average not in ("example", "token"):
                raise UserError(
                    f"learner.average: {self.average!r} is neither 'example' nor 'token'."
                )

    reads: tuple[str, ...] = ("image", "text", "prompt")

    def __init__(
        self,
        encoder: ImageEncoder,
        decoder: Decoder,
        *,
        length: int,
        options: Options,
        keep: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.encoder = encoder
        self.decoder = decoder
        width = decoder.size.width
        init = nnx.initializers.normal(width**-0.5)
        self.text_positions = nnx.Param(init(rngs.params(), (length, width)))
        self.options, self.keep = options, keep

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Captioner":
        """Build the learner that `config` describes."""
        decoder = Decoder(
            decoder_size(config),
            vocab_size=vocab_size,
            encoder_width=encoder_width(config),
            compute=compute(config),
            rngs=rngs,
        )
        return cls(
            build_encoder(config, rngs),
            decoder,
            length=config.text.length,
            options=learners.options(config),
            keep=kept_tokens(config, tokens.DECODER),
            rngs=rngs,
        )

    def encode(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> EncoderOutput:
        """Encode uint8 images [B, H, W, 3] or patches [B, N, W]; `key` is for dropout."""
        images = normalize_images(images, self.decoder.compute.dtype)
        return self.encoder(images, train=train, key=key)

    def read_tokens(self, encoded: jax.Array, key: jax.Array) -> jax.Array:
        """Return the tokens [B, K, D] that the decoder reads in training, of encoded [B, N, D].

        They are drawn with the random key of the loss; a class token is always read.
        """
        batch, total, _ = encoded.shape
        first = self.encoder.leading
        kept = tokens.draw(key, batch, total - first, self.keep, first)
        if kept is None:
            return encoded
        patches = tokens.take(encoded[:, first:], kept)
        return jnp.concatenate([encoded[:, :first], patches], axis=1) if first else patches

    def predict(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Return logits float32 [B * C, T, V] of every token; arguments as for `states`."""
        return self.decoder.to_logits(self.states(*args, **kwargs))

    def states(
        self,
        encoded: jax.Array,
        text: jax.Array,
        parallel: jax.Array | None = None,
        *,
        prompt: jax.Array | int = 0,
        start: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the final hidden states [B * C, T, D] from which each token is predicted.

        Args:
            encoded: Encoder tokens [B, N, D].
            text: Target tokens int32 [B * C, T]. The C texts of an image are adjacent rows.
            parallel: bool [B], which examples are predicted in parallel. None means none.
            prompt: int32 [B], prompt lengths. Prompt tokens are read in parallel prediction, too.
            start: int32 [B * C], what the decoder reads first. None is padding.
            key: Random key for dropout. None disables dropout.
        """
        inputs = shift_right(text, start)
        mask = causal(text.shape[1])
        if parallel is not None:
            # Inputs are shifted by one: position `prompt` reads the last prompt token.
            prompt = jnp.reshape(prompt, (-1, 1))
            read = (jnp.arange(text.shape[1]) <= prompt) & (prompt > 0)
            masked = parallel[:, None] & ~read
            inputs = jnp.where(masked, self.decoder.vocab_size, inputs)
            mask = mask | parallel[:, None, None, None]
        positions = self.text_positions[: text.shape[1]]
        return self.decoder.states(inputs, positions, encoded, mask, key=key)

    def token_losses(
        self, states: jax.Array, text: jax.Array, smoothing: float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """Compute the loss of each token, and whether the prediction is correct.

        With `model.logit_chunks`, the logits are computed for one chunk of positions at a time,
        and recomputed in the backward pass.

        Args:
            states: Final hidden states [B, T, D].
            text: Target tokens int32 [B, T].
            smoothing: Probability mass spread evenly over the vocabulary.

        Returns:
            Cross-entropy float32 [B, T], and bool [B, T], True where the target is the argmax.
        """
        graphdef, *parts = nnx.split(self.decoder, is_kernel_of_logits, ...)
        kernels, others = parts

        def loss_and_correct(kernels, states, text):
            logits = nnx.merge(graphdef, kernels, others).to_logits(states)
            losses = token_loss(logits, text, smoothing, self.decoder.compute.dtype)
            return losses, is_first_maximum(logits, text)

        return in_chunks(loss_and_correct, self.decoder.compute.logit_chunks, kernels, states, text)

    def encoder_key(self, key: jax.Array) -> jax.Array:
        """Return the key of the encoder's pass, from the random key of the loss."""
        return jax.random.split(key, 3)[1]

    def rows(
        self, encoded: EncoderOutput, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> dict[str, Any]:
        """Compute the cross-entropy of each token of the captions; see `Part.rows`.

        Prompts, padding and masked examples do not count.

        Args:
            encoded: The encoder's output.
            batch: "text" int32 [B, T]; optionally "prompt" int32 [B] (prompt lengths) and "mask"
                bool [B] (False for padding examples).
            key: Random key for parallel prediction and dropout.
            train: Whether to compute the training loss.

        Returns:
            `nll` float32 [B, T], `correct` and `targets` bool [B, T], `examples` float32 [B] (1 if
            it counts), and with parallel prediction `parallel` bool [B].
        """
        text, prompt = batch["text"], batch.get("prompt", 0)
        parallel_key, _, decoder_key = jax.random.split(key, 3)
        parallel = None
        if train and self.options.parallel_fraction:
            p = self.options.parallel_fraction
            parallel = jax.random.bernoulli(parallel_key, p, (len(text),))
        dropout_key = decoder_key if train else None
        read = self.read_tokens(encoded.tokens, key) if train else encoded.tokens
        states = self.states(read, text, parallel, prompt=prompt, key=dropout_key)

        targets = is_target(text, prompt)
        examples = batch.get("mask", jnp.ones(len(text), bool)).astype(jnp.float32)
        examples = examples * jnp.any(targets, axis=1)
        smoothing = self.options.label_smoothing if train else 0.0
        nll, correct = self.token_losses(states, text, smoothing)
        rows = {"nll": nll, "correct": correct, "targets": targets, "examples": examples}
        return rows if parallel is None else {**rows, "parallel": parallel}

    def reduce(self, rows: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the mean cross-entropy of the captions, and metrics; `rows` is of `rows`."""
        nll, targets, examples = (rows[k] for k in ("nll", "targets", "examples"))
        per_caption = token_weights(targets, examples, "example")
        if self.options.average == "token":
            weights = token_weights(targets, examples, "token")
            total = jnp.sum(weights)
        else:
            weights, total = per_caption, jnp.sum(examples)
        loss, metrics = weighted_loss(nll, rows["correct"], weights, total)

        if "parallel" in rows:
            parallel, per_example = rows["parallel"], jnp.sum(nll * per_caption, 1)
            metrics["parallel_share"] = jnp.mean(parallel.astype(jnp.float32))
            metrics["loss_parallel"] = mean_where(per_example, parallel * examples)
            metrics["loss_autoregressive"] = mean_where(per_example, ~parallel * examples)
        return loss, metrics

    def image_features(self, images: jax.Array) -> jax.Array:
        """Encode images, as for `encode`, as tokens [B, N, D] for `compare`."""
        return self.encode(images).tokens

    def text_features(self, text: jax.Array) -> jax.Array:
        """Return text int32 [..., T] unchanged, as `compare` reads it."""
        return text

    def compare(
        self, encoded: jax.Array, text: jax.Array, prompt: jax.Array | int = 0
    ) -> jax.Array:
        """Compute the log-likelihoods of texts as captions of encoded images.

        The likelihood is autoregressive and sums over the tokens of a text, including EOS and
        excluding padding and the prompt.

        Args:
            encoded: Result of `image_features`.
            text: int32 [C, T], the same texts for each image, or [B, C, T], its own texts.
            prompt: int32 [C] or [B, C], prompt lengths.

        Returns:
            float32 [B, C], in nats.
        """
        text = jnp.broadcast_to(text, (len(encoded), *text.shape[-2:]))
        flat = text.reshape(-1, text.shape[-1])
        nll = self.token_losses(self.states(encoded, flat), flat)[0].reshape(text.shape)
        return -jnp.sum(nll * is_target(text, prompt), axis=-1)

    def score(self, images: jax.Array, text: jax.Array) -> jax.Array:
        """Return log-likelihoods [B, C] of text int32 [B, C, T] for uint8 images [B, H, W, 3]."""
        return self.compare(self.image_features(images), self.text_features(text))

    def attend(self, images: jax.Array, text: jax.Array, layer: int | None = -1) -> jax.Array:
        """Return the cross-attention weights of each caption token over the encoder tokens.

        Args:
            images: uint8 [B, H, W, 3].
            text: int32 [B, T], read with teacher forcing. Weights at padding are meaningless.
            layer: Decoder layer; its heads are averaged. None averages over all layers, too. The
                default is the last layer, which separates objects best in trained models.

        Returns:
            float32 [B, T, N]; each row [N] sums to 1.

        Raises:
            UserError: There is no such layer.
        """
        depth, length = self.decoder.size.depth, text.shape[1]
        if layer is not None and not -depth <= layer < depth:
            raise UserError(
                f"attention: there is no layer {layer}; the decoder has layers 0 to {depth - 1}."
            )
        encoded, positions = self.encode(images).tokens, self.text_positions[:length]
        args = (shift_right(text), positions, encoded, causal(length))
        by_layer = jnp.mean(self.decoder.attention(*args), axis=2)
        return jnp.mean(by_layer, axis=0) if layer is None else by_layer[layer]

    def init_decoding(self, images: jax.Array, beams: int = 1) -> Cache:
        """Encode uint8 images [B, H, W, 3] and return the cache of `models.decoding`."""
        return self.decoder.init_cache(self.encode(images).tokens, len(self.text_positions), beams)

    def decode_step(
        self, tokens: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Read tokens int32 [B * beams]; return the next logits [B * beams, V] and the cache."""
        return self.decoder.step(tokens, position, self.text_positions[...], cache)


def is_kernel_of_logits(path: tuple[Any, ...], _: Any) -> bool:
    """Filter for `nnx.split` that selects the kernel of the output layer."""
    return path == ("logits", "kernel")
