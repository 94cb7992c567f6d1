"""SimCLR: learning an encoder by telling which two views are of one image.

Chen et al. 2020 (2002.05709). Both views are augmented, each with draws of its own (section 2.1,
appendix A). All views of the global batch are compared, however it is sharded.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners import augment
from cap_pretrain.learners.classifier import classification
from cap_pretrain.learners.contrastive import Contrastive
from cap_pretrain.learners.dual_encoder import unit
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import constrain


class SimCLR(Contrastive):
    """An encoder and, on its pooled vector, an MLP of two layers that is dropped afterwards."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`; numbers not said otherwise are of the paper's appendix A.

        Attributes:
          temperature: what cosines are divided by; 0.1 in the paper's section 5 and in VISSL.
          hidden: width of the MLP between its layers; 0: the encoder's (2048 of a ResNet-50).
          outputs: width of what is compared (section 2.3).
          size: side of the views in pixels; 0: that of the images. Views are a part of the image,
            so images that are larger (`data.image_size`) keep details in them.
          colour: strength of the changes of colour; 0 leaves colours, and never makes them gray.
          blur: whether half of the views are blurred. The paper leaves it out for small images
            (appendix B.9).
        """

        temperature: float = 0.1
        hidden: int = 0
        outputs: int = 128
        size: int = 0
        colour: float = 1.0
        blur: bool = True

        def __post_init__(self):
            if self.temperature <= 0:
                raise UserError(f"learner.temperature: {self.temperature} must be positive.")
            if self.outputs < 1:
                raise UserError(f"learner.outputs: {self.outputs} must be at least 1.")
            for name in ("hidden", "size", "colour"):
                if getattr(self, name) < 0:
                    raise UserError(f"learner.{name}: {getattr(self, name)} must not be negative.")

    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        # The paper's default setting (section 2.3) and VISSL's, simclr/simclr_8node_resnet, whose
        # ResNet-50 reaches 64.4% on ImageNet. VISSL's also decays biases and BatchNorm and scales
        # their steps by the trust ratio, where the paper does neither; its warm-up begins at 0.6.
        "reference": {
            "batch_size": 4096,
            "total_epochs": 100.0,
            "optim.name": "lars",
            "optim.lr": 0.3,
            "optim.lr_batch": 256,
            "optim.weight_decay": 1e-6,
            "optim.decay": "cosine",
            "optim.warmup_epochs": 10.0,
        },
    }

    reads = ("image",)

    def __init__(self, encoder: ImageEncoder, *, options: Options, rngs: nnx.Rngs):
        """Raises UserError if views are no whole number of the encoder's patches."""
        patch = getattr(encoder, "patch", 1)
        if options.size % patch:
            raise UserError(
                f"learner.size: {options.size} is no multiple of the patch size {patch}."
            )
        self.encoder = encoder
        hidden = options.hidden or encoder.width
        self.hidden = nnx.Linear(encoder.width, hidden, rngs=rngs)
        self.projection = nnx.Linear(hidden, options.outputs, rngs=rngs)
        self.options = options

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "SimCLR":
        return cls(build_encoder(config, rngs), options=learners.options(config), rngs=rngs)

    def views(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] -> [2 B, S, S, 3] in [-1, 1], each image's views in a row."""

        def two(key, image):
            return jax.vmap(self._view, (0, None))(jax.random.split(key), image)

        views = augment.each(two, key, augment.unit_range(images))
        return constrain(2 * views.reshape(-1, *views.shape[2:]) - 1)

    def _view(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Appendix A: crop, flip, colours, gray, blur, in this order."""
        options = self.options
        of_crop, of_flip, of_colour, of_gray, of_blur = jax.random.split(key, 5)
        size = options.size or image.shape[0]
        image = augment.random_resized_crop(of_crop, image, size)
        image = augment.flip(of_flip, image)
        if options.colour:
            most = (0.8, 0.8, 0.8, 0.2)  # of brightness, contrast, saturation, hue
            amounts = (options.colour * amount for amount in most)
            image = augment.colour_jitter(of_colour, image, *amounts, probability=0.8)
            image = augment.grayscale(of_gray, image)
        if options.blur:
            image = augment.gaussian_blur(of_blur, image)
        return image

    def project(
        self, views: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Views [2 B, S, S, 3] in [-1, 1] -> unit vectors [2 B, D] float32."""
        pooled = self.encoder(views, train=train, key=key).pooled
        return unit(self.projection(nnx.relu(self.hidden(pooled.astype(jnp.float32)))))

    def embed(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """Unit `vectors` of two views of each image, [B, 2, D], and which are `valid`.

        Evaluation has views, too: drawn as in training, from a key that is always the same.
        """
        of_views, of_encoder = jax.random.split(key)
        views = self.views(batch["image"], of_views)
        vectors = self.project(views, train=train, key=of_encoder)
        count = len(batch["image"])
        valid = batch.get("mask", jnp.ones(count, bool))
        return {"vectors": vectors.reshape(count, 2, -1), "valid": valid}

    def contrast(self, embedded: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        """The normalised temperature-scaled cross-entropy (section 2.1), its mean over views.

        Views of masked examples are neither asked about nor to be chosen.

        Of the metrics, `accuracy` is the share of views to which, of all others, their partner is
        nearest.
        """
        vectors = embedded["vectors"].reshape(-1, embedded["vectors"].shape[-1])
        counts = jnp.repeat(embedded["valid"], 2)
        logits = constrain(choices(vectors, counts, self.options.temperature))
        loss, metrics = classification(logits, jnp.arange(len(vectors)) ^ 1, counts)
        return loss, metrics | {"chance": 1 / jnp.maximum(jnp.sum(counts) - 1, 1)}


def choices(vectors: jax.Array, counts: jax.Array, temperature: float) -> jax.Array:
    """Logits [N, N] of which view is each view's partner.

    They are cosines over the temperature; next to nothing for the view itself and for those that do
    not count.

    Args:
      vectors: [N, D] of length one.
      counts: bool [N].
      temperature: positive.
    """
    logits = jnp.matmul(vectors, vectors.T, precision="highest") / temperature
    return jnp.where(counts & ~jnp.eye(len(vectors), dtype=bool), logits, -1e9)
