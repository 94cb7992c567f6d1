"""CoCa: captioning and contrast by one text transformer (Yu et al. 2022, 2205.01917)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners.captioner import Captioner, shift_right
from cap_pretrain.learners.matching import Matching, check_contrast, unit
from cap_pretrain.learners.token_losses import is_target
from cap_pretrain.models import tokens
from cap_pretrain.models.attention import causal
from cap_pretrain.models.build import (
    build_encoder,
    compute,
    decoder_size,
    encoder_width,
    kept_tokens,
)
from cap_pretrain.models.coca import ContrastiveDecoder, Pooler
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import EncoderOutput
from cap_pretrain.models.mlp import XAVIER


class CoCa(Matching, Captioner):  # type: ignore[misc]  # `compare` is that of `Matching`
    """An encoder and a text transformer that is the text tower of a contrast and a decoder.

    Evaluators that score texts use the contrast. The member "captions" is the captioner alone.

    Args:
        encoder: image encoder.
        decoder: text transformer.
        length: number of position embeddings, the longest text.
        options: see `Options`.
        keep: share of the encoder's tokens that the decoder reads in training.
    """

    decoder: ContrastiveDecoder
    options: Any  # `CoCa.Options`, which are not those of a `Captioner`

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`; the defaults are those of the paper.

        Attributes:
            caption_weight: Weight of the captioning loss (section 4.1).
            contrast_weight: Weight of the contrastive loss (section 4.1).
            contrast: "softmax", as in the paper, or "sigmoid" (SigLIP).
            queries: Number of vectors to which attentional pooling reduces the tokens that the
                decoder reads (section 3.2). 0 leaves the pooling out.
            label_smoothing: Probability mass spread evenly over the vocabulary.
            average: "example" averages over the tokens of each caption, then over captions.
                "token" averages over all tokens of the batch.
        """

        caption_weight: float = 2.0
        contrast_weight: float = 1.0
        contrast: str = "softmax"
        queries: int = 256
        label_smoothing: float = 0.0
        average: str = "example"

        def __post_init__(self):
            for field in ("caption_weight", "contrast_weight", "queries"):
                if getattr(self, field) < 0:
                    raise UserError(f"learner.{field}: {getattr(self, field)} is negative.")
            if not self.caption_weight + self.contrast_weight:
                raise UserError(
                    "learner.caption_weight: is 0, and so is contrast_weight; set one of them."
                )
            check_contrast(self.contrast)
            Captioner.Options(label_smoothing=self.label_smoothing, average=self.average)

    def __init__(
        self,
        encoder: ImageEncoder,
        decoder: ContrastiveDecoder,
        *,
        length: int,
        options: Options,
        keep: float = 1.0,
        rngs: nnx.Rngs,
    ):
        of_captions: Any = options
        super().__init__(encoder, decoder, length=length, options=of_captions, keep=keep, rngs=rngs)
        size, compute = decoder.size, decoder.compute
        self.image_pooling = Pooler(
            size, queries=1, context_width=encoder.width, compute=compute, rngs=rngs
        )
        kwargs: dict[str, Any] = dict(dtype=compute.dtype, kernel_init=XAVIER, rngs=rngs)
        self.image_projection = nnx.Linear(size.width, size.width, **kwargs)
        self.text_projection = nnx.Linear(size.width, size.width, **kwargs)
        self.init_scale(options.contrast)

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "CoCa":
        """Build the learner that `config` describes."""
        options = learners.options(config)
        decoder = ContrastiveDecoder(
            decoder_size(config),
            queries=options.queries,
            vocab_size=vocab_size,
            encoder_width=encoder_width(config),
            compute=compute(config),
            rngs=rngs,
        )
        return cls(
            build_encoder(config, rngs),
            decoder,
            length=config.text.length,
            options=options,
            keep=kept_tokens(config, tokens.DECODER),
            rngs=rngs,
        )

    @classmethod
    def members(cls, config: ConfigDict) -> list[learners.Member]:
        """Return what scores texts by their likelihood as captions."""
        return [learners.Member("captions", Captions, config)]

    @property
    def parts(self) -> dict[str, Any]:
        """The members by name."""
        return {"captions": Captions(self)}

    def embed_images(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Embed uint8 images [B, H, W, 3] as unit vectors float32 [B, D]."""
        return self._image_vectors(self.encode(images, train=train, key=key))

    def _image_vectors(self, encoded: EncoderOutput) -> jax.Array:
        return unit(self.image_projection(self.image_pooling(encoded.tokens)[:, 0]))

    def embed_text(
        self, text: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Embed text int32 [B, T] as unit vectors float32 [B, D].

        The last of the T tokens is not read. It is padding, or ends the text.
        """
        args = (shift_right(text), self.text_positions[: text.shape[1]], causal(text.shape[1]))
        return unit(self.text_projection(self.decoder.embed(*args, key=key if train else None)))

    def rows(
        self, encoded: EncoderOutput, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> dict[str, Any]:
        """Compute the rows of both losses by one pass of the text transformer.

        Args:
            encoded: The encoder's output.
            batch: "text" int32 [B, T]; optionally "prompt" int32 [B] (prompt lengths; prompts count
                in the contrast only) and "mask" bool [B] (False for padding examples).
            key: Random key for dropout.
            train: Whether to compute the training loss.

        Returns:
            `captions`, what `Captioner.reduce` reads, and `pairs`, what `Matching.contrast` reads.
        """
        text, decoder_key = batch["text"], jax.random.split(key, 3)[2]
        read = self.read_tokens(encoded.tokens, key) if train else encoded.tokens
        length = text.shape[1]
        states, embedded = self.decoder.both(
            shift_right(text),
            self.text_positions[:length],
            read,
            causal(length),
            key=decoder_key if train else None,
        )
        valid = batch.get("mask", jnp.ones(len(text), bool))
        targets = is_target(text, batch.get("prompt", 0))
        smoothing = self.options.label_smoothing if train else 0.0
        nll, correct = self.token_losses(states, text, smoothing)
        examples = valid.astype(jnp.float32) * jnp.any(targets, axis=1)
        return {
            "captions": {"nll": nll, "correct": correct, "targets": targets, "examples": examples},
            "pairs": {
                "images": self._image_vectors(encoded),
                "texts": unit(self.text_projection(embedded)),
                "valid": valid,
            },
        }

    def reduce(self, rows: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the weighted sum of both losses, and metrics; `rows` is of `rows`."""
        options = self.options
        caption, of_captions = Captioner.reduce(self, rows["captions"])
        contrast, metrics = Matching.contrast(self, rows["pairs"])
        metrics["token_accuracy"] = of_captions["token_accuracy"]
        metrics |= {"loss_caption": caption, "loss_contrast": contrast}
        loss = options.caption_weight * caption + options.contrast_weight * contrast
        return loss, metrics

    def embed(self, batch: dict[str, jax.Array], key: jax.Array, train: bool) -> dict[str, Any]:
        """Return what `rows` does, for images."""
        encoded = self.encode(batch["image"], train=train, key=self.encoder_key(key))
        return self.rows(encoded, batch, key, train)

    def contrast(self, embedded: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Return what `reduce` does."""
        return self.reduce(embedded)


class Captions(Captioner):
    """The captioner of a CoCa: scores texts by their likelihood, and shares all parameters.

    Args:
        learner: the CoCa.
    """

    def __init__(self, learner: CoCa):
        self.encoder, self.decoder = learner.encoder, learner.decoder
        self.text_positions = learner.text_positions
        self.options, self.keep = learner.options, learner.keep
