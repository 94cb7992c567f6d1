"""Encoders that compile quickly, and a short training loop for them."""

import jax
import numpy as np
import optax
from flax import nnx

from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import EncoderOutput
from cap_pretrain.training.step import loss_and_stats, split_learner


class Pixels(ImageEncoder):
    """An encoder of one linear layer on all pixels of an image."""

    layers = {}

    def __init__(self, side: int, width: int = 32, seed: int = 0):
        self.width = width
        self.linear = nnx.Linear(side * side * 3, width, rngs=nnx.Rngs(seed))

    def _encode(self, images, *, train, key):
        x = nnx.relu(self.linear(images.reshape(len(images), -1)))
        return EncoderOutput(x[:, None], x)


class Seen(Pixels):
    """An encoder that returns the pixels."""

    def __init__(self, side: int):
        self.width = side * side * 3

    def _encode(self, images, *, train, key):
        pixels = images.reshape(len(images), -1)
        return EncoderOutput(pixels[:, None], pixels)


def learned(learner: nnx.Module, batches, rate: float = 3e-3) -> nnx.Module:
    """Return the learner after one Adam step on each batch."""
    graphdef, params, stats = split_learner(learner)
    tx = optax.adam(rate)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, stats, opt_state, batch, key):
        gradient = jax.grad(
            lambda params: loss_and_stats(graphdef, params, stats, batch, key), has_aux=True
        )
        grads, (_, stats) = gradient(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    for number, images in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(0), number)
        params, stats, opt_state = step(params, stats, opt_state, {"image": images}, key)
    return nnx.merge(graphdef, params, stats)


def accuracy(learner: nnx.Module, images: np.ndarray) -> float:
    """Return the evaluation accuracy on a batch of images."""
    return float(learner.loss({"image": images}, jax.random.key(0), False)[1]["accuracy"])
