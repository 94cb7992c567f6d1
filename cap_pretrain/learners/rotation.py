"""Learning an encoder by telling how far an image was turned.

Gidaris et al. 2018 (1803.07728): an image is turned by 0, 90, 180 or 270 degrees, and a linear
layer on the pooled vector tells by which. What is turned is a square that has been cropped and
mirrored before, so a turn moves pixels and makes none: no bars, no interpolation, nothing but the
content tells. Images must be cropped to that square, not squeezed into it (`data.crop`): a squeezed
image shows which of its sides was the longer one.
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
    """An encoder and a linear layer that tells 0, 90, 180 and 270 degrees apart."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
          copies: "four": each image is seen turned by each of the angles, so the encoder sees four
            times `batch_size`; "one": by one of them, at random. Evaluation always sees four.
        """

        copies: str = "four"

        def __post_init__(self):
            if self.copies not in COPIES:
                guess = did_you_mean(self.copies, COPIES)
                raise UserError(f"learner.copies: {self.copies!r} is unknown.{guess}")

    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        # The authors' code for ImageNet (config/ImageNet_RotNet_AlexNet.py): all but the decay of
        # the learning rate, which is x.1 after epochs 15, 30 and 45 there, and a cosine here.
        "reference": {
            "batch_size": 192,
            "total_epochs": 50.0,
            "data.crop": "random",
            "data.flip": True,
            "learner.copies": "four",
            "optim.name": "sgd",  # momentum .9, of Nesterov
            "optim.lr": 0.1,
            "optim.weight_decay": 5e-4,
        },
        # VISSL, config/pretrain/rotnet/rotnet_8gpu_resnet: all but the decay, which is x.1 after
        # epochs 30, 60, 90 and 100 there; its momentum is not Nesterov's, and it mirrors after
        # turning, which makes 90 degrees of 270.
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
        # A captioner on self-supervised features (recipe rotation_lstm): 100 epochs, batches of 32;
        # of its optimizer nothing is said, so that is the reference's.
        "seed000": {
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
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Rotation":
        return cls(build_encoder(config, rngs), options=learners.options(config), rngs=rngs)

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Mean cross-entropy over images and angles; masked examples do not count."""
        of_turns, of_encoder = jax.random.split(key)
        images = batch["image"]
        copies = TURNS if self.options.copies == "four" or not train else 1
        if copies == TURNS:
            turns = jnp.tile(jnp.arange(TURNS), len(images))
            images = jnp.repeat(images, TURNS, axis=0)
        else:
            draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, TURNS))
            turns = draw(keys(of_turns, len(images)))
        images = constrain(jax.vmap(turned)(images, turns))
        found = self.encoder(normalize_images(images, jnp.float32), train=train, key=of_encoder)
        logits = self.head(found.pooled.astype(jnp.float32))
        counts = jnp.repeat(batch.get("mask", jnp.ones(len(batch["image"]), bool)), copies)
        loss, metrics = classification(logits, turns, counts)
        return loss, metrics | {"chance": jnp.float32(1 / TURNS)}


def turned(image: jax.Array, turns: jax.Array) -> jax.Array:
    """[S, S, 3] -> the same pixels, turned counter-clockwise by 90 degrees so many times, 0 to 3.

    It is put together of a quarter and a half, so that a batch of different turns is two choices.
    """
    image = jnp.where(turns % 2 == 1, jnp.rot90(image), image)
    return jnp.where(turns >= 2, image[::-1, ::-1], image)
