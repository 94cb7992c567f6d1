"""Self-distillation: from small crops, predicting what a teacher sees in the whole image.

Caron et al. 2021 (DINO, 2104.14294), beside text as in SILC (Naeem et al. 2023, 2310.13355) and
SigLIP 2 (Tschannen et al. 2025, 2502.14786, section 2.3). Crops are neither mirrored nor recolored,
unlike in DINO, because captions name sides and colors.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.learners import augment, teacher
from cap_pretrain.learners.teacher import Taught, cross_entropy, entropy, unit
from cap_pretrain.models.layers import EncoderOutput, constrain
from cap_pretrain.models.vit import Masks, ViT

# Side of a local crop of an image of 224 pixels in DINO.
_DINO_CROP, _DINO_IMAGE = 96, 224


class Distillation(Taught):
    """An encoder that predicts, from crops of an image, the teacher's pooled vector of all of it.

    Args:
        encoder: image encoder, the student.
        options: see `Options`.

    Raises:
        UserError: The side of the crops is not a multiple of the patch size.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(teacher.Options):
        """Settings of `config.learner`, besides those of `teacher.Options`.

        Attributes:
            crops: Number of crops of an image, 8 in SILC and SigLIP 2.
            size: Side of the crops in pixels. 0 is 96 of 224 pixels of the image's side, as in
                DINO, rounded to whole patches.
            area_min: Smallest share of the image's area in a crop (SILC).
            area_max: Largest share.
        """

        crops: int = 8
        size: int = 0
        area_min: float = 0.05
        area_max: float = 0.4

        def __post_init__(self):
            super().__post_init__()
            if self.crops < 1:
                raise UserError(f"learner.crops: {self.crops} must be at least 1.")
            if self.size < 0:
                raise UserError(f"learner.size: {self.size} must not be negative.")
            if not 0 < self.area_min <= self.area_max <= 1:
                raise UserError(
                    f"learner.area_min: {self.area_min} and area_max {self.area_max} must be "
                    "shares of the image's area, the first not larger than the second."
                )

    def __init__(self, encoder: ViT, *, options: Options, rngs: nnx.Rngs):
        if options.size % encoder.patch:
            raise UserError(
                f"learner.size: {options.size} is not a multiple of the patch size {encoder.patch}."
            )
        super().__init__(encoder, options=options, rngs=rngs)

    def crops(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Return random crops; those of an image are adjacent rows.

        Args:
            images: uint8 [B, H, W, 3].
            key: Random key.

        Returns:
            float32 [B * crops, S, S, 3] in [-1, 1].
        """
        options, patch = self.options, self.encoder.patch
        patches = max(1, round(images.shape[1] * _DINO_CROP / _DINO_IMAGE / patch))
        size, area = options.size or patches * patch, (options.area_min, options.area_max)

        def several(key, image):
            def crop(key):
                return augment.random_resized_crop(key, image, size, area)

            return jax.vmap(crop)(jax.random.split(key, options.crops))

        crops = augment.each(several, key, augment.unit_range(images))
        return constrain(2 * crops.reshape(-1, *crops.shape[2:]) - 1)

    def rows(
        self,
        encoded: EncoderOutput | None,  # noqa: ARG002  # of whole images, which the teacher sees
        batch: dict[str, jax.Array],
        key: jax.Array,
        train: bool,
    ) -> dict[str, jax.Array]:
        """Compute the loss of each image, its mean over crops; see `Taught.rows`."""
        _, crop_key, dropout_key = jax.random.split(key, 3)
        images = batch["image"]
        seen, examples = self.taught(batch, train)
        targets = self.teacher.targets(seen.pooled, examples, train=train)
        crops = self.crops(images, crop_key).astype(self.encoder.compute.dtype)
        student = self.encoder.masked(crops, Masks(), train=train, key=dropout_key)
        cosines = self.head(student.pooled).reshape(len(images), self.options.crops, -1)
        losses = cross_entropy(targets[:, None], cosines, self.options.temperature)
        return {
            "loss": jnp.mean(losses, axis=1),
            "entropy": entropy(targets),
            "vectors": unit(seen.pooled),
            "examples": examples,
        }
