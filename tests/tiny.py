"""Learners that compile within a second, with random parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.training.step import TrainState, split_learner
from tests import toy

VOCAB, LENGTH, SIDE, PATCH, HEADS = 23, 7, 16, 4, 4
Split = tuple[nnx.GraphDef, Any, Any]


def config(
    learner: str = "captioner", options: dict | None = None, dtype: str = "float32", **fields: Any
) -> ConfigDict:
    """Return a tiny config; `fields` override its model section."""
    c = toy.config(learner, options, dtype=dtype, data__image_size=SIDE, text__length=LENGTH)
    c.model.name = f"mu/{PATCH}"
    c.model.update(dict(width=16, depth=3, mlp=40, heads=HEADS, decoder_depth=2) | fields)
    return c


def abstract(c: ConfigDict, vocab: int = VOCAB) -> Split:
    """Return the abstract learner of a config, split."""
    return split_learner(nnx.eval_shape(lambda: learners.build(c, vocab, jax.random.key(0))))


def split(c: ConfigDict, seed: int = 0, vocab: int = VOCAB) -> Split:
    """Return the learner of a config, split, without parameters at their initial zeros and ones."""
    return randomised(abstract(c, vocab), seed)


def randomised(split: Split, seed: int = 0) -> Split:
    """Fill an abstract learner with random numbers."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.standard_normal(leaf.shape)
        if name == "kernel":  # of a convolution, or of a possibly stacked linear layer
            noise /= np.prod(leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[-2]) ** 0.5
        elif name == "var":
            noise = np.exp(0.3 * noise)
        elif name == "scale":
            noise = 1 + 0.3 * noise
        elif name != "embedding":
            noise = 0.5 * noise
        return jnp.asarray(noise, leaf.dtype)

    graphdef, params, stats = split
    return graphdef, *(jax.tree_util.tree_map_with_path(draw, tree) for tree in (params, stats))


def state(c: ConfigDict, tx: optax.GradientTransformation, vocab: int = 100) -> TrainState:
    """Return an initial state with parameters of `split`, faster than compiling a run's own."""
    _, params, stats = split(c, vocab=vocab)
    counts = {"broken": jnp.int32(0), "skipped": jnp.int32(0)}
    return TrainState(jnp.int32(0), params, stats, tx.init(params), counts)


def jitted(split: Split, fn: Callable, **options: Any) -> Callable:
    """Return `fn(learner, *args)` as a compiled function of `args`."""
    graphdef, *variables = split
    compiled = jax.jit(
        lambda variables, *args: fn(nnx.merge(graphdef, *variables), *args), **options
    )
    return lambda *args: compiled(variables, *args)


def images(n: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """Return random uint8 [n, side, side, 3]: noise over four color fields, so images differ."""
    rng = np.random.default_rng(seed)
    fields = rng.integers(0, 128, (n, 2, 2, 3), np.uint8)
    fields = fields.repeat(side // 2, axis=1).repeat(side // 2, axis=2)
    return fields + rng.integers(0, 128, (n, side, side, 3), np.uint8)


def texts(lengths: list[int], seed: int = 0) -> np.ndarray:
    """Return random int32 [n, LENGTH]: row i has lengths[i] tokens, then padding."""
    text = np.random.default_rng(seed).integers(1, VOCAB, (len(lengths), LENGTH), np.int32)
    return np.where(np.arange(LENGTH) < np.asarray(lengths)[:, None], text, 0)
