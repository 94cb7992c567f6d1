"""Losses that are a sum over pairs of images and texts of a batch that lies on many devices.

`gathered` has every text on every device, `around` on none: each device keeps its images and the
texts go around, so that each has met every text after as many turns as there are devices, and holds
one block of pairs at a time (Zhai et al. 2023, 2303.15343, section 3.3). What the texts learn
travels with them, so loss and gradient are one round trip.
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
# (logits [b, c], own, counts) -> their summed loss. Of the pairs, bool [b, c], those that are `own`
# are of one example, and those that do not `count` are as if they were not there.
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def similarities(images: jax.Array, texts: jax.Array, shared: Shared) -> jax.Array:
    """Logits [B, C] of unit vectors [B, D] and [C, D], given `scale` and maybe `bias`."""
    logits = shared["scale"] * jnp.matmul(images, texts.T, precision="highest")
    return logits + shared["bias"] if "bias" in shared else logits


def softmax_loss(logits: jax.Array, own: jax.Array, counts: jax.Array) -> jax.Array:
    """CLIP: of the row and the column of each own pair the cross-entropy, their mean."""
    blocked = jnp.where(counts, logits, -1e9)
    rows, columns = (jax.nn.logsumexp(blocked, axis=axis) for axis in (1, 0))
    right = jnp.sum(jnp.where(own, blocked, 0), axis=1)
    return jnp.sum(((rows + columns) / 2 - right) * jnp.any(own & counts, axis=1))


def sigmoid_loss(logits: jax.Array, own: jax.Array, counts: jax.Array) -> jax.Array:
    """SigLIP: every pair is a binary question."""
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(own, logits, -logits)) * counts)


LOSSES: dict[str, Loss] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


class Compared(NamedTuple):
    """What is known of a batch when all pairs were seen.

    Attributes:
      loss: the sum over pairs.
      own: [B], the logit of each image and its own text.
      other_text: [B], the largest logit of an image and the text of another example that counts.
      other_image: [B], the same of a text and an image.
    """

    loss: jax.Array
    own: jax.Array
    other_text: jax.Array
    other_image: jax.Array


def gathered(
    loss: Loss, images: jax.Array, texts: jax.Array, shared: Shared, valid: jax.Array
) -> Compared:
    """Compares all images with all texts; each device has the rows of its images, of all texts.

    Args:
      loss: what is summed.
      images: unit vectors [B, D], on the batch axes of the mesh in use, if there is one.
      texts: likewise.
      shared: what `similarities` reads besides.
      valid: bool [B], which examples count.
    """
    logits = constrain(similarities(constrain(images), constrain(texts), shared))
    own = constrain(jnp.eye(len(images), dtype=bool))
    summed = loss(logits, own, valid[:, None] & valid)
    return Compared(summed, *others(logits, own, valid, valid))


def others(
    logits: jax.Array, own: jax.Array, valid_images: jax.Array, valid_texts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last three of `Compared`, of a block: 0 and -inf where there is nothing."""
    logits = jax.lax.stop_gradient(logits)
    other_text = jnp.where(own | ~valid_texts, -jnp.inf, logits)
    other_image = jnp.where(own | ~valid_images[:, None], -jnp.inf, logits)
    of_own = jnp.sum(jnp.where(own, logits, 0), axis=1)
    return of_own, jnp.max(other_text, axis=1), jnp.max(other_image, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def around(
    loss: Loss, images: jax.Array, texts: jax.Array, shared: Shared, valid: jax.Array
) -> Compared:
    """What `gathered` gives, of texts that travel around the devices of the mesh in use.

    Only the loss has a gradient, in `images`, `texts` and `shared`. It must be a sum over pairs, of
    which none knows another.
    """
    return _travel(loss, images, texts, shared, valid, learns=False)[0]


def _forward(loss, images, texts, shared, valid):
    return _travel(loss, images, texts, shared, valid, learns=True)


def _backward(loss, gradients, cotangents):
    return *jax.tree.map(lambda g: g * cotangents.loss, gradients), None


around.defvjp(_forward, _backward)


def _travel(
    loss: Loss,
    images: jax.Array,
    texts: jax.Array,
    shared: Shared,
    valid: jax.Array,
    *,
    learns: bool,
) -> tuple[Compared, Any]:
    """What was compared, and the gradients of the loss in the three, None unless it `learns`."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in AXES)
    onward = [(n, (n + 1) % devices) for n in range(devices)]
    batch, none = P(AXES), P()

    @functools.partial(
        jax.shard_map,
        in_specs=(batch, batch, none, batch),
        out_specs=(Compared(none, batch, batch, batch), (batch, batch, none) if learns else None),
        check_vma=False,
    )
    def go(images, texts, shared, valid):
        def block(images, texts, shared, own, counts):
            logits = similarities(images, texts, shared)
            return loss(logits, own, counts), logits

        def turn(number, carry):
            here, there = carry
            own = jnp.eye(len(images), dtype=bool) & (number == 0)
            args = (images, there["texts"], shared, own, valid[:, None] & there["valid"])
            if learns:
                (summed, logits), gradients = jax.value_and_grad(block, (0, 1, 2), True)(*args)
                of_images, of_texts, of_shared = gradients
                here |= {
                    "of_images": here["of_images"] + of_images,
                    "of_shared": jax.tree.map(jnp.add, here["of_shared"], of_shared),
                }
                there |= {"of_texts": there["of_texts"] + of_texts}
            else:
                summed, logits = block(*args)
            of_own, other_text, other_image = others(logits, own, valid, there["valid"])
            here |= {
                "loss": here["loss"] + summed,
                "own": here["own"] + of_own,
                "other_text": jnp.maximum(here["other_text"], other_text),
            }
            there |= {"other_image": jnp.maximum(there["other_image"], other_image)}
            return here, jax.lax.ppermute(there, AXES, onward)

        nothing, lowest = jnp.zeros(len(images)), jnp.full(len(images), -jnp.inf)
        here = {"loss": jnp.float32(0), "own": nothing, "other_text": lowest}
        there = {"texts": texts, "valid": valid, "other_image": lowest}
        if learns:
            here |= jax.tree.map(jnp.zeros_like, {"of_images": images, "of_shared": shared})
            there |= {"of_texts": jnp.zeros_like(texts)}
        here, there = jax.lax.fori_loop(0, devices, turn, (here, there))
        here |= jax.lax.psum({k: here[k] for k in here if k in ("loss", "of_shared")}, AXES)
        compared = Compared(here["loss"], here["own"], here["other_text"], there["other_image"])
        gradients = (here["of_images"], there["of_texts"], here["of_shared"]) if learns else None
        return compared, gradients

    return go(images, texts, shared, valid)
