"""Optimizers and learning-rate decays by name, with rules on parameter paths, made of optax.

Every optimizer is a chain: clip the gradients, scale them, add weight decay, multiply by the
learning rate. SGD and LARS add weight decay before their momentum, as published.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax.contrib import schedule_free

from cap_pretrain import rules
from cap_pretrain.errors import UserError
from cap_pretrain.optim.muon import Muon, muon
from cap_pretrain.optim.schedule_free import NAME, averaged

# Weight decay applies to kernels only (the recipe), not to embeddings, positions, scales or biases.
DECAY_RULES = ((r"(.*/)?kernel", 1.0),)


class Optimizer(NamedTuple):
    """What is applied to gradients before and after weight decay is added, by `config.optim`.

    `around` makes an optimizer of all of that, given the learning rate by step.
    """

    before: Callable[[ConfigDict], optax.GradientTransformation]
    after: Callable[[ConfigDict], optax.GradientTransformation] = lambda _: optax.identity()
    around: (
        Callable[
            [ConfigDict, optax.GradientTransformation, optax.Schedule],
            optax.GradientTransformation,
        ]
        | None
    ) = None


def _setting(c: ConfigDict, field: str, default: float) -> float:
    """Return `optim.b1`, `optim.b2` or `optim.eps`: 0 means `default`, -1 means a real zero."""
    value = c[field]
    if value < 0 and value != -1:
        raise UserError(f"optim.{field}: {value} is negative; give -1 for zero, 0 for the default.")
    return 0.0 if value < 0 else value or default


def _adafactor(c: ConfigDict) -> optax.GradientTransformation:
    """Return Adafactor as modified by Zhai et al. 2021 (2106.04560), section 3.4.

    First moment in bfloat16, second moment decay 1 - t^-0.8 capped at 0.999, no update clipping, no
    parameter scaling; dimensions below 32 are not factored (big_vision `scale_by_adafactor`).
    """
    cap, epsilon = _setting(c, "b2", 0.999), _setting(c, "eps", 1e-30)

    def decay_rate(step, exponent):
        return jnp.minimum(cap, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -exponent)

    def rms(factored: bool):
        return optax.scale_by_factored_rms(
            factored=factored,
            min_dim_size_to_factor=32,
            decay_rate=0.8,
            decay_rate_fn=decay_rate,
            epsilon=epsilon,
        )

    def kind(params):
        # Layers are stacked, so the biases of all layers look like a matrix but are vectors.
        is_matrix = ((r"(.*/)?(kernel|embedding|positions|text_positions)", "matrix"),)
        return rules.apply_rules(is_matrix, params, default="vector", field="optim", strict=False)

    return optax.chain(
        optax.partition({"matrix": rms(True), "vector": rms(False)}, kind),
        optax.ema(
            _setting(c, "b1", 0.9), debias=False, accumulator_dtype=c.moment_dtype or jnp.bfloat16
        ),
    )


def _adamw(c: ConfigDict) -> optax.GradientTransformation:
    """Return the scaling of Adam (Kingma and Ba 2015, 1412.6980)."""
    return optax.scale_by_adam(
        b1=_setting(c, "b1", 0.9),
        b2=_setting(c, "b2", 0.999),
        eps=_setting(c, "eps", 1e-8),
        mu_dtype=c.moment_dtype or None,
    )


def _muon(c: ConfigDict) -> optax.GradientTransformation:
    """Return Muon (Jordan et al. 2024) for matrices, set by `optim.muon`, and Adam for the rest."""
    return muon(Muon(**c.muon), _adamw(c), c.moment_dtype or None)


def _lion(c: ConfigDict) -> optax.GradientTransformation:
    """Return the scaling of Lion (Chen et al. 2023, 2302.06675)."""
    return optax.scale_by_lion(
        b1=_setting(c, "b1", 0.9), b2=_setting(c, "b2", 0.99), mu_dtype=c.moment_dtype or None
    )


def _lars(c: ConfigDict) -> optax.GradientTransformation:
    """Return the layer-wise trust ratio of LARS (You et al. 2017), on kernels, then momentum."""

    def kernels(params):
        return rules.apply_rules(
            ((r"(.*/)?kernel", True),), params, default=False, field="optim", strict=False
        )

    return optax.chain(
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=0.001), kernels),
        _momentum(c, nesterov=False),
    )


def _momentum(c: ConfigDict, *, nesterov: bool) -> optax.GradientTransformation:
    """Return momentum with decay `optim.b1`; without momentum there is no accumulator."""
    decay = _setting(c, "b1", 0.9)
    if not decay:
        return optax.identity()
    return optax.trace(decay, nesterov=nesterov, accumulator_dtype=c.moment_dtype or None)


def _nesterov(c: ConfigDict) -> optax.GradientTransformation:
    """Return Nesterov momentum (Sutskever et al. 2013), or plain SGD with optim.b1=-1."""
    return _momentum(c, nesterov=True)


def _rms(c: ConfigDict) -> optax.GradientTransformation:
    """Return schedule-free AdamW (Defazio et al. 2024, 2405.15682), for constant rates."""
    if c.moment_dtype:
        raise UserError("optim.moment_dtype: schedule_free has no first moments; leave it empty.")
    b2, eps = _setting(c, "b2", 0.999), _setting(c, "eps", 1e-8)
    return optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)


def _averaging(
    c: ConfigDict, base: optax.GradientTransformation, rate: optax.Schedule
) -> optax.GradientTransformation:
    b1 = _setting(c, "b1", 0.9)
    if not 0 < b1 <= 1:
        raise UserError(f"optim.b1: schedule_free needs one in (0, 1], not {c.b1}.")
    return schedule_free(base, rate, b1)


OPTIMIZERS = {
    "adamw": Optimizer(_adamw),
    "adafactor": Optimizer(_adafactor),
    "muon": Optimizer(_muon),
    "lion": Optimizer(_lion),
    NAME: Optimizer(_rms, around=_averaging),
    "sgd": Optimizer(lambda _: optax.identity(), _nesterov),
    "lars": Optimizer(lambda _: optax.identity(), _lars),
}


def _rsqrt(lr: float, warmup: float) -> optax.Schedule:
    """Return inverse square root decay, equal to `lr` at the end of the warmup."""
    scale = max(warmup, 1)
    return lambda step: lr * jnp.sqrt(scale / (step + scale))


# The schedule after the warmup: (lr, warmup steps, remaining steps) -> learning rate by the number
# of steps since the end of the warmup.
DECAYS: dict[str, Callable[[float, float, float], optax.Schedule]] = {
    "cosine": lambda lr, _warmup, left: optax.cosine_decay_schedule(lr, left),
    "linear": lambda lr, _warmup, left: optax.linear_schedule(lr, 0.0, left),
    "rsqrt": lambda lr, warmup, _left: _rsqrt(lr, warmup),
    "constant": lambda lr, _warmup, _left: optax.constant_schedule(lr),
}

COOLED = ("rsqrt", "constant")
"""The decays that end in a cooldown, if there is one."""


def schedule(
    c: ConfigDict, *, total: float, warmup: float, cooldown: float, batch_size: int
) -> optax.Schedule:
    """Return the learning rate as a function of the step, for the `optim` section of a config.

    In steps, `warmup` is a linear rise from 0 (step 0 already has a positive rate), and `cooldown`
    a linear fall to 0 at the end (for rsqrt and constant). The rate is scaled by the ratio of
    `batch_size` to `c.lr_batch`, if that is set.
    """
    warmup = min(warmup, total - 1)
    lr = c.lr * batch_size / c.lr_batch if c.lr_batch else c.lr
    after = DECAYS[c.decay](lr, warmup, max(1, total - warmup))

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        value = jnp.where(step < warmup, lr * (step + 1) / (warmup + 1), after(step - warmup))
        if cooldown and c.decay in COOLED:
            value = value * jnp.clip((total - step) / cooldown, 0.0, 1.0)
        return value

    return rate


def build(
    c: ConfigDict, params: Any, rate: optax.Schedule, scales: Any = None
) -> optax.GradientTransformation:
    """Return the optimizer of a config's `optim` section; `rate` is the learning rate by step.

    `params`, to which the rules are applied, may be abstract shapes. `scales` are factors on the
    updates of parameters before weight decay is added (muP), None for none. Raises UserError if a
    rule matches no parameter, or a setting is negative but not -1.
    """
    multipliers = rules.apply_rules(c.lr_rules, params, default=1.0, field="optim.lr_rules")
    rules.apply_rules(c.decay_rules, params, default=0.0, field="optim.decay_rules")  # strict
    decays = rules.apply_rules(
        (*c.decay_rules, *DECAY_RULES), params, default=0.0, field="optim", strict=False
    )
    optimizer = OPTIMIZERS[c.name]
    decay = _scaled_decay(c.weight_decay, decays) if c.weight_decay else optax.identity()
    learning = optax.chain(
        *(optimizer.before(c), *([_scaled(scales)] if scales is not None else []), decay),
        *(optimizer.after(c), optax.scale_by_learning_rate(rate)),
    )
    if optimizer.around:  # rates belong inside of it
        learning = optimizer.around(c, optax.chain(learning, _scaled(multipliers)), rate)
    frozen = jax.tree.map(lambda m: "frozen" if m == 0 else "learning", multipliers)
    steps = [optax.partition({"learning": learning, "frozen": optax.set_to_zero()}, frozen)]
    if c.clip_norm:
        clip = _clip(c.clip_norm)
        steps.insert(0, optax.masked(clip, jax.tree.map(lambda m: m != 0, multipliers)))
    if c.clip_value:
        steps.insert(0, optax.clip(c.clip_value))
    if c.lr_rules and not optimizer.around:
        steps.append(_multiply(multipliers))
    return optax.chain(*steps)


def check(c: ConfigDict) -> None:
    """Raise UserError if a setting of a config's `optim` section does not fit the optimizer."""
    optimizer = OPTIMIZERS[c.name]
    optimizer.before(c), optimizer.after(c)
    if optimizer.around:
        optimizer.around(c, optax.identity(), optax.constant_schedule(c.lr))


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Return `optax.clip_by_global_norm` with one factor for all elements.

    Optax divides every element by the norm. CPUs would do so in a loop of its own, which reads and
    writes all gradients.
    """

    def clip(updates, _):
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)

    return optax.stateless(clip)


def averages(c: ConfigDict) -> bool:
    """Return whether other parameters than those that are trained are to be evaluated."""
    return bool(c.ema) or c.name == NAME


def average(c: ConfigDict, ema: Any, params: Any, opt_state: Any) -> Any:
    """Return the parameters to evaluate after a step, None if they are `params`.

    Args:
        c: The `optim` section of a config.
        ema: The parameters to evaluate before the step.
        params: Parameters after the step.
        opt_state: State of the optimizer after the step.
    """
    if c.name == NAME:
        return averaged(opt_state, params)
    return None if ema is None else optax.incremental_update(params, ema, 1.0 - c.ema)


def is_frozen(c: ConfigDict, params: Any) -> bool:
    """Return whether `optim.lr_rules` freeze all of `params`; False if there are none.

    `params` may be a part of a learner's, with full paths, such as {"encoder": …}.
    """
    multipliers = rules.apply_rules(
        c.lr_rules, params, default=1.0, field="optim.lr_rules", strict=False
    )
    multipliers = jax.tree.leaves(multipliers)
    return bool(multipliers) and not any(multipliers)


def hold_frozen(c: ConfigDict, params: Any) -> Any:
    """Return `params` with `stop_gradient` applied to those that `optim.lr_rules` freeze.

    Inside a function that is differentiated, gradients of frozen parameters, which the optimizer
    ignores anyway, then cost nothing.
    """
    rates = rules.apply_rules(c.lr_rules, params, default=1.0, field="optim.lr_rules")
    return jax.tree.map(lambda p, m: p if m else jax.lax.stop_gradient(p), params, rates)


def _scaled_decay(rate: float, multipliers: Any) -> optax.GradientTransformation:
    """Add `rate * multiplier * parameter` to each update, skipping masked leaves."""

    def add(update, param, multiplier):
        return update if not multiplier else update + rate * multiplier * param

    return optax.stateless(lambda updates, params: _map_unmasked(add, multipliers, updates, params))


def _scaled(scales: Any) -> optax.GradientTransformation:
    """Multiply each update by its scale, skipping masked leaves."""

    def scale(update, _, scale):
        return update * scale

    return optax.stateless(lambda updates, params: _map_unmasked(scale, scales, updates, params))


def _multiply(multipliers: Any) -> optax.GradientTransformation:
    """Multiply each update by its multiplier."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, multipliers)
    )


def _map_unmasked(fn: Callable, multipliers: Any, updates: Any, params: Any) -> Any:
    """Map `fn` over trees, leaving the leaves that `optax.partition` has masked."""

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    return jax.tree.map(
        lambda u, p, m: u if is_masked(u) else fn(u, p, m),
        updates,
        params,
        multipliers,
        is_leaf=is_masked,
    )
