"""Optimizers and learning rate schedules by name, with rules on parameter paths.

All come from optax. Every optimizer is a chain: clip the gradients, scale them, add weight decay,
multiply by the learning rate. SGD and LARS decay before their momentum, as they are published.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from cap_pretrain import rules

# Kernels and only kernels decay (the recipe); embeddings, positions, scales and biases do not.
DECAY_RULES = ((r"(.*/)?kernel", 1.0),)


class Optimizer(NamedTuple):
    """`before` the weight decay and `after` it, each `(config.optim) -> GradientTransformation`."""

    before: Callable[[ConfigDict], optax.GradientTransformation]
    after: Callable[[ConfigDict], optax.GradientTransformation] = lambda c: optax.identity()


def _adafactor(c: ConfigDict) -> optax.GradientTransformation:
    """Adafactor as modified for ViT-22B-era training (Zhai et al. 2021, 2106.04560, section 3.4).

    First moment in bfloat16, second moment decay 1 - t^-0.8 capped at 0.999, no update clipping, no
    parameter scaling; dimensions below 32 are not factored (big_vision `scale_by_adafactor`).
    """
    cap = c.b2 or 0.999

    def decay_rate(step, exponent):
        return jnp.minimum(cap, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -exponent)

    def rms(factored: bool):
        return optax.scale_by_factored_rms(
            factored=factored,
            min_dim_size_to_factor=32,
            decay_rate=0.8,
            decay_rate_fn=decay_rate,
            epsilon=c.eps or 1e-30,
        )

    def kind(params):
        # Layers are stacked, so a bias of many layers looks like a matrix; it is none.
        is_matrix = ((r"(.*/)?(kernel|embedding|positions|text_positions)", "matrix"),)
        return rules.apply_rules(is_matrix, params, default="vector", field="optim", strict=False)

    return optax.chain(
        optax.partition({"matrix": rms(True), "vector": rms(False)}, kind),
        optax.ema(c.b1 or 0.9, debias=False, accumulator_dtype=c.moment_dtype or jnp.bfloat16),
    )


def _lars_trust(c: ConfigDict) -> optax.GradientTransformation:
    """The layer-wise trust ratio (You et al. 2017), on kernels only, then momentum."""

    def kernels(params):
        return rules.apply_rules(
            ((r"(.*/)?kernel", True),), params, default=False, field="optim", strict=False
        )

    return optax.chain(
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=0.001), kernels),
        _momentum(c, nesterov=False),
    )


def _momentum(c: ConfigDict, *, nesterov: bool) -> optax.GradientTransformation:
    return optax.trace(c.b1 or 0.9, nesterov=nesterov, accumulator_dtype=c.moment_dtype or None)


OPTIMIZERS = {
    "adamw": Optimizer(
        lambda c: optax.scale_by_adam(
            b1=c.b1 or 0.9, b2=c.b2 or 0.999, eps=c.eps or 1e-8, mu_dtype=c.moment_dtype or None
        )
    ),
    "adafactor": Optimizer(_adafactor),
    "lion": Optimizer(
        lambda c: optax.scale_by_lion(
            b1=c.b1 or 0.9, b2=c.b2 or 0.99, mu_dtype=c.moment_dtype or None
        )
    ),
    "sgd": Optimizer(lambda c: optax.identity(), lambda c: _momentum(c, nesterov=True)),
    "lars": Optimizer(lambda c: optax.identity(), _lars_trust),
}


def _rsqrt(lr: float, warmup: int) -> optax.Schedule:
    """Inverse square root, equal to `lr` where the warm-up ends."""
    scale = max(warmup, 1)
    return lambda step: lr * jnp.sqrt(scale / (step + scale))


# What follows the warm-up: (lr, warm-up steps, steps that remain) -> schedule from there on.
DECAYS: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    "cosine": lambda lr, warmup, left: optax.cosine_decay_schedule(lr, left),
    "linear": lambda lr, warmup, left: optax.linear_schedule(lr, 0.0, left),
    "rsqrt": lambda lr, warmup, left: _rsqrt(lr, warmup),
    "constant": lambda lr, warmup, left: optax.constant_schedule(lr),
}


def schedule(
    c: ConfigDict, *, total: int, warmup: int, cooldown: int, batch_size: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
      c: the `optim` section of a config.
      total: steps of the run.
      warmup: steps of the linear rise from 0; the first step already learns.
      cooldown: steps of the linear fall to 0 at the end (for rsqrt and constant).
      batch_size: examples a step, to which `c.lr_batch` is compared.
    """
    warmup = min(warmup, total - 1)
    lr = c.lr * batch_size / c.lr_batch if c.lr_batch else c.lr
    after = DECAYS[c.decay](lr, warmup, max(1, total - warmup))

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        value = jnp.where(step < warmup, lr * (step + 1) / (warmup + 1), after(step - warmup))
        if cooldown and c.decay in ("rsqrt", "constant"):
            value = value * jnp.clip((total - step) / cooldown, 0.0, 1.0)
        return value

    return rate


def build(c: ConfigDict, params: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer of a config's `optim` section.

    Args:
      c: the section.
      params: the parameters (or their abstract shapes), for the rules.
      rate: from `schedule`.

    Raises:
      UserError: a rule matches nothing.
    """
    multipliers = rules.apply_rules(c.lr_rules, params, default=1.0, field="optim.lr_rules")
    rules.apply_rules(c.decay_rules, params, default=0.0, field="optim.decay_rules")  # strict
    decays = rules.apply_rules(
        (*c.decay_rules, *DECAY_RULES), params, default=0.0, field="optim", strict=False
    )
    optimizer = OPTIMIZERS[c.name]
    decay = _scaled_decay(c.weight_decay, decays) if c.weight_decay else optax.identity()
    learning = optax.chain(
        optimizer.before(c), decay, optimizer.after(c), optax.scale_by_learning_rate(rate)
    )
    frozen = jax.tree.map(lambda m: "frozen" if m == 0 else "learning", multipliers)
    steps = [optax.partition({"learning": learning, "frozen": optax.set_to_zero()}, frozen)]
    if c.clip_norm:
        clip = optax.clip_by_global_norm(c.clip_norm)
        steps.insert(0, optax.masked(clip, jax.tree.map(lambda m: m != 0, multipliers)))
    if c.clip_value:
        steps.insert(0, optax.clip(c.clip_value))
    if c.lr_rules:
        steps.append(_multiply(multipliers))
    return optax.chain(*steps)


def is_frozen(c: ConfigDict, params: Any) -> bool:
    """Whether there are `params`, and a config's rules leave all of them as they are.

    Args:
      c: the section.
      params: some of a learner's, in their places, as {"encoder": …}.
    """
    multipliers = rules.apply_rules(
        c.lr_rules, params, default=1.0, field="optim.lr_rules", strict=False
    )
    multipliers = jax.tree.leaves(multipliers)
    return bool(multipliers) and not any(multipliers)


def hold_frozen(c: ConfigDict, params: Any) -> Any:
    """Returns `params`, those that a rule freezes cut off from gradients, which then cost nothing.

    For the function that is differentiated; `build` leaves the frozen ones as they are anyway.
    """
    rates = rules.apply_rules(c.lr_rules, params, default=1.0, field="optim.lr_rules")
    return jax.tree.map(lambda p, m: p if m else jax.lax.stop_gradient(p), params, rates)


def _scaled_decay(rate: float, multipliers: Any) -> optax.GradientTransformation:
    """Adds `rate * multiplier * parameter`; masked parts of the tree are passed over."""

    def add(update, param, multiplier):
        return update if not multiplier else update + rate * multiplier * param

    return optax.stateless(lambda updates, params: _map(add, multipliers, updates, params))


def _multiply(multipliers: Any) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, multipliers)
    )


def _map(fn: Callable, multipliers: Any, updates: Any, params: Any) -> Any:
    """`jax.tree.map` over trees in which `optax.partition` has masked some leaves."""
    masked = lambda x: isinstance(x, optax.MaskedNode)
    return jax.tree.map(
        lambda u, p, m: u if masked(u) else fn(u, p, m),
        updates,
        params,
        multipliers,
        is_leaf=masked,
    )
