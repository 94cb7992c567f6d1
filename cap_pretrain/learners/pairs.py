"""Losses that sum over pairs of images and texts of a batch sharded over devices.

`gathered` copies every text to every device. `around` does not: each device keeps its images, and
the texts travel around the devices. After as many turns as there are devices, each image has met
every text, and each device has held only one block of pairs at a time (Zhai et al. 2023,
2303.15343, section 3.3). The gradients of the texts travel with them, so loss and gradient take one
round trip.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from cap_pretrain.models.layers import constrain

AXES = ("data", "fsdp")

Shared = dict[str, jax.Array]
# (logits [b, c], own, counts) -> summed loss. `own` and `counts` are bool [b, c]: `own` marks pairs
# of the same example, and pairs outside `counts` are excluded.
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def similarities(images: jax.Array, texts: jax.Array, shared: Shared) -> jax.Array:
    """Return logits [B, C] of unit vectors [B, D] and [C, D], with `scale` and optional `bias`."""
    logits = shared["scale"] * jnp.matmul(images, texts.T, precision="highest")
    return logits + shared["bias"] if "bias" in shared else logits


def softmax_loss(logits: jax.Array, own: jax.Array, counts: jax.Array) -> jax.Array:
    """CLIP: the mean cross-entropy over the row and the column of each own pair, summed."""
    blocked = jnp.where(counts, logits, -1e9)
    rows, columns = (jax.nn.logsumexp(blocked, axis=axis) for axis in (1, 0))
    target = jnp.sum(jnp.where(own, blocked, 0), axis=1)
    return jnp.sum(((rows + columns) / 2 - target) * jnp.any(own & counts, axis=1))


def sigmoid_loss(logits: jax.Array, own: jax.Array, counts: jax.Array) -> jax.Array:
    """SigLIP: the binary cross-entropy of every pair, summed."""
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(own, logits, -logits)) * counts)


LOSSES: dict[str, Loss] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


class Compared(NamedTuple):
    """Result of comparing all pairs of a batch.

    Attributes:
        loss: Sum over the pairs.
        own: [B], the logit of each image with its own text.
        other_text: [B], the largest logit of each image with the text of another valid example.
        other_image: [B], the largest logit of each text with the image of another valid example.
    """

    loss: jax.Array
    own: jax.Array
    other_text: jax.Array
    other_image: jax.Array


def gathered(
    loss: Loss, images: jax.Array, texts: jax.Array, shared: Shared, valid: jax.Array
) -> Compared:
    """Compare all images with all texts; each device computes the rows of its own images.

    Args:
        loss: Loss of a block of pairs.
        images: Unit vectors [B, D], sharded over the batch axes of the mesh in use, if any.
        texts: Unit vectors [B, D], sharded likewise.
        shared: Scale and optional bias; see `similarities`.
        valid: bool [B], which examples count.
    """
    logits = constrain(similarities(constrain(images), constrain(texts), shared))
    own = constrain(jnp.eye(len(images), dtype=bool))
    summed = loss(logits, own, valid[:, None] & valid)
    return Compared(summed, *others(logits, own, valid, valid))


def others(
    logits: jax.Array, own: jax.Array, valid_images: jax.Array, valid_texts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `own`, `other_text` and `other_image` of a block; 0 and -inf where it has no pair."""
    logits = jax.lax.stop_gradient(logits)
    other_text = jnp.where(own | ~valid_texts, -jnp.inf, logits)
    other_image = jnp.where(own | ~valid_images[:, None], -jnp.inf, logits)
    own_logits = jnp.sum(jnp.where(own, logits, 0), axis=1)
    return own_logits, jnp.max(other_text, axis=1), jnp.max(other_image, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def around(
    loss: Loss, images: jax.Array, texts: jax.Array, shared: Shared, valid: jax.Array
) -> Compared:
    """Compute what `gathered` does, passing the texts around the devices of the mesh in use.

    Only the loss has a gradient, with respect to `images`, `texts` and `shared`. It must be a sum
    of independent terms over pairs.
    """
    return _ring(loss, images, texts, shared, valid, differentiate=False)[0]


def _forward(loss, images, texts, shared, valid):
    return _ring(loss, images, texts, shared, valid, differentiate=True)


def _backward(_loss, gradients, cotangents):
    return *jax.tree.map(lambda g: g * cotangents.loss, gradients), None


around.defvjp(_forward, _backward)


class _Local(NamedTuple):
    """Part of the ring's carry that stays on its device, for the b images there.

    Attributes:
        loss: Sum over the pairs seen so far.
        own: [b], see `Compared`.
        other_text: [b], see `Compared`.
        gradients: Gradients of the loss for the images [b, D] and for `Shared`; None without
            differentiation.
    """

    loss: jax.Array
    own: jax.Array
    other_text: jax.Array
    gradients: tuple[jax.Array, Shared] | None


class _Traveling(NamedTuple):
    """Part of the ring's carry that moves on with each turn: b texts and results for them.

    Attributes:
        texts: [b, D].
        valid: bool [b], which of them count.
        other_image: [b], see `Compared`.
        gradient: Gradient of the loss for the texts [b, D]; None without differentiation.
    """

    texts: jax.Array
    valid: jax.Array
    other_image: jax.Array
    gradient: jax.Array | None


def _ring(
    loss: Loss,
    images: jax.Array,
    texts: jax.Array,
    shared: Shared,
    valid: jax.Array,
    *,
    differentiate: bool,
) -> tuple[Compared, Any]:
    """Return the comparison, and the gradients for images, texts, `shared` (or None)."""
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in AXES)
    batch, replicated = P(AXES), P()
    gradient_specs = (batch, batch, replicated) if differentiate else None
    compared_specs = Compared(replicated, batch, batch, batch)  # type: ignore[arg-type]  # specs
    ring = jax.shard_map(
        functools.partial(_ring_on_device, loss, devices, differentiate),
        in_specs=(batch, batch, replicated, batch),
        out_specs=(compared_specs, gradient_specs),
        check_vma=False,
    )
    return ring(images, texts, shared, valid)


def _ring_on_device(
    loss: Loss,
    devices: int,
    differentiate: bool,
    images: jax.Array,
    texts: jax.Array,
    shared: Shared,
    valid: jax.Array,
) -> tuple[Compared, Any]:
    """Compare the images of one device with all texts, as these pass by."""
    onward = [(n, (n + 1) % devices) for n in range(devices)]

    def turn(number: jax.Array, carry: tuple[_Local, _Traveling]) -> tuple[_Local, _Traveling]:
        local, traveling = _compare_block(loss, images, shared, valid, number == 0, *carry)
        return local, jax.lax.ppermute(traveling, AXES, onward)

    lowest = jnp.full(len(images), -jnp.inf)
    gradients = jax.tree.map(jnp.zeros_like, (images, shared)) if differentiate else None
    text_gradient = jnp.zeros_like(texts) if differentiate else None
    local = _Local(jnp.float32(0), jnp.zeros(len(images)), lowest, gradients)
    traveling = _Traveling(texts, valid, lowest, text_gradient)
    local, traveling = jax.lax.fori_loop(0, devices, turn, (local, traveling))

    if local.gradients is None:
        total, all_gradients = jax.lax.psum(local.loss, AXES), None
    else:
        image_gradient, shared_gradient = local.gradients
        total, shared_gradient = jax.lax.psum((local.loss, shared_gradient), AXES)
        all_gradients = image_gradient, traveling.gradient, shared_gradient
    return Compared(total, local.own, local.other_text, traveling.other_image), all_gradients


def _compare_block(
    loss: Loss,
    images: jax.Array,
    shared: Shared,
    valid: jax.Array,
    at_home: jax.Array,
    local: _Local,
    traveling: _Traveling,
) -> tuple[_Local, _Traveling]:
    """Add the pairs of the local images and the texts present; `at_home`: texts of these images."""
    own = jnp.eye(len(images), dtype=bool) & at_home
    counts = valid[:, None] & traveling.valid

    def block(images, texts, shared):
        logits = similarities(images, texts, shared)
        return loss(logits, own, counts), logits

    args = (images, traveling.texts, shared)
    gradients, text_gradient = local.gradients, traveling.gradient
    if gradients is None or text_gradient is None:
        summed, logits = block(*args)
    else:
        (summed, logits), of = jax.value_and_grad(block, (0, 1, 2), has_aux=True)(*args)
        gradients = jax.tree.map(jnp.add, gradients, (of[0], of[2]))
        text_gradient = text_gradient + of[1]
    own_logits, other_text, other_image = others(logits, own, valid, traveling.valid)
    local = _Local(
        local.loss + summed,
        local.own + own_logits,
        jnp.maximum(local.other_text, other_text),
        gradients,
    )
    other_image = jnp.maximum(traveling.other_image, other_image)
    return local, _Traveling(traveling.texts, traveling.valid, other_image, text_gradient)
