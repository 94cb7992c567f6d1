"""Teachers of self-supervised learning: moving averages of a student, without gradients.

A learner that has a `Teacher` predicts the outputs of the teacher, which sees more of an image. As
in DINO (Caron et al. 2021, 2104.14294), an output is a distribution over prototypes. The teacher's
is centered by a running mean, which keeps a few prototypes from taking all images, and sharpened by
a low temperature, which keeps all prototypes from becoming equal.

The teacher's weights are no parameters of the learner. They are among its other variables, like
BatchNorm statistics: they have no gradients and no optimizer state, and the training step stores
them in `TrainState.stats`. Each training step moves them once, toward the parameters before its
update; with gradient accumulation, too, because each part of a batch moves them equally.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners.parts import Part
from cap_pretrain.learners.token_losses import mean_where
from cap_pretrain.models import cpu
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.layers import EncoderOutput, normalize_images
from cap_pretrain.models.mlp import XAVIER
from cap_pretrain.models.vit import ViT


class Average(nnx.Variable):
    """An array that is averaged over training steps."""


class Head(nnx.Module):
    """Maps features to logits of prototypes: an MLP, and cosines with the prototypes.

    The MLP has three layers with GELU between them (2104.14294).

    Args:
        width: width of the features.
        options: sizes; see `Options`.
        dtype: dtype of the MLP's products.
    """

    def __init__(self, width: int, *, options: "Options", dtype: Any, rngs: nnx.Rngs):
        kwargs = dict(dtype=dtype, kernel_init=XAVIER, rngs=rngs)
        self.layer1 = cpu.Linear(width, options.hidden, **kwargs)
        self.layer2 = cpu.Linear(options.hidden, options.hidden, **kwargs)
        self.layer3 = cpu.Linear(options.hidden, options.bottleneck, **kwargs)
        self.prototypes = nnx.Linear(
            options.bottleneck, options.prototypes, use_bias=False, kernel_init=XAVIER, rngs=rngs
        )
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return cosines float32 [..., K] of features [..., D] with K prototypes."""
        for layer in (self.layer1, self.layer2):
            x = jax.nn.gelu(layer(x))
        x = _unit(self.layer3(x), axis=-1).astype(self.dtype)
        prototypes = _unit(self.prototypes.kernel[...], axis=0).astype(self.dtype)
        return jnp.matmul(x, prototypes, preferred_element_type=jnp.float32)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """Scale vectors along an axis to unit length, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + 1e-12)


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of `config.learner` that all learners with a teacher have.

    Attributes:
        momentum: Share of a teacher's weight that a step keeps; the rest comes from the student.
            It is fixed, because with one that grows to 1 the teacher would stop learning from the
            text (SILC, 2310.13355); 0.996 is what DINO begins with.
        prototypes: Number of prototypes. DINO and SILC have 65,536; in DINO's ablation, 4,096
            lose little.
        hidden: Width of the two hidden layers of the head (DINO: 2,048).
        bottleneck: Width of the vectors that are compared with the prototypes (DINO: 256).
        temperature: Divisor of the student's cosines (DINO: 0.1).
        teacher_temperature: Divisor of the teacher's centered cosines (DINO: 0.04).
        center_momentum: Share of the center that a step keeps (DINO: 0.9).
    """

    momentum: float = 0.996
    prototypes: int = 4096
    hidden: int = 2048
    bottleneck: int = 256
    temperature: float = 0.1
    teacher_temperature: float = 0.04
    center_momentum: float = 0.9

    def __post_init__(self):
        for name in ("momentum", "center_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"learner.{name}: {getattr(self, name)} is not in [0, 1].")
        for name in ("prototypes", "hidden", "bottleneck"):
            if getattr(self, name) < 1:
                raise UserError(f"learner.{name}: {getattr(self, name)} must be at least 1.")
        for name in ("temperature", "teacher_temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"learner.{name}: {getattr(self, name)} must be positive.")


class Teacher(nnx.Module):
    """Moving averages of an encoder and of a head, and the center of the head's outputs.

    The weights of a new teacher are placeholders. In its first training step it becomes a copy of
    the student. So a part of a joint learner that begins late in a run begins with the student of
    that time (SigLIP 2, 2502.14786, section 2.3).

    Args:
        encoder: the student's encoder.
        head: the student's head.
        options: see `Options`.
    """

    def __init__(self, encoder: ViT, head: Head, options: Options):
        self.encoder, self.head = averaged(encoder), averaged(head)
        self.begun = Average(jnp.float32(0))  # 1 after the first step
        self.center = Average(jnp.zeros(options.prototypes))
        self.options = options

    def follow(self, encoder: ViT, head: Head, *, train: bool) -> None:
        """Move toward the student. In evaluation, only become a copy of it before the first step.

        The whole change in evaluation belongs to that evaluation.
        """
        keep = jnp.where(self.begun[...] > 0, self.options.momentum if train else 1.0, 0.0)
        for average, module in ((self.encoder, encoder), (self.head, head)):
            new = jax.lax.stop_gradient(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
            state = nnx.state(average, Average)
            moved = jax.tree.map(
                lambda old, new: keep * old + (1 - keep) * new, nnx.to_pure_dict(state), new
            )
            nnx.replace_by_pure_dict(state, moved)
            nnx.update(average, state)
        if train:
            self.begun[...] = jnp.ones_like(self.begun[...])

    def targets(self, features: jax.Array, examples: jax.Array, *, train: bool) -> jax.Array:
        """Return the distributions that the student is to predict, and move the center.

        Args:
            features: The teacher's features [B, ..., D].
            examples: float32 [B], 1 for examples that count for the center.
            train: Whether to move the center.

        Returns:
            Probabilities float32 [B, ..., K], without a gradient.
        """
        cosines = jax.lax.stop_gradient(self.head(features))
        center = self.center[...]
        if train:
            counts = examples.reshape(-1, *(1,) * (cosines.ndim - 1))
            where = jnp.broadcast_to(counts, (*cosines.shape[:-1], 1))
            axes = tuple(range(cosines.ndim - 1))
            total = jnp.maximum(jnp.sum(where), 1)
            mean = jnp.sum(cosines * where, axis=axes) / total
            keep = self.options.center_momentum
            self.center[...] = keep * center + (1 - keep) * mean
        return jax.nn.softmax((cosines - center) / self.options.teacher_temperature)


def averaged(module: Any) -> Any:
    """Return a copy of a module whose parameters are replaced by `Average` variables."""
    copy = nnx.clone(module)
    for _, part in nnx.iter_modules(copy):
        for name, value in list(vars(part).items()):
            if isinstance(value, nnx.Param):
                setattr(part, name, Average(value[...]))
    return copy


class Taught(Part):
    """A part that predicts a teacher's distributions over prototypes.

    Args:
        encoder: image encoder, the student.
        options: see `Options`.
    """

    encoder: ViT
    options: Any
    reads = ("image",)
    reads_encoded = False  # it has passes of teacher and student
    keeps_tokens_at = None  # it drops no tokens, beside parts that may

    def __init__(self, encoder: ViT, *, options: Options, rngs: nnx.Rngs):
        self.encoder, self.options = encoder, options
        dtype = encoder.compute.dtype
        self.head = Head(encoder.width, options=options, dtype=dtype, rngs=rngs)
        self.teacher = Teacher(encoder, self.head, options)

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        vocab_size: int,  # noqa: ARG003  # every learner takes it
        rngs: nnx.Rngs,
    ) -> "Taught":
        """Build the learner that `config` describes."""
        encoder = build_encoder(config, rngs)
        if not isinstance(encoder, ViT):
            raise UserError(
                f"model.name: {config.learner.name} needs a ViT, but {config.model.name} is none; "
                "choose a ViT, such as S/16."
            )
        return cls(encoder, options=learners.options(config), rngs=rngs)

    def encode(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> EncoderOutput:
        """Encode uint8 images [B, H, W, 3]; `key` is for dropout in training."""
        images = normalize_images(images, self.encoder.compute.dtype)
        return self.encoder(images, train=train, key=key)

    def encoder_key(self, key: jax.Array) -> jax.Array:
        """Return the key of the encoder's pass, from the random key of the loss."""
        return jax.random.split(key, 3)[0]

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return the scalar loss of a batch and metrics; masked examples do not count."""
        return self.reduce(self.rows(None, batch, key, train))

    def rows(
        self,
        encoded: EncoderOutput | None,
        batch: dict[str, jax.Array],
        key: jax.Array,
        train: bool,
    ) -> dict[str, jax.Array]:
        """Compute the loss of each image, by a pass of the teacher and one of the student.

        Args:
            encoded: Not used.
            batch: "image" uint8 [B, H, W, 3]; optionally "mask" bool [B].
            key: Random key for what the student sees, and for dropout.
            train: Whether to train, which moves the teacher.

        Returns:
            Arrays float32 [B] of `loss`, of the `entropy` of the teacher's distributions, and of
            `examples` (1 if it counts); and the teacher's unit vectors of images, `vectors` [B, D].
        """
        raise NotImplementedError

    def taught(self, batch: dict[str, jax.Array], train: bool) -> tuple[EncoderOutput, jax.Array]:
        """Move the teacher; return what it says of whole images, and `examples` float32 [B]."""
        self.teacher.follow(self.encoder, self.head, train=train)
        images = batch["image"]
        seen = self.teacher.encoder(normalize_images(images, self.encoder.compute.dtype))
        examples = batch.get("mask", jnp.ones(len(images), bool)).astype(jnp.float32)
        return jax.lax.stop_gradient(seen), examples

    def reduce(self, rows: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the mean of the examples' losses, and metrics that show a collapse.

        `entropy` is that of the teacher's distributions: 0 if each has one prototype, and log K if
        all K prototypes are equal. `spread` is the standard deviation over images of the teacher's
        unit vectors, times the root of their width: 0 if all images look the same, at most 1.
        """
        examples, vectors = rows["examples"], rows["vectors"]
        total = jnp.sum(examples)
        weights = examples[:, None] / jnp.maximum(total, 1)
        mean = jnp.sum(vectors * weights, axis=0)
        loss = mean_where(rows["loss"], examples)
        return loss, {
            "loss_weight": total,
            "entropy": mean_where(rows["entropy"], examples),
            "spread": jnp.sqrt(jnp.sum((vectors - mean) ** 2 * weights)),
        }


def cross_entropy(targets: jax.Array, cosines: jax.Array, temperature: float) -> jax.Array:
    """Return the cross-entropy [...] of the student's cosines [..., K] with `targets` [..., K]."""
    return -jnp.sum(targets * jax.nn.log_softmax(cosines / temperature), axis=-1)


def entropy(targets: jax.Array) -> jax.Array:
    """Return the entropy [...] of distributions [..., K], in nats."""
    return -jnp.sum(jax.scipy.special.xlogy(targets, targets), axis=-1)


def unit(vectors: jax.Array) -> jax.Array:
    """Scale vectors [B, D] to unit length, in float32."""
    return _unit(vectors, axis=-1)
