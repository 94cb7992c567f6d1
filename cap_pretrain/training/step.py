"""The one training step: state in, state and metrics out, under one `jax.jit` for every learner."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from cap_pretrain import learners, rng, rules
from cap_pretrain.distributed import gpu, sharding
from cap_pretrain.fingerprint import fingerprint
from cap_pretrain.learners.protocols import Contrasts, learner_type
from cap_pretrain.learners.weights import LOSS_WEIGHT, is_weight, weight_of
from cap_pretrain.models.layers import constrain
from cap_pretrain.optim import optimizers
from cap_pretrain.optim.plateau import Plateau
from cap_pretrain.training import widths


class TrainState(struct.PyTreeNode):
    """Everything that training changes.

    `counts` are int32 scalars since step 0: `broken`, images that did not decode; `skipped`, steps
    whose update was discarded because it was not finite.
    """

    step: jax.Array  # int32 scalar, the number of steps taken
    params: Any  # of the learner, nested dict by path
    stats: Any  # its other variables, such as BatchNorm statistics
    opt_state: Any
    counts: dict[str, jax.Array]
    ema: Any = None  # average of `params` over steps, or None
    plateau: Any = None  # the memory of the plateau rule (see plateau.py), or None

    @property
    def variables(self) -> tuple[Any, Any]:
        """The variables to evaluate: averaged parameters if there are any, and `stats`."""
        return (self.params if self.ema is None else self.ema), self.stats


def split_learner(learner: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """Return the learner's structure, its parameters and its other variables as nested dicts."""
    graphdef, *states = nnx.split(learner, nnx.Param, ...)
    params, stats = states
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def init_state(
    build: Callable[[jax.Array], nnx.Module],
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    config: ConfigDict,
    mesh: Mesh | AbstractMesh,
) -> tuple[Callable[[], TrainState], TrainState, nnx.GraphDef, optax.GradientTransformation]:
    """Prepare the initial state without computing it; `config` has seed, EMA and sharding rules.

    `build` makes the learner from a random key, `make_optimizer` the optimizer from the abstract
    parameters. Returns a function that computes the state on the mesh, the abstract state with
    shardings, the learner's structure, and the optimizer.
    """
    key = rng.key(config.seed, 0, "init")
    graphdef, abstract_params, _ = split_learner(nnx.eval_shape(lambda: build(key)))
    tx = make_optimizer(abstract_params)

    def init() -> TrainState:
        _, params, stats = split_learner(build(key))
        params = widths.initial(config, params)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            stats=stats,
            opt_state=tx.init(params),
            counts={"broken": jnp.int32(0), "skipped": jnp.int32(0)},
            ema=jax.tree.map(jnp.copy, params) if optimizers.averages(config.optim) else None,
            plateau=jax.tree.map(jnp.asarray, Plateau.of(config).begin()),
        )

    abstract = jax.eval_shape(init)
    of_params = sharding.param_shardings(abstract.params, mesh, config.mesh.rules)
    shardings = sharding.state_shardings(abstract, abstract.params, of_params, mesh)
    abstract = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        abstract,
        shardings,
    )
    return jax.jit(init, out_shardings=shardings), abstract, graphdef, tx


def loss_and_stats(
    graphdef: nnx.GraphDef, params: Any, stats: Any, batch: Any, key: jax.Array
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """Return the training loss, and a pair of its metrics and the updated other variables."""
    learner = nnx.merge(graphdef, params, stats)
    loss, metrics = learner.loss(batch, key, train=True)
    return loss, (metrics, split_learner(learner)[2])


def accumulated_gradients(
    graphdef: nnx.GraphDef,
    params: Any,
    stats: Any,
    batch: Any,
    key: jax.Array,
    parts: int,
    hold: Callable[[Any], Any] = lambda params: params,
) -> tuple[Any, dict[str, jax.Array], Any]:
    """Compute the gradient of the loss of a batch, by gradient accumulation over `parts`.

    The batch is computed in `parts` sequential parts of equal size. `hold`, applied to the
    parameters inside the differentiated function, may freeze some of them. Returns gradients,
    metrics including the loss, and the mean over parts of the other variables after each.
    """
    if parts == 1:

        def loss_of(params):
            return loss_and_stats(graphdef, hold(params), stats, batch, key)

        (loss, (metrics, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return grads, {"loss": loss, **metrics}, stats

    split = jax.tree.map(functools.partial(_split, parts=parts), batch)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(parts))
    contrastive = issubclass(learner_type(graphdef), Contrasts)
    gradients = _cached_gradients if contrastive else _averaged_gradients
    grads, metrics, moved = gradients(graphdef, hold, params, stats, split, keys)
    return grads, metrics, jax.tree.map(lambda old, total: old + total / parts, stats, moved)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, …] -> [parts, B / parts, …]; part i is every parts-th, so devices keep their examples."""
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def _joined(x: jax.Array) -> jax.Array:
    """Invert `_split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _averaged_gradients(graphdef, hold, params, stats, split, keys):
    """Average the gradients of the parts, weighted by their metric "loss_weight".

    Metrics are averaged by `weight_of`, and the weights themselves are left out.
    """

    def gradient(batch, key):
        def loss_of(params):
            return loss_and_stats(graphdef, hold(params), stats, batch, key)

        (loss, (metrics, seen)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        metrics = {"loss": loss, LOSS_WEIGHT: jnp.float32(1), **metrics}
        weights = {name: value for name, value in metrics.items() if is_weight(name)}
        grads = jax.tree.map(lambda x: weights[LOSS_WEIGHT] * x, grads)
        values = {
            name: weights[weight_of(name, weights)] * value
            for name, value in metrics.items()
            if name not in weights
        }
        return weights, grads, values, jax.tree.map(jnp.subtract, seen, stats)

    totals, grads, values, moved = _sum_over_parts(gradient, split, keys)
    totals = {name: jnp.maximum(total, 1e-9) for name, total in totals.items()}
    grads = jax.tree.map(lambda x: x / totals[LOSS_WEIGHT], grads)
    return grads, {name: x / totals[weight_of(name, totals)] for name, x in values.items()}, moved


def _cached_gradients(graphdef, hold, params, stats, split, keys):
    """Compute the gradient of a contrastive loss over the whole batch by gradient caching.

    GradCache (Gao et al. 2021, 2101.06983, section 3): all examples are embedded, and only the
    embeddings kept. The gradient by each embedding is propagated to the parameters while its part
    is embedded a second time, with the same random keys.
    """

    def embed(params, batch, key):
        learner = nnx.merge(graphdef, hold(params), stats)
        return learner.embed(batch, key, train=True), split_learner(learner)[2]

    parts = jax.lax.map(lambda part: embed(params, *part)[0], (split, keys))

    def contrast(params, embeddings):
        joined = jax.tree.map(lambda x: constrain(_joined(x)), _with_floats(parts, embeddings))
        return nnx.merge(graphdef, hold(params), stats).contrast(joined)

    (loss, metrics), (direct, pulls) = jax.value_and_grad(contrast, (0, 1), has_aux=True)(
        params, _floats(parts)
    )

    def gradient(batch, key, pulls):
        def pulled(params):
            embedded, seen = embed(params, batch, key)
            products = jax.tree.map(lambda x, p: jnp.sum(x * p), _floats(embedded), pulls)
            return sum(jax.tree.leaves(products)), seen

        grads, seen = jax.grad(pulled, has_aux=True)(params)
        return grads, jax.tree.map(jnp.subtract, seen, stats)

    grads, moved = _sum_over_parts(gradient, split, keys, pulls)
    return jax.tree.map(jnp.add, direct, grads), {"loss": loss, **metrics}, moved


def _floats(tree: Any) -> Any:
    """Return `tree` with None in place of leaves that are not floating point."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)


def _with_floats(tree: Any, floats: Any) -> Any:
    """Return `tree` with its floating-point leaves taken from `floats`, as `_floats` returns."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, floats, tree, is_leaf=lambda x: x is None
    )


def _sum_over_parts(fn: Callable[..., Any], *parts: Any) -> Any:
    """Return the sum of `fn(*part)`, a tree of arrays, over the leading axis of all `parts`."""
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, *first))

    def add(total, part):
        return jax.tree.map(jnp.add, total, fn(*part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _held(new: Any, old: Any, prefixes: tuple[str, ...]) -> Any:
    """Return a tree with the leaves of `old` that belong to some parameters, and others of `new`.

    These are the parameters whose path begins with one of `prefixes`. The path of a leaf of an
    optimizer's state ends in that of its parameter.
    """

    def choose(path, new, old):
        held = any(f"/{prefix}" in f"/{rules.path_string(path)}" for prefix in prefixes)
        return old if held else new

    return jax.tree_util.tree_map_with_path(choose, new, old)


# A step is valid if these metrics are finite.
FINITE = ("loss", "grad_norm", "update_norm", "param_norm")


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    config: ConfigDict,
    shardings: TrainState,
    total: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Return the jitted training step `(state, batch, requests=None) -> (state, metrics)`.

    The state passed in is donated. Besides what the learner reads, a batch may hold `broken` (bool
    [B], counted) and `index` (uint32 [B], the examples' numbers; the metric `data/ids` is their
    fingerprint). `requests` (bool [devices, n], see `sharding.put_requests`) is what the hosts of a
    cluster request; the metric `requests`, bool [n], is what any of them does. `rate` is for the
    log; `config` has seed, accumulation, EMA, and how many invalid steps may be skipped. `total` is
    the number of steps of the run, for learners that read "progress".
    """
    reads_progress, idle = learners.reads_progress(config), learners.idle(config)

    def hold(params: Any) -> Any:
        return optimizers.hold_frozen(config.optim, params)

    def train_step(
        state: TrainState, batch: Any, requests: jax.Array | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = dict(batch)
        broken, index = batch.pop("broken", jnp.zeros(1, bool)), batch.pop("index", None)
        if reads_progress:
            share = jnp.minimum(state.step / total, 1).astype(jnp.float32)
            batch["progress"] = jnp.broadcast_to(share, len(batch["image"]))
        key = rng.key(config.seed, state.step, "train")
        grads, metrics, stats = accumulated_gradients(
            graphdef, state.params, state.stats, batch, key, config.accumulate, hold
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        scale = jnp.float32(1)
        if state.plateau is not None:
            scale = state.plateau["scale"]
            updates = jax.tree.map(lambda u: scale * u, updates)
        if idle:
            updates = _held(updates, jax.tree.map(jnp.zeros_like, updates), idle)
            opt_state = _held(opt_state, state.opt_state, idle)
        params = optax.apply_updates(state.params, updates)
        ema = optimizers.average(config.optim, state.ema, params, opt_state)
        metrics = {k: v for k, v in metrics.items() if not is_weight(k)}
        metrics |= {
            "learning_rate": scale * rate(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        counts = {**state.counts, "broken": state.counts["broken"] + jnp.sum(broken)}
        new = TrainState(state.step + 1, params, stats, opt_state, counts, ema, state.plateau)
        if config.optim.skip_bad_steps:
            valid = jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])))
            skipped = state.replace(step=new.step, counts=counts)
            new = jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, skipped)
            new.counts["skipped"] += ~valid
            metrics["skipped"] = new.counts["skipped"]
        metrics["data/broken"] = new.counts["broken"]
        if index is not None:
            metrics["data/ids"] = fingerprint(index)
        if requests is not None:
            metrics["requests"] = jnp.any(requests, axis=0)
        return new, metrics

    devices = jax.tree.leaves(shardings)[0].device_set
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=gpu.compiler_options(devices, deterministic=config.deterministic),
    )
