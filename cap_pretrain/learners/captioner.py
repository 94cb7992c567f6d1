"""Cap and CapPa: learning an encoder by captioning (Tschannen et al. 2023, arXiv 2306.07915)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.models.build import build_encoder, compute, decoder_size, encoder_width
from cap_pretrain.models.layers import in_chunks, normalize_images
from cap_pretrain.models.text import PAD, Cache, Decoder


def shift_right(text: jax.Array) -> jax.Array:
    """[B, T] -> [B, T]: what each position may have read last; the first reads padding."""
    return jnp.pad(text, ((0, 0), (1, 0)), constant_values=PAD)[:, :-1]


class Captioner(nnx.Module):
    """An encoder and a transformer decoder that predicts the caption from its tokens.

    With CapPa, each training example is, with probability `parallel_fraction`, predicted in
    parallel: every input is the mask token and there is no causal mask, so each token must come
    from the image and its position. Otherwise, and always in evaluation, it is autoregressive.

    Texts may begin with a prompt, such as a question, which is given: it is read, also where the
    rest is predicted in parallel, and is no part of any loss, accuracy or likelihood.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
          parallel_fraction: probability of parallel prediction; 0 is Cap, 0.75 the paper's CapPa.
          label_smoothing: mass spread evenly over the vocabulary.
          average: "example" averages over the tokens of each caption, then over captions (the
            recipe); "token" averages over all tokens of the batch.
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

    reads = ("image", "text", "prompt")

    def __init__(
        self,
        encoder: nnx.Module,
        decoder: Decoder,
        *,
        length: int,
        options: Options,
        rngs: nnx.Rngs,
    ):
        self.encoder = encoder
        self.decoder = decoder
        width = decoder.size.width
        init = nnx.initializers.normal(width**-0.5)
        self.text_positions = nnx.Param(init(rngs.params(), (length, width)))
        self.options = options

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Captioner":
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
            rngs=rngs,
        )

    def encode(self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        """uint8 images [B, H, W, 3] -> EncoderOutput."""
        images = normalize_images(images, self.decoder.compute.dtype)
        return self.encoder(images, train=train, key=key)

    def predict(self, *args, **kwargs) -> jax.Array:
        """Logits float32 [B * C, T, V] of every token of a text; arguments as for `states`."""
        return self.decoder.to_logits(self.states(*args, **kwargs))

    def states(
        self,
        encoded: jax.Array,
        text: jax.Array,
        parallel: jax.Array | None = None,
        *,
        prompt: jax.Array | int = 0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """What the logits of every token of `text` int32 [B * C, T] are made of, [B * C, T, D].

        Args:
          encoded: [B, N, D] tokens of the encoder.
          text: the tokens to be predicted, C texts for each image, side by side.
          parallel: bool [B], which examples are predicted in parallel (default: none).
          prompt: int32 [B], the leading tokens of each text that these read nevertheless.
          key: for dropout.
        """
        inputs = shift_right(text)
        mask = causal(text.shape[1])
        if parallel is not None:
            # Inputs are shifted: the last token of the prompt is read at its end.
            prompt = jnp.reshape(prompt, (-1, 1))
            read = (jnp.arange(text.shape[1]) <= prompt) & (prompt > 0)
            masked = parallel[:, None] & ~read
            inputs = jnp.where(masked, self.decoder.vocab_size, inputs)
            mask = mask | parallel[:, None, None, None]
        positions = self.text_positions[: text.shape[1]]
        return self.decoder.states(inputs, positions, encoded, mask, key=key)

    def judged(
        self, states: jax.Array, text: jax.Array, smoothing: float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of each token of `text` int32 [B, T], and whether it is the likeliest.

        With `model.logit_chunks` the logits are made for one part of the positions after the other,
        and again in the backward pass.

        Args:
          states: [B, T, D], what the logits are made of.
          text: the tokens to be predicted.
          smoothing: mass spread evenly over the vocabulary.

        Returns:
          float32 and bool [B, T].
        """
        graphdef, kernels, others = nnx.split(self.decoder, is_kernel_of_logits, ...)

        def judge(kernels, states, text):
            logits = nnx.merge(graphdef, kernels, others).to_logits(states)
            return token_loss(logits, text, smoothing), jnp.argmax(logits, -1) == text

        return in_chunks(judge, self.decoder.compute.logit_chunks, kernels, states, text)

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Cross-entropy of the captions; prompts, padding and masked examples do not count."""
        text, prompt = batch["text"], batch.get("prompt", 0)
        parallel_key, encoder_key, decoder_key = jax.random.split(key, 3)
        encoded = self.encode(batch["image"], train=train, key=encoder_key).tokens
        parallel = None
        if train and self.options.parallel_fraction:
            p = self.options.parallel_fraction
            parallel = jax.random.bernoulli(parallel_key, p, (len(text),))
        key = decoder_key if train else None
        states = self.states(encoded, text, parallel, prompt=prompt, key=key)

        learned = is_learned(text, prompt)
        weights = learned.astype(jnp.float32)
        examples = batch.get("mask", jnp.ones(len(text), bool)).astype(jnp.float32)
        examples = examples * jnp.any(learned, axis=1)
        weights = weights * examples[:, None]
        smoothing = self.options.label_smoothing if train else 0.0
        nll, right = self.judged(states, text, smoothing)
        by_token = self.options.average == "token"
        per_caption = weights / jnp.maximum(jnp.sum(weights, 1, keepdims=True), 1)
        shares = weights if by_token else per_caption  # what each token counts
        weight = jnp.sum(weights) if by_token else jnp.sum(examples)
        loss = jnp.sum(nll * shares) / jnp.maximum(weight, 1)

        metrics = {
            "loss_weight": weight,
            "token_accuracy": jnp.sum(right * shares) / jnp.maximum(weight, 1),
        }
        per_example = jnp.sum(nll * per_caption, 1)
        if parallel is not None:
            metrics["parallel_share"] = jnp.mean(parallel.astype(jnp.float32))
            metrics["loss_parallel"] = mean_where(per_example, parallel * examples)
            metrics["loss_autoregressive"] = mean_where(per_example, ~parallel * examples)
        return loss, metrics

    def image_features(self, images: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] -> what `compare` wants of them: the tokens [B, N, D]."""
        return self.encode(images).tokens

    def text_features(self, text: jax.Array) -> jax.Array:
        """text int32 [..., T] -> what `compare` wants of it: the text itself."""
        return text

    def compare(
        self, encoded: jax.Array, text: jax.Array, prompt: jax.Array | int = 0
    ) -> jax.Array:
        """Log-likelihoods [B, C] float32, in nats, of texts as captions of encoded images.

        Summed over the tokens of a text, EOS included, padding not; always autoregressive.

        Args:
          encoded: [B, N, D] tokens of the encoder.
          text: int32 [C, T], the same texts for each image, or [B, C, T], its own.
          prompt: int32 [C] or [B, C], how many leading tokens of each text are given.
        """
        text = jnp.broadcast_to(text, (len(encoded), *text.shape[-2:]))
        flat = text.reshape(-1, text.shape[-1])
        nll = self.judged(self.states(encoded, flat), flat)[0].reshape(text.shape)
        return -jnp.sum(nll * is_learned(text, prompt), axis=-1)

    def score(self, images: jax.Array, text: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3], text int32 [B, C, T] -> log-likelihoods [B, C]."""
        return self.compare(self.image_features(images), self.text_features(text))

    def attend(self, images: jax.Array, text: jax.Array, layer: int | None = -1) -> jax.Array:
        """How much is seen of each part of the image for each token of its caption.

        Args:
          images: uint8 [B, H, W, 3].
          text: int32 [B, T], read as in training; what is seen for padding means nothing.
          layer: of the decoder, whose heads are averaged; None averages over all layers, too. The
            last one is the default: in trained models, it tells objects apart best.

        Returns:
          float32 [B, T, N], of which every [N] sums to 1: the encoder's tokens.

        Raises:
          UserError: there is no such layer.
        """
        depth, length = self.decoder.size.depth, text.shape[1]
        if layer is not None and not -depth <= layer < depth:
            raise UserError(
                f"attention: there is no layer {layer}; the decoder has 0 to {depth - 1}."
            )
        encoded, positions = self.encode(images).tokens, self.text_positions[:length]
        args = (shift_right(text), positions, encoded, causal(length))
        by_layer = jnp.mean(self.decoder.attention(*args), axis=2)
        return jnp.mean(by_layer, axis=0) if layer is None else by_layer[layer]

    def init_decoding(self, images: jax.Array, beams: int = 1) -> Cache:
        """uint8 images [B, H, W, 3] -> the cache that `decoding` carries along."""
        return self.decoder.init_cache(self.encode(images).tokens, len(self.text_positions), beams)

    def decode_step(
        self, tokens: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Logits [B * beams, V] of what follows `tokens` int32 [B * beams] at `position`; cache."""
        return self.decoder.step(tokens, position, self.text_positions[...], cache)


def is_kernel_of_logits(path: tuple[Any, ...], _: Any) -> bool:
    """A filter of `nnx.split`: the matrix that makes logits of states."""
    return path == ("logits", "kernel")


def causal(length: int) -> jax.Array:
    """Which positions may look at which: bool [1, 1, T, T], each at itself and those before."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def is_learned(text: jax.Array, prompt: jax.Array | int = 0) -> jax.Array:
    """Which tokens of text [..., T] are predicted: neither padding nor of the prompt, [...]."""
    return (text != PAD) & (jnp.arange(text.shape[-1]) >= jnp.expand_dims(prompt, -1))


def token_loss(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy of each token, [B, T], with label smoothing."""
    # Picked by comparing, which joins the other loops over the vocabulary: indexing has a scatter
    # for its gradient, which fills an array as large as the logits and is not exact on GPUs.
    own = jnp.arange(logits.shape[-1]) == labels[..., None]
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(own, logits, 0.0), axis=-1)
    if not smoothing:
        return nll
    uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    return (1 - smoothing) * nll + smoothing * uniform


def mean_where(values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of `values` weighted by `where`; 0 where nothing is selected."""
    return jnp.sum(values * where) / jnp.maximum(jnp.sum(where), 1)
