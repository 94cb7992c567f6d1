"""Masked patch prediction: from an image with hidden patches, predicting what a teacher sees there.

Zhou et al. 2021 (iBOT, 2111.07832), beside text as in TIPS (Maninis et al. 2024, 2410.16512) and
SigLIP 2 (Tschannen et al. 2025, 2502.14786, section 2.3).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.learners import teacher
from cap_pretrain.learners.teacher import Taught, cross_entropy, entropy, unit
from cap_pretrain.models import tokens
from cap_pretrain.models.layers import EncoderOutput, normalize_images
from cap_pretrain.models.vit import Masks, ViT


class MaskedPatches(Taught):
    """An encoder that predicts the teacher's vectors of patches which it does not see.

    A learned token, which is no part of the encoder, replaces the embeddings of hidden patches.

    Args:
        encoder: image encoder, the student.
        options: see `Options`.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(teacher.Options):
        """Settings of `config.learner`, besides those of `teacher.Options`.

        Attributes:
            share: Share of the patches that are hidden (SigLIP 2: 0.5). All sets of this size are
                equally likely.
        """

        share: float = 0.5

        def __post_init__(self):
            super().__post_init__()
            if not 0 < self.share <= 1:
                raise UserError(f"learner.share: {self.share} is not in (0, 1].")

    def __init__(self, encoder: ViT, *, options: Options, rngs: nnx.Rngs):
        super().__init__(encoder, options=options, rngs=rngs)
        # Rotary positions are not added to it, and the norm of a vector of zeros has a slope of
        # 1 / sqrt(epsilon). So it begins as learned positions do.
        token = jnp.zeros(encoder.width)
        if encoder.options.positions == "rotary":
            token = encoder.width**-0.5 * jax.random.normal(rngs.params(), token.shape)
        self.mask_token = nnx.Param(token)

    def rows(
        self,
        encoded: EncoderOutput | None,  # noqa: ARG002  # of whole images, which the teacher sees
        batch: dict[str, jax.Array],
        key: jax.Array,
        train: bool,
    ) -> dict[str, jax.Array]:
        """Compute the loss of each image, its mean over hidden patches; see `Taught.rows`."""
        _, mask_key, dropout_key = jax.random.split(key, 3)
        images, first = batch["image"], self.encoder.leading
        seen, examples = self.taught(batch, train)
        count = seen.tokens.shape[1] - first
        hidden = self.hidden(mask_key, len(images), count)
        is_hidden = jnp.any(hidden[..., None] == jnp.arange(count), axis=1)
        masks = Masks(hidden=is_hidden, token=self.mask_token[...])
        pixels = normalize_images(images, self.encoder.compute.dtype)
        student = self.encoder.masked(pixels, masks, train=train, key=dropout_key)

        wanted, found = (tokens.take(x.tokens[:, first:], hidden) for x in (seen, student))
        targets = self.teacher.targets(wanted, examples, train=train)
        losses = cross_entropy(targets, self.head(found), self.options.temperature)
        return {
            "loss": jnp.mean(losses, axis=1),
            "entropy": jnp.mean(entropy(targets), axis=1),
            "vectors": unit(seen.pooled),
            "examples": examples,
        }

    def hidden(self, key: jax.Array, batch: int, patches: int) -> jax.Array:
        """Draw the hidden patches of each image, int32 [batch, K]; see `tokens.draw`."""
        drawn = tokens.draw(key, batch, patches, self.options.share)
        everything = jnp.broadcast_to(jnp.arange(patches), (batch, patches))
        return everything if drawn is None else drawn
