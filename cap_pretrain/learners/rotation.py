"""Rotation prediction: pretraining an encoder by recognizing how an image was rotated.

Gidaris et al. 2018 (1803.07728): an image is rotated by 0, 90, 180 or 270 degrees, and a linear
layer on the pooled vector predicts the angle. The image is cropped to a square and flipped before
the rotation, so a rotation only moves pixels: there are no bars and no interpolation, and nothing
but the content reveals the angle. Images must be cropped to that square, not squeezed into it
(`data.crop`), because a squeezed image reveals which side was longer.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.learners.augment import keys
from cap_pretrain.learners.classifier import classification
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import constrain, normalize_images

TURNS = 4
COPIES = ("four", "one")


class Rotation(nnx.Module):
    """An encoder and a linear layer that predicts the rotation: 0, 90, 180 or 270 degrees.

    Args:
        encoder: image encoder.
        options: see `Options`.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
            copies: "four" uses each image at all four angles, so the encoder processes four times
                `batch_size` images. "one" draws one angle per image. Evaluation always uses four.
        """

        copies: str = "four"

        def __post_init__(self):
            if self.copies not in COPIES:
                guess = did_you_mean(self.copies, COPIES)
                raise UserError(f"learner.copies: {self.copies!r} is unknown.{guess}")

    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        # The authors' code for ImageNet (config/ImageNet_RotNet_AlexNet.py), except for the
        # learning-rate schedule: x.1 after epochs 15, 30 and 45 there, a cosine here.
        "reference": {
            "batch_size": 192,
            "total_epochs": 50.0,
            "data.crop": "random",
            "data.flip": True,
            "learner.copies": "four",
            "optim.name": "sgd",  # Nesterov momentum .9
            "optim.lr": 0.1,
            "optim.weight_decay": 5e-4,
        },
        # VISSL, config/pretrain/rotnet/rotnet_8gpu_resnet, except for the schedule: x.1 after
        # epochs 30, 60, 90 and 100 there. Its momentum is not Nesterov's, and it flips after the
        # rotation, which turns 90 degrees into 270.
        "vissl": {
            "batch_size": 256,
            "total_epochs": 105.0,
            "data.crop": "random",
            "data.flip": True,
            "learner.copies": "one",
            "optim.name": "sgd",
            "optim.lr": 0.1,
            "optim.lr_batch": 256,
            "optim.weight_decay": 1e-4,
        },
        # github.com/elhagry1/SSL_ImageCaptioning_RotationPrediction, a captioner on
        # self-supervised features (configs/recurrent.py: rotation_lstm): 100 epochs, batches of
        # 32. Its optimizer is not documented, so this is the reference's.
        "elhagry": {
            "batch_size": 32,
            "total_epochs": 100.0,
            "data.crop": "window",
            "data.flip": True,
            "learner.copies": "four",
            "optim.name": "sgd",
            "optim.lr": 0.1,
            "optim.lr_batch": 192,
            "optim.weight_decay": 5e-4,
        },
    }

    reads = ("image",)

    def __init__(self, encoder: ImageEncoder, *, options: Options, rngs: nnx.Rngs):
        self.encoder = encoder
        self.head = nnx.Linear(encoder.width, TURNS, rngs=rngs)
        self.options = options

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        vocab_size: int,  # noqa: ARG003  # every learner takes it
        rngs: nnx.Rngs,
    ) -> "Rotation":
        """Build the learner that `config` describes."""
        return cls(build_encoder(config, rngs), options=learners.options(config), rngs=rngs)

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Compute the mean cross-entropy over images and angles; masked examples do not count."""
        turns_key, encoder_key = jax.random.split(key)
        images = batch["image"]
        copies = TURNS if self.options.copies == "four" or not train else 1
        if copies == TURNS:
            turns = jnp.tile(jnp.arange(TURNS), len(images))
            images = jnp.repeat(images, TURNS, axis=0)
        else:
            draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, TURNS))
            turns = draw(keys(turns_key, len(images)))
        images = constrain(jax.vmap(rotate)(images, turns))
        output = self.encoder(normalize_images(images, jnp.float32), train=train, key=encoder_key)
        logits = self.head(output.pooled.astype(jnp.float32))
        counts = jnp.repeat(batch.get("mask", jnp.ones(len(batch["image"]), bool)), copies)
        loss, metrics = classification(logits, turns, counts)
        return loss, metrics | {"chance": jnp.float32(1 / TURNS)}

    @staticmethod
    def panel_names() -> tuple[str, ...]:
        """Return what `illustrate` shows."""
        return "rotated", "turned back as predicted"

    def illustrate(
        self,
        batch: dict[str, jax.Array],
        key: jax.Array,  # noqa: ARG002  # nothing is random
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Return images turned by one angle after the other and back, and which are right."""
        turns = jnp.arange(len(batch["image"])) % TURNS
        images = jax.vmap(rotate)(batch["image"], turns)
        output = self.encoder(normalize_images(images, jnp.float32))
        found = jnp.argmax(self.head(output.pooled.astype(jnp.float32)), axis=1)
        return (images, jax.vmap(rotate)(images, -found % TURNS)), found == turns


def rotate(image: jax.Array, turns: jax.Array) -> jax.Array:
    """Rotate image [S, S, 3] counterclockwise by `turns` (0 to 3) times 90 degrees.

    The rotation combines a quarter and a half turn, so a batch of mixed angles takes two selects.
    """
    image = jnp.where(turns % 2 == 1, jnp.rot90(image), image)
    return jnp.where(turns >= 2, image[::-1, ::-1], image)
