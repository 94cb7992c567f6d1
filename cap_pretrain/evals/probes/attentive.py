"""Classifiers with attention pooling, several of them trained at once on stored tokens.

A head is `models.vit.MapHead` (Zhai et al. 2021, 2106.04560: a learned query attends to all tokens,
then an MLP) and a linear layer. As there is one query, its product with the key kernel is computed
once for all tokens, and values are projected after they are averaged. The result is the same
without the two largest matrix products, which are those of every token.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cap_pretrain.evals.probes.features import Labelled
from cap_pretrain.models import native
from cap_pretrain.models.compute import Compute
from cap_pretrain.models.mlp import ACTIVATIONS, Details
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.vit import MapHead
from cap_pretrain.telemetry.flops import count_flops

WARMUP = 0.05
"""Fraction of the steps in which the learning rate rises; afterwards it falls as a cosine."""

LEAST_STEPS = 500
"""Steps of a fit at least: a few hundred images pass by in fewer, however often."""

_CHUNK = 2**16  # tokens whose sums are added at once in float64


class Setting(NamedTuple):
    """The hyperparameters of AdamW, chosen on held-out images."""

    lr: float
    weight_decay: float


class Scale(NamedTuple):
    """Mean and deviation of each dimension of the tokens, float32 [D]."""

    mean: np.ndarray
    deviation: np.ndarray


def scale_of(tokens: np.ndarray, width: int) -> Scale:
    """Return the scale of tokens [N, T, D], with a deviation of 1 for constant dimensions.

    D is `width`, or one more if padding is marked (`models.native`), which does not count.
    """
    rows, count = tokens.reshape(-1, tokens.shape[-1]), 0
    total, squares = np.zeros((2, width))
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK].astype(np.float64)
        part = part[part[:, -1] > 0, :-1] if part.shape[1] > width else part
        total, squares = total + part.sum(0), squares + np.square(part).sum(0)
        count += len(part)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    deviation = np.where(deviation > 1e-6 * np.abs(mean) + 1e-12, deviation, 1)
    return Scale(mean.astype(np.float32), deviation.astype(np.float32))


def initial(size: Size, classes: int, seed: int) -> dict[str, Any]:
    """Return the parameters of an untrained head, whose linear layer is zero."""
    rngs = nnx.Rngs(params=jax.random.key(seed))
    pool = MapHead(size, details=Details(), compute=Compute(), rngs=rngs)
    kernel = jnp.zeros((size.width, classes))
    linear = {"kernel": kernel, "bias": jnp.zeros(classes)}
    return {**nnx.to_pure_dict(nnx.state(pool, nnx.Param)), "linear": linear}


def logits(params: dict[str, Any], tokens: jax.Array, heads: int) -> jax.Array:
    """Return the logits [B, classes] of a head for tokens [B, T, D], padding perhaps marked."""
    attention = params["attention"]
    query = _linear(attention["query"], params["probe"][0])
    width = len(query)
    tokens, real = native.unmarked(tokens, width)

    def by_head(kernel):  # [D, D] -> [D, heads, D / heads]
        return kernel.reshape(width, heads, -1)

    query = query.reshape(heads, -1) * (width // heads) ** -0.5
    # The bias of the keys adds the same number for all tokens, which softmax ignores.
    keys = jnp.einsum("dhe,he->hd", by_head(attention["key"]["kernel"]), query)
    products = jnp.einsum("btd,hd->bht", tokens, keys)
    if real is not None:
        products = jnp.where(real[:, None], products, -jnp.inf)
    weights = jax.nn.softmax(products)
    pooled = jnp.einsum("bht,btd->bhd", weights, tokens)
    values = jnp.einsum("bhd,dhe->bhe", pooled, by_head(attention["value"]["kernel"]))
    values = values.reshape(len(tokens), width) + attention["value"]["bias"]
    x = _linear(attention["out"], values)
    centered = x - jnp.mean(x, axis=1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centered**2, axis=1, keepdims=True) + Details.norm_eps)
    normalized = centered / deviation * params["norm"]["scale"] + params["norm"]["bias"]
    hidden = ACTIVATIONS[Details.activation](_linear(params["mlp"]["up"], normalized))
    return _linear(params["linear"], x + _linear(params["mlp"]["down"], hidden))


def flops(size: Size, tokens: jax.ShapeDtypeStruct) -> int:
    """Return the FLOPs of the logits of two classes for tokens [B, T, D]."""
    params = jax.eval_shape(lambda: initial(size, 2, 0))
    return count_flops(functools.partial(logits, heads=size.heads), params, tokens)


def _linear(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


class Heads:
    """Heads of one shape with the same initial parameters and batches, one for each setting.

    They are trained by AdamW on the mean cross-entropy, with weight decay on kernels.

    Args:
        scale: of the tokens, which are standardized by it.
        size: shape of the pooling.
        classes: number of classes.
        settings: the hyperparameters of each head.
        seed: of initial parameters and order of the images.
    """

    def __init__(
        self, scale: Scale, size: Size, classes: int, settings: Sequence[Setting], seed: int
    ):
        self._scale, self._heads = jax.device_put(scale), size.heads
        self._settings, self._seed = settings, seed
        self._params = _copies(len(settings), size, classes, seed)

    def fit(
        self,
        data: Labelled,
        rows: np.ndarray,
        *,
        steps: int,
        batch_size: int,
        each: Callable[[int], None],
    ) -> None:
        """Train on some rows, int [n], of tokens float [N, T, D].

        Every row is seen once before any is seen again. `each` is called with the number of steps
        taken.
        """
        state = (self._params, _begun(self._params))
        rates, decays = np.asarray(self._settings, np.float32).T
        decays = jax.device_put(decays)
        batches = shuffled(rows, batch_size, self._seed)
        for step, factor in enumerate(schedule(steps)):
            chosen = next(batches)
            batch = jax.device_put((data.features[chosen], data.labels[chosen], factor * rates))
            state = _step(state, self._scale, *batch, decays, self._heads)
            each(step + 1)
        self._params = state[0]

    def scores(
        self, tokens: np.ndarray, batch_size: int, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Return logits float32 [settings, n, classes] for the rows, int [n], of tokens [N, T, D].

        None are all rows. Tokens are copied a batch at a time.
        """
        rows = np.arange(len(tokens)) if rows is None else rows
        parts = []
        for start in range(0, len(rows), batch_size):
            part = tokens[rows[start : start + batch_size]]
            padded = np.zeros((batch_size, *part.shape[1:]), part.dtype)
            padded[: len(part)] = part
            found = _scores(self._params, self._scale, jax.device_put(padded), self._heads)
            parts.append(jax.device_get(found)[:, : len(part)])
        return np.concatenate(parts, axis=1)


def schedule(steps: int) -> np.ndarray:
    """Return the learning rates of all steps as fractions of the highest, float32 [steps]."""
    step, warmup = np.arange(steps), max(1, round(WARMUP * steps))
    fall = (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup))) / 2
    return np.where(step < warmup, (step + 1) / (warmup + 1), fall).astype(np.float32)


def shuffled(rows: np.ndarray, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches of rows, int [batch_size], without end; batches may span two epochs."""
    epoch, left = 0, rows[:0]
    while True:
        while len(left) < batch_size:
            left = np.concatenate([left, np.random.default_rng([seed, epoch]).permutation(rows)])
            epoch += 1
        yield left[:batch_size]
        left = left[batch_size:]


def _moments() -> optax.GradientTransformation:
    return optax.scale_by_adam()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _copies(count, size, classes, seed):
    """Return `count` copies of `initial` parameters along a new leading axis."""
    return jax.tree.map(lambda p: jnp.stack([p] * count), initial(size, classes, seed))


@jax.jit
def _begun(params):
    return jax.vmap(_moments().init)(params)


@functools.partial(jax.jit, static_argnames="heads", donate_argnums=0)
def _step(state, scale, tokens, labels, rates, decays, heads):
    """Take a step of all S heads, whose learning rates and weight decays are float32 [S]."""
    tokens = _standardized(tokens, scale)

    def loss(params):
        found = logits(params, tokens, heads)
        return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

    def one(params, moments, rate, decay):
        updates, moments = _moments().update(jax.grad(loss)(params), moments)

        def moved(path, p, u):
            decayed = decay * p if path[-1].key == "kernel" else 0.0
            return p - rate * (u + decayed)

        return jax.tree_util.tree_map_with_path(moved, params, updates), moments

    return jax.vmap(one)(*state, rates, decays)


@functools.partial(jax.jit, static_argnames="heads")
def _scores(params, scale, tokens, heads):
    tokens = _standardized(tokens, scale)
    return jax.vmap(lambda own: logits(own, tokens, heads))(params)


def _standardized(tokens: jax.Array, scale: Scale) -> jax.Array:
    tokens, real = native.unmarked(tokens, len(scale.mean))
    found = (tokens.astype(jnp.float32) - scale.mean) / scale.deviation
    return found if real is None else native.marked(found, real)
