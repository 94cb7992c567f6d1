"""AIMv2: pretraining an encoder by predicting the next patch and the caption.

Fini et al. 2024 (2411.14402). The encoder has prefix attention (AIM, El-Nouby et al.
2024, 2401.08541): the first patches attend to each other, all others to the past only. A causal
decoder reads its tokens and then the caption; it predicts the pixels of the next patch, and the
next token.
The encoder's blocks are set by `config.model`, whose default is not the paper's SwiGLU and RMSNorm.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.data import resolution
from cap_pretrain.errors import UserError
from cap_pretrain.learners.captioner import Captioner, shift_right
from cap_pretrain.learners.token_losses import (
    is_target,
    mean_where,
    token_weights,
    weighted_loss,
)
from cap_pretrain.models.attention import causal
from cap_pretrain.models.build import build_encoder, compute, decoder_size
from cap_pretrain.models.layers import EncoderOutput, normalize_images
from cap_pretrain.models.multimodal import MultimodalDecoder
from cap_pretrain.models.vit import Masks, ViT
from cap_pretrain.naflex import SQUARE

# Added to the variance of a patch (He et al. 2022, 2111.06377, in their code).
PATCH_EPS = 1e-6


class AIM(Captioner):
    """A ViT and a causal decoder over its tokens and the caption.

    Captions are written and scored as by any captioner; the encoder then sees the whole image at
    once, as it does when it is evaluated.

    Args:
        encoder: image encoder.
        decoder: multimodal decoder.
        length: number of position embeddings, the longest text.
        options: see `Options`.
    """

    encoder: ViT
    decoder: MultimodalDecoder
    options: Any  # `AIM.Options`, which are not those of a `Captioner`
    reads_encoded = False  # without a causal mask, a token has seen the patches after it
    keeps_tokens_at = ()  # each patch has a loss
    layouts = (SQUARE,)

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
            image_weight: Weight of the loss of patches beside that of captions: alpha, whose best
                value in the paper's ablation is 0.4.
            label_smoothing: Probability mass spread evenly over the vocabulary.
        """

        image_weight: float = 0.4
        label_smoothing: float = 0.0

        def __post_init__(self):
            if self.image_weight < 0:
                raise UserError(f"learner.image_weight: {self.image_weight} must not be negative.")
            if not 0 <= self.label_smoothing < 1:
                raise UserError(
                    f"learner.label_smoothing: {self.label_smoothing} is not in [0, 1)."
                )

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "AIM":
        """Build the learner that `config` describes."""
        encoder = build_encoder(config, rngs)
        if not isinstance(encoder, ViT):
            raise UserError(
                f"model.name: aimv2 predicts the patches of a ViT, but {config.model.name} is "
                "none; choose a ViT, such as S/16."
            )
        sizes = [(resolution.FIELD, side) for side, _ in resolution.first_sizes(config)]
        for field, side in [*sizes, ("data.image_size", config.data.image_size)]:
            if side < 2 * encoder.patch:
                raise UserError(
                    f"{field}: aimv2 predicts patches from earlier ones, but an image of {side} "
                    f"pixels has one patch of {encoder.patch}; choose a larger one."
                )
        if config.model.colours != "rgb":
            raise UserError(
                "model.colours: aimv2 predicts colors, which the encoder does not see with "
                f"{config.model.colours!r}; set it to 'rgb'."
            )
        decoder = MultimodalDecoder(
            decoder_size(config),
            vocab_size=vocab_size,
            encoder_width=encoder.width,
            patch_values=3 * encoder.patch**2,
            compute=compute(config),
            rngs=rngs,
        )
        options = learners.options(config)
        return cls(encoder, decoder, length=config.text.length, options=options, rngs=rngs)

    def rows(
        self,
        encoded: EncoderOutput | None,  # noqa: ARG002  # it has seen the patches to predict
        batch: dict[str, jax.Array],
        key: jax.Array,
        train: bool,
    ) -> dict[str, jax.Array]:
        """Encode images with prefix attention and compute the losses of patches and tokens.

        In training, the length of each image's prefix is uniform from 1 to all patches but one
        (2401.08541). In evaluation it is half of the patches.

        Args:
            encoded: Not used.
            batch: "image" uint8 [B, H, W, 3] and "text" int32 [B, T]; optionally "prompt" int32 [B]
                (prompt lengths) and "mask" bool [B].
            key: Random key for prefixes and dropout.
            train: Whether to compute the training loss.

        Returns:
            `image` float32 [B], the loss of the patches; `nll` float32 [B, T], `correct` and
            `targets` bool [B, T]; and `examples` float32 [B] (1 if it counts).
        """
        images, text = batch["image"], batch["text"]
        prefix_key, encoder_key, decoder_key = jax.random.split(key, 3)
        patches = normalized_patches(self.encoder.patchify(normalize_images(images, jnp.float32)))
        count = patches.shape[1]
        prefix = jnp.full(len(images), count // 2)
        if train:
            prefix = jax.random.randint(prefix_key, (len(images),), 1, count)
        seen = self.encode_with_prefix(images, prefix, train=train, key=encoder_key)
        image, states = self.decoder.both(
            shift_right(text),
            self.text_positions[: text.shape[1]],
            seen,
            causal(text.shape[1]),
            key=decoder_key if train else None,
        )
        before = image[:, -count:-1]  # the states from which all patches but the first follow
        errors = jnp.mean((self.decoder.to_pixels(before) - patches[:, 1:]) ** 2, axis=-1)
        predicted = (jnp.arange(1, count) >= prefix[:, None]).astype(jnp.float32)
        targets = is_target(text, batch.get("prompt", 0))
        examples = batch.get("mask", jnp.ones(len(text), bool)).astype(jnp.float32)
        smoothing = self.options.label_smoothing if train else 0.0
        nll, correct = self.token_losses(states, text, smoothing)
        return {
            "image": jnp.sum(errors * predicted, axis=1) / jnp.sum(predicted, axis=1),
            "nll": nll,
            "correct": correct,
            "targets": targets,
            "examples": examples * jnp.any(targets, axis=1),
        }

    def reduce(self, rows: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the weighted sum of both losses, and metrics; `rows` is of `rows`."""
        examples = rows["examples"]
        weights = token_weights(rows["targets"], examples, "example")
        caption, metrics = weighted_loss(rows["nll"], rows["correct"], weights, jnp.sum(examples))
        image = mean_where(rows["image"], examples)
        metrics |= {"loss_caption": caption, "loss_image": image}
        return caption + self.options.image_weight * image, metrics

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return the scalar loss of a batch and metrics; masked examples do not count."""
        return self.reduce(self.rows(None, batch, key, train))

    def encode_with_prefix(
        self,
        images: jax.Array,
        prefix: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the tokens [B, N, D] of uint8 images [B, H, W, 3] under prefix attention.

        A token attends to the past and to the first `prefix` (int32 [B]) patches of its image. A
        class token precedes the patches and counts as one more of the prefix.
        """
        pixels = normalize_images(images, self.decoder.compute.dtype)
        first = self.encoder.leading
        patches = (images.shape[1] // self.encoder.patch) * (images.shape[2] // self.encoder.patch)
        shared = jnp.arange(first + patches) < (prefix + first)[:, None]
        mask = causal(first + patches) | shared[:, None, None, :]
        return self.encoder.masked(pixels, Masks(attention=mask), train=train, key=key).tokens


def normalized_patches(patches: jax.Array) -> jax.Array:
    """Shift and scale each patch of [B, N, values] to mean 0 and variance 1.

    The variance is the unbiased estimate, as in the code of He et al. 2022 (2111.06377).
    """
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
    return (patches - mean) * jax.lax.rsqrt(variance + PATCH_EPS)
