"""The one training step: state in, state and metrics out, under one `jax.jit` for every learner."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import rng
from cap_pretrain.distributed import sharding
from cap_pretrain.distributed.determinism import compiler_options
from cap_pretrain.fingerprint import fingerprint
from cap_pretrain.learners.protocols import Contrasts, learner_type
from cap_pretrain.models.layers import constrain
from cap_pretrain.optim import optimizers
from cap_pretrain.optim.plateau import Plateau


@struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: parameters of the learner, nested dict by path.
      stats: other variables of the learner, such as BatchNorm statistics.
      opt_state: state of the optimizer.
      counts: int32 scalars since step 0: `broken`, images that did not decode; `skipped`, steps
        whose update was left out because it was not finite.
      ema: moving average of `params`, or None.
      plateau: what is remembered of evaluations (see plateau.py), or None.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any
    counts: dict[str, jax.Array]
    ema: Any = None
    plateau: Any = None

    @property
    def variables(self) -> tuple[Any, Any]:
        """What evaluation reads: averaged parameters if there are any, and the statistics."""
        return (self.params if self.ema is None else self.ema), self.stats


def split_learner(learner: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns the learner's structure, its parameters and its other variables as nested dicts."""
    graphdef, params, stats = nnx.split(learner, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def init_state(
    build: Callable[[jax.Array], nnx.Module],
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    config: ConfigDict,
    mesh: Mesh,
) -> tuple[Callable[[], TrainState], TrainState, nnx.GraphDef, optax.GradientTransformation]:
    """Prepares the initial state without making it.

    Args:
      build: makes the learner from a key.
      make_optimizer: makes the optimizer from the (abstract) parameters.
      config: gives seed, EMA and sharding rules.
      mesh: where the state is to lie.

    Returns:
      A function that makes the state on the mesh, its abstract form with shardings, the learner's
      structure, and the optimizer.
    """
    key = rng.key(config.seed, 0, "init")
    graphdef, abstract_params, _ = split_learner(nnx.eval_shape(lambda: build(key)))
    tx = make_optimizer(abstract_params)

    def init() -> TrainState:
        _, params, stats = split_learner(build(key))
        return TrainState(
            step=jnp.int32(0),
            params=params,
            stats=stats,
            opt_state=tx.init(params),
            counts={"broken": jnp.int32(0), "skipped": jnp.int32(0)},
            ema=jax.tree.map(jnp.copy, params) if config.optim.ema else None,
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
    """The training loss, with metrics and the learner's updated other variables."""
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
    """Gradient of the loss of the whole batch, computed in `parts`, one after the other.

    The other variables become the mean of what each part makes of them. `hold` is applied to the
    parameters before the loss, inside what is differentiated.

    Returns:
      Gradients, metrics with the loss, other variables.
    """
    if parts == 1:

        def loss_of(params):
            return loss_and_stats(graphdef, hold(params), stats, batch, key)

        (loss, (metrics, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return grads, {"loss": loss, **metrics}, stats

    split = jax.tree.map(functools.partial(_split, parts=parts), batch)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(parts))
    compares = issubclass(learner_type(graphdef), Contrasts)
    gradients = _compared if compares else _averaged
    grads, metrics, moved = gradients(graphdef, hold, params, stats, split, keys)
    return grads, metrics, jax.tree.map(lambda old, sum: old + sum / parts, stats, moved)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, …] -> [parts, B / parts, …]; part i is every parts-th, so devices keep their examples."""
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)


def _joined(x: jax.Array) -> jax.Array:
    """What `_split` has split, in its order again."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _averaged(graphdef, hold, params, stats, split, keys):
    """Of a loss that is a mean: the mean over parts, each by its "loss_weight"."""

    def gradient(batch, key):
        def loss_of(params):
            return loss_and_stats(graphdef, hold(params), stats, batch, key)

        (loss, (metrics, seen)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        weight = metrics.get("loss_weight", jnp.float32(1))
        weighted = jax.tree.map(lambda x: weight * x, (grads, {"loss": loss, **metrics}))
        return weight, weighted, jax.tree.map(jnp.subtract, seen, stats)

    total, weighted, moved = _sum_over_parts(gradient, split, keys)
    return *jax.tree.map(lambda x: x / jnp.maximum(total, 1e-9), weighted), moved


def _compared(graphdef, hold, params, stats, split, keys):
    """Of a `Contrastive` learner: that of the whole batch (Gao et al. 2021, 2101.06983, section 3).

    All examples are embedded, and nothing kept but what is compared. The loss of that has a
    gradient in each embedding, which then goes back into the parameters as each part is embedded
    again, with the same keys.
    """

    def embed(params, batch, key):
        learner = nnx.merge(graphdef, hold(params), stats)
        return learner.embed(batch, key, train=True), split_learner(learner)[2]

    parts = jax.lax.map(lambda part: embed(params, *part)[0], (split, keys))
    leaves, tree = jax.tree.flatten(parts)
    differ = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def contrast(params, embeddings):
        learned = dict(zip(differ, embeddings, strict=True))
        joined = [constrain(_joined(learned.get(n, leaf))) for n, leaf in enumerate(leaves)]
        together = jax.tree.unflatten(tree, joined)
        return nnx.merge(graphdef, hold(params), stats).contrast(together)

    (loss, metrics), (direct, pulls) = jax.value_and_grad(contrast, (0, 1), has_aux=True)(
        params, [leaves[n] for n in differ]
    )

    def gradient(batch, key, pulls):
        def pulled(params):
            embedded, seen = embed(params, batch, key)
            leaves = jax.tree.leaves(embedded)
            return sum(jnp.sum(leaves[n] * p) for n, p in zip(differ, pulls, strict=True)), seen

        grads, seen = jax.grad(pulled, has_aux=True)(params)
        return grads, jax.tree.map(jnp.subtract, seen, stats)

    grads, moved = _sum_over_parts(gradient, split, keys, pulls)
    return jax.tree.map(jnp.add, direct, grads), {"loss": loss, **metrics}, moved


def _sum_over_parts(fn: Callable[..., Any], *parts: Any) -> Any:
    """The sum of `fn(*part)`, a tree of arrays, over the leading axis of all `parts`."""
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, *first))

    def add(total, part):
        return jax.tree.map(jnp.add, total, fn(*part)), None

    return jax.lax.scan(add, zeros, parts)[0]


# What must be finite for a step to count as a good one.
FINITE = ("loss", "grad_norm", "update_norm", "param_norm")


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    config: ConfigDict,
    shardings: TrainState,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted `(state, batch) -> (state, metrics)`; the state passed in is given up.

    Besides what the learner reads, a batch may hold `broken` (bool [B], counted), `index` (uint32
    [B], the examples' numbers, whose fingerprint becomes the metric `data/ids`) and `asked` (bool
    [B, n], what hosts ask for; the metric is what any of them does, [n]).

    Args:
      graphdef: the learner's structure.
      tx: the optimizer.
      rate: the learning rate, for the log.
      config: gives seed, accumulation, EMA, and what becomes of steps that are not finite.
      shardings: where the state lies.
    """

    def hold(params: Any) -> Any:
        return optimizers.hold_frozen(config.optim, params)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = dict(batch)
        broken, index = batch.pop("broken", jnp.zeros(1, bool)), batch.pop("index", None)
        asked = batch.pop("asked", None)
        key = rng.key(config.seed, state.step, "train")
        grads, metrics, stats = accumulated_gradients(
            graphdef, state.params, state.stats, batch, key, config.accumulate, hold
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        scale = jnp.float32(1)
        if state.plateau is not None:
            scale = state.plateau["scale"]
            updates = jax.tree.map(lambda u: scale * u, updates)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - config.optim.ema)
        metrics.pop("loss_weight", None)
        metrics |= {
            "learning_rate": scale * rate(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        counts = {**state.counts, "broken": state.counts["broken"] + jnp.sum(broken)}
        new = TrainState(state.step + 1, params, stats, opt_state, counts, ema, state.plateau)
        if config.optim.skip_bad_steps:
            good = jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])))
            left_out = state.replace(step=new.step, counts=counts)
            new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, left_out)
            new.counts["skipped"] += ~good
            metrics["skipped"] = new.counts["skipped"]
        metrics["data/broken"] = new.counts["broken"]
        if index is not None:
            metrics["data/ids"] = fingerprint(index)
        if asked is not None:
            metrics["asked"] = jnp.any(asked, axis=0)
        return new, metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(config.deterministic),
    )
