"""CLIP and SigLIP: pretraining an encoder by matching images with their captions.

CLIP: Radford et al. 2021 (2103.00020), softmax over the batch in both directions. SigLIP: Zhai et
al. 2023 (2303.15343), a sigmoid for every pair. Both use the global batch, however it is sharded.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.learners.matching import Matching, check_contrast, unit
from cap_pretrain.learners.parts import Part
from cap_pretrain.models.build import build_encoder, build_pooling, compute, text_size
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import EncoderOutput, normalize_images
from cap_pretrain.models.mlp import ACTIVATIONS, XAVIER
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.text_tower import POOLS, TextOptions, TextTower
from cap_pretrain.models.vit import MapHead
from cap_pretrain.naflex import LAYOUTS

HEADS = ("linear", "none", "map")

TEXT_OPTIONS = ("activation", "norm_eps", "causal", "pool")
"""Options of the text tower that the learner has, with `text_` before their names."""


class DualEncoder(Matching, Part):
    """An image and a text tower, whose outputs are mapped to vectors of the same width.

    Args:
        encoder: image encoder.
        text_tower: text encoder.
        options: see `Options`.
        pooling: attention pooling of the encoder's tokens, for head="map"; otherwise None.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
            contrast: "softmax" (CLIP) or "sigmoid" (SigLIP).
            head: What becomes the vector of an image: "linear", a linear projection of the
                encoder's pooled vector to the width of the text tower; "none", the pooled vector as
                it is (LiT, Zhai et al. 2021, 2111.07991); "map", attention pooling of the encoder's
                tokens, as in SigLIP, apart from any pooling of the encoder. With the latter two,
                texts are projected to the width of the encoder.
            ring: For "sigmoid": whether to pass the texts around the devices instead of gathering
                them. A device with b examples then holds b texts and logits [b, b] instead of all
                B texts and logits [b, B]. The result is the same. It takes as many sequential
                messages as there are devices, so it pays off only if those arrays do not fit.
            embedding: With head="linear", width of the embeddings; 0 is that of the text tower.
            bias: Whether the linear projections have biases; CLIP's have none.
            text_width: Like the next three, overrides the text tower's size, which is that of the
                ViT (see `models.build.text_size`); 0 keeps it.
            text_depth: Number of layers.
            text_mlp: Hidden units of the MLPs.
            text_heads: Number of attention heads.
            text_activation: Of the text tower's MLPs, as `model.activation` is of the encoder's.
            text_norm_eps: Epsilon of the text tower's LayerNorms.
            text_causal: Whether positions attend only to themselves and earlier ones (CLIP).
            text_pool: The position that stands for the text: "last", or "eos" (CLIP).
        """

        contrast: str = "softmax"
        head: str = "linear"
        ring: bool = False
        embedding: int = 0
        bias: bool = True
        text_width: int = 0
        text_depth: int = 0
        text_mlp: int = 0
        text_heads: int = 0
        text_activation: str = TextOptions.activation
        text_norm_eps: float = TextOptions.norm_eps
        text_causal: bool = TextOptions.causal
        text_pool: str = TextOptions.pool

        def __post_init__(self):
            for name, known in (
                ("head", HEADS),
                ("text_activation", tuple(ACTIVATIONS)),
                ("text_pool", POOLS),
            ):
                value = getattr(self, name)
                if value not in known:
                    raise UserError(
                        f"learner.{name}: {value!r} is unknown.{did_you_mean(value, known)}"
                    )
            for name in ("embedding", *(f"text_{f.name}" for f in dataclasses.fields(Size))):
                if getattr(self, name) < 0:
                    raise UserError(f"learner.{name}: {getattr(self, name)} must not be negative.")
            if self.text_norm_eps <= 0:
                raise UserError(f"learner.text_norm_eps: {self.text_norm_eps} must be positive.")
            check_contrast(self.contrast)
            if self.ring and self.contrast != "sigmoid":
                raise UserError(
                    f"learner.ring: contrast={self.contrast!r} needs all texts of the batch at "
                    "once; use contrast='sigmoid' or ring=False."
                )

        def tower(self, size: Size) -> Size:
            """Return the text tower's size, given the one that these options override."""
            given = {f.name: getattr(self, f"text_{f.name}") for f in dataclasses.fields(Size)}
            size = dataclasses.replace(size, **{name: n for name, n in given.items() if n})
            if size.width % size.heads:
                raise UserError(
                    f"learner.text_heads: {size.heads} does not divide the width {size.width} of "
                    "the text tower; choose a divisor."
                )
            return size

        def text(self) -> TextOptions:
            """Return the options of the text tower."""
            return TextOptions(**{name: getattr(self, f"text_{name}") for name in TEXT_OPTIONS})

    reads = ("image", "text")
    layouts = LAYOUTS

    def __init__(
        self,
        encoder: ImageEncoder,
        text_tower: TextTower,
        *,
        options: Options,
        pooling: MapHead | None = None,
        rngs: nnx.Rngs,
    ):
        self.encoder = encoder
        self.text_tower = text_tower
        width, dtype = text_tower.size.width, text_tower.compute.dtype
        kwargs: dict[str, Any] = dict(use_bias=options.bias, dtype=dtype, kernel_init=XAVIER)
        common = options.embedding or width
        if options.head == "linear":
            self.image_projection = nnx.Linear(encoder.width, common, rngs=rngs, **kwargs)
        else:
            common = encoder.width
        if options.embedding not in (0, common):
            raise UserError(
                f"learner.embedding: is {options.embedding}, but with head={options.head!r} "
                f"embeddings have the width of the encoder, {common}; set it to 0."
            )
        if pooling:
            self.image_pooling = pooling
        self.text_projection = nnx.Linear(width, common, rngs=rngs, **kwargs)
        self.init_scale(options.contrast)
        self.options = options

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "DualEncoder":
        """Build the learner that `config` describes."""
        options = learners.options(config)
        tower = TextTower(
            options.tower(text_size(config)),
            vocab_size=vocab_size,
            length=config.text.length,
            options=options.text(),
            compute=compute(config),
            rngs=rngs,
        )
        encoder, pooling = build_encoder(config, rngs), None
        if options.head == "map":
            pooling = build_pooling(config, encoder.width, rngs)
        return cls(encoder, tower, options=options, pooling=pooling, rngs=rngs)

    def encode(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> EncoderOutput:
        """Encode uint8 images [B, H, W, 3] or patches [B, N, W]; `key` is for dropout."""
        images = normalize_images(images, self.text_tower.compute.dtype)
        return self.encoder(images, train=train, key=key)

    def embed_images(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Embed uint8 images [B, H, W, 3] as unit vectors float32 [B, D]."""
        return self._image_vectors(self.encode(images, train=train, key=key))

    def _image_vectors(self, encoded: EncoderOutput) -> jax.Array:
        """Return unit vectors float32 [B, D] from the output of the encoder."""
        if self.options.head == "map":
            return unit(self.image_pooling(encoded.tokens))
        if self.options.head == "none":
            return unit(encoded.pooled)
        return unit(self.image_projection(encoded.pooled))

    def embed_text(
        self, text: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Embed text int32 [B, T] as unit vectors float32 [B, D]."""
        return unit(self.text_projection(self.text_tower(text, train=train, key=key)))

    def encoder_key(self, key: jax.Array) -> jax.Array:
        """Return the key of the encoder's pass, from the random key of the loss."""
        return jax.random.split(key)[0]

    def rows(
        self, encoded: EncoderOutput, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """Return unit vectors `images` and `texts` [B, D], and `valid` bool [B] (the mask)."""
        images = self._image_vectors(encoded)
        texts = self.embed_text(batch["text"], train=train, key=jax.random.split(key)[1])
        valid = batch.get("mask", jnp.ones(len(images), bool))
        return {"images": images, "texts": texts, "valid": valid}

    def reduce(self, rows: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the contrastive loss and metrics; see `contrast`."""
        return self.contrast(rows)

    def embed(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """Return what `rows` does, for images."""
        encoded = self.encode(batch["image"], train=train, key=self.encoder_key(key))
        return self.rows(encoded, batch, key, train)
