"""Optimizers, schedules and rules compute what their papers and names say."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from cap_pretrain import config as configs
from cap_pretrain.errors import UserError
from cap_pretrain.optim import optimizers
from cap_pretrain.rules import flatten
from tests import toy


def section(**fields):
    c = configs.default().optim
    c.warmup_share = 0.0
    for name, value in fields.items():
        c[name] = value
    return c


def parameters(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "encoder": {
            "blocks": {"up": {"kernel": draw(2, 40, 48), "bias": draw(2, 48)}},  # two layers
            "positions": draw(36, 40),
            "norm": {"scale": draw(40)},
        },
        "head": {"kernel": draw(40, 8)},
    }


def quadratic(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params)) / 2


def run(tx, params, steps, loss=quadratic):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


LOWERS = [
    *(("adamw", 0.02), ("adafactor", 0.02), ("muon", 0.1)),
    *(("lion", 0.02), ("sgd", 0.1), ("lars", 0.5)),
]


@pytest.mark.parametrize(("name", "lr"), LOWERS)
def test_every_optimizer_lowers_a_quadratic(name, lr):
    params = parameters()
    c = section(name=name, weight_decay=0.0, clip_norm=0.0)
    tx = optimizers.build(c, params, optax.constant_schedule(lr))
    after, _ = run(tx, params, 30)
    assert quadratic(after) < 0.8 * quadratic(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize(("name", "lr"), LOWERS)
def test_moments_are_stored_as_the_config_says(name, lr):
    params = parameters()
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))

    def trained(moment_dtype):
        c = section(name=name, weight_decay=0.0, clip_norm=0.0, moment_dtype=moment_dtype)
        after, state = run(optimizers.build(c, params, optax.constant_schedule(lr)), params, 30)
        held = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return after, sum(leaf.nbytes for leaf in held)

    (default, plain), (whole, more), (half, less) = map(trained, ("", "float32", "bfloat16"))
    assert more - less == 2 * numbers  # each first moment takes two bytes instead of four
    toy.assert_same(default, half if name == "adafactor" else whole)
    assert plain == (less if name == "adafactor" else more)
    assert quadratic(half) < 0.8 * quadratic(params)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (half, whole)), strict=True))


def test_the_registered_optimizers():
    names = ["adamw", "adafactor", "muon", "lion", "schedule_free", "sgd", "lars"]
    assert list(optimizers.OPTIMIZERS) == names


def adafactor_in_numpy(params, gradients, *, lr, weight_decay, clip, cap):
    """Apply the recipe's Adafactor to flat dicts, implemented from its description.

    Zhai et al. 2021 (2106.04560) section 3.4 after Shazeer and Stern 2018 (1804.04235), algorithm 4
    without update clipping and relative steps. Matrices keep row and column means of the squared
    gradient; everything else keeps the square itself.
    """
    params = {k: np.array(v, np.float32) for k, v in params.items()}
    first = {k: np.zeros_like(v, ml_dtypes.bfloat16) for k, v in params.items()}
    second = {}
    for t, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradient.values()))
        b2 = min(cap, 1 - t**-0.8)
        for name, p in params.items():
            g = gradient[name] * min(1.0, clip / norm)
            square = g**2 + 1e-30
            matrix = name.endswith(("kernel", "positions")) and min(p.shape[-2:]) >= 32
            now = (square.mean(-1), square.mean(-2)) if matrix else (square,)
            before = second.get(name, tuple(np.zeros_like(x) for x in now))
            second[name] = tuple(b2 * a + (1 - b2) * b for a, b in zip(before, now, strict=True))
            if matrix:
                rows, columns = second[name]
                estimate = rows[..., :, None] * columns[..., None, :]
                estimate = estimate / rows.mean(-1)[..., None, None]
            else:
                (estimate,) = second[name]
            kept = ml_dtypes.bfloat16(0.9) * first[name]  # rounded to bfloat16
            moment = kept.astype(np.float32) + 0.1 * g / np.sqrt(estimate)
            first[name] = moment.astype(ml_dtypes.bfloat16)
            decay = weight_decay if name.endswith("kernel") else 0.0
            params[name] = p - lr * (moment + decay * p)
    return params


# The recipe's cap, which ten steps do not reach, and one that they reach.
@pytest.mark.parametrize(("b2", "cap"), [(0.0, 0.999), (0.3, 0.3)])
def test_adafactor_is_the_recipes(b2, cap):
    params = parameters()
    gradients = [jax.tree.map(lambda x, s=s: x * 3**-s, parameters(s + 1)) for s in range(10)]
    c = section(name="adafactor", weight_decay=0.1, clip_norm=1.0, b2=b2)
    tx = optimizers.build(c, params, optax.constant_schedule(0.1))
    after, state = params, tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, after)
        after = optax.apply_updates(after, updates)

    flat = [flatten(jax.tree.map(np.asarray, gradient)) for gradient in gradients]
    kwargs = dict(lr=0.1, weight_decay=0.1, clip=1.0)
    expected = adafactor_in_numpy(flatten(params), flat, cap=cap, **kwargs)
    other = adafactor_in_numpy(flatten(params), flat, cap=0.6, **kwargs)
    for path, leaf in flatten(after).items():
        np.testing.assert_allclose(leaf, expected[path], atol=2e-5, err_msg=path)
        assert np.abs(leaf - other[path]).max() > 2e-3, path
    moments = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert sum(x.size for x in moments) == sum(x.size for x in jax.tree.leaves(params))


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix_only():
    params = parameters()
    tx = optimizers.build(section(name="adafactor"), params, optax.constant_schedule(0.01))
    floats = [x.shape for x in jax.tree.leaves(tx.init(params)) if x.dtype == jnp.float32]
    kept = {shape for shape in floats if np.prod(shape) > 1}
    assert kept == {
        (2, 40),
        (2, 48),
        (36,),
        (40,),
        (40, 8),
    }  # rows and columns; small matrices are not factored


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lion"])
def test_weight_decay_is_the_learning_rate_times_the_kernels(name):
    params = parameters()

    def build(weight_decay):
        c = section(name=name, weight_decay=weight_decay)
        return optimizers.build(c, params, optax.constant_schedule(0.5))

    without, _ = run(build(0.0), params, 1)
    decayed, _ = run(build(0.1), params, 1)
    difference = jax.tree.map(lambda a, b: a - b, without, decayed)
    blocks, start = difference["encoder"]["blocks"], params["encoder"]["blocks"]
    np.testing.assert_allclose(blocks["up"]["kernel"], 0.05 * start["up"]["kernel"], atol=1e-6)
    for other in (blocks["up"]["bias"], difference["encoder"]["positions"]):
        assert not np.any(other)


def test_decay_rules_take_precedence_over_the_default_rule():
    params = parameters()
    c = section(
        name="sgd", weight_decay=0.1, b1=1e-9, decay_rules=(("head/.*", 0.0), (".*/scale", 2.0))
    )
    tx = optimizers.build(c, params, optax.constant_schedule(1.0))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], 0)
    scale = params["encoder"]["norm"]["scale"]
    np.testing.assert_allclose(updates["encoder"]["norm"]["scale"], -0.2 * scale, rtol=1e-5)
    kernel = params["encoder"]["blocks"]["up"]["kernel"]
    np.testing.assert_allclose(
        updates["encoder"]["blocks"]["up"]["kernel"], -0.1 * kernel, rtol=1e-5
    )


@pytest.mark.parametrize("name", list(optimizers.OPTIMIZERS))
def test_a_rate_of_zero_freezes_exactly_and_keeps_no_state(name):
    params = parameters()
    c = section(name=name, lr_rules=(("encoder/.*", 0.0),))
    after, state = run(optimizers.build(c, params, optax.constant_schedule(0.1)), params, 3)
    toy.assert_same(after["encoder"], params["encoder"])
    assert not np.array_equal(after["head"]["kernel"], params["head"]["kernel"])
    of_encoder = sum(x.size for x in jax.tree.leaves(params["encoder"]))
    assert sum(x.size for x in jax.tree.leaves(state)) < of_encoder


def test_frozen_gradients_do_not_count_for_clipping():
    params = parameters()

    def big_encoder(p):
        return 1e6 * quadratic(p["encoder"]) + quadratic(p["head"])

    c = section(name="sgd", clip_norm=0.5, weight_decay=0.0, lr_rules=(("encoder/.*", 0.0),))
    after, _ = run(
        optimizers.build(c, params, optax.constant_schedule(0.1)), params, 1, big_encoder
    )
    moved = np.linalg.norm(after["head"]["kernel"] - params["head"]["kernel"])
    np.testing.assert_allclose(moved, 0.1 * 0.5 * 1.9, rtol=1e-4)  # 1 + momentum, for Nesterov


def test_gradients_are_clipped_by_value():
    params = parameters()
    c = section(name="sgd", clip_norm=0.0, clip_value=0.5, weight_decay=0.0)
    after, _ = run(optimizers.build(c, params, optax.constant_schedule(0.1)), params, 1)
    for a, p in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, p - 0.1 * 1.9 * np.clip(p, -0.5, 0.5), rtol=1e-5)


@pytest.mark.parametrize(("name", "steps"), [("sgd", 3), ("lars", 1)])
def test_momentum_can_be_switched_off(name, steps):
    """`b1=-1` is a real zero: plain SGD, and LARS without an accumulator."""
    params = {"head": {"bias": jnp.array([1.0, -2.0])}}
    c = section(name=name, b1=-1.0, weight_decay=0.0, clip_norm=0.0)
    after, state = run(optimizers.build(c, params, optax.constant_schedule(0.1)), params, steps)
    np.testing.assert_allclose(
        after["head"]["bias"], 0.9**steps * params["head"]["bias"], rtol=1e-6
    )
    assert not [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_minus_one_is_zero_and_zero_the_default(name):
    params = parameters()

    def trained(**fields):
        c = section(name=name, **fields)
        return run(optimizers.build(c, params, optax.constant_schedule(0.1)), params, 3)[0]

    toy.assert_same(trained(b1=0.0), trained(b1=0.9))
    tiny = trained(b1=1e-12)
    for a, b in zip(*map(jax.tree.leaves, (trained(b1=-1.0), tiny)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(tiny["head"]["kernel"], trained()["head"]["kernel"])


@pytest.mark.parametrize("field", ["b1", "b2", "eps"])
def test_other_negative_settings_are_refused(field):
    with pytest.raises(UserError, match=f"optim.{field}: -0.9 is negative; give -1 for zero"):
        optimizers.build(section(name="adamw", **{field: -0.9}), parameters(), lambda _: 0.1)


def test_multipliers_scale_and_the_first_rule_that_matches_wins():
    params = parameters()
    plain, _ = run(optimizers.build(section(name="adamw"), params, lambda _: 0.1), params, 1)
    c = section(name="adamw", lr_rules=(("encoder/positions", 0.5), ("encoder/.*", 0.1)))
    scaled, _ = run(optimizers.build(c, params, lambda _: 0.1), params, 1)

    def moved(after):
        return jax.tree.map(lambda a, b: a - b, after, params)

    expected = moved(plain)
    factors = jax.tree.map(lambda _: 0.1, params)
    factors["encoder"]["positions"], factors["head"]["kernel"] = 0.5, 1.0
    for a, b, factor in zip(*map(jax.tree.leaves, (moved(scaled), expected, factors)), strict=True):
        np.testing.assert_allclose(a, factor * b, atol=1e-6)


def test_lars_scales_and_decays_kernels_only():
    """You et al. 2017 (1708.03888), algorithm 1; biases and norms take plain momentum steps."""
    params = parameters()
    c = section(name="lars", weight_decay=0.3, clip_norm=0.0, b1=0.8)
    after, _ = run(optimizers.build(c, params, optax.constant_schedule(0.1)), params, 2)
    after = flatten(after)
    for path, p in flatten(params).items():
        p, velocity = np.asarray(p, np.float64), 0.0
        for _ in range(2):
            step = p  # the gradient of `quadratic`
            if path.endswith("kernel"):
                step = p + 0.3 * p
                step *= 0.001 * np.linalg.norm(p) / np.linalg.norm(step)
            velocity = 0.8 * velocity + 0.1 * step
            p = p - velocity
        np.testing.assert_allclose(after[path], p, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("field", ["lr_rules", "decay_rules"])
def test_a_rule_that_matches_nothing_or_does_not_parse_is_a_user_error(field):
    for pattern, message in (
        ("encodr/.*", "matches no parameter"),
        ("(", "not a regular expression"),
    ):
        with pytest.raises(UserError, match=f"optim.{field}.*{message}"):
            optimizers.build(section(**{field: ((pattern, 0.5),)}), parameters(), lambda _: 0.1)


def rates(decay, total=100, warmup=10, cooldown=0, lr=2.0, batch_size=8, **fields):
    rate = optimizers.schedule(
        section(decay=decay, lr=lr, **fields),
        total=total,
        warmup=warmup,
        cooldown=cooldown,
        batch_size=batch_size,
    )
    return np.array([rate(step) for step in range(total + 1)])


@pytest.mark.parametrize("decay", list(optimizers.DECAYS))
def test_rates_are_positive_from_the_first_step_and_peak_after_the_warmup(decay):
    values = rates(decay)
    assert values[0] > 0
    np.testing.assert_allclose(values[:11], 2.0 * np.arange(1, 12) / 11, rtol=1e-6)
    assert values.argmax() == 10
    assert (np.diff(values[10:]) <= 0).all()


@pytest.mark.parametrize("decay", list(optimizers.DECAYS))
def test_lr_batch_scales_the_rate_with_the_batch_size(decay):
    plain = rates(decay, cooldown=20)
    np.testing.assert_allclose(rates(decay, cooldown=20, lr_batch=32), plain / 4, rtol=1e-6)
    scaled = rates(decay, cooldown=20, lr_batch=32, batch_size=48)
    np.testing.assert_allclose(scaled, plain * 1.5, rtol=1e-6)
    np.testing.assert_array_equal(rates(decay, cooldown=20, batch_size=48), plain)


def test_decays_follow_their_formulas():
    left = np.arange(91)
    np.testing.assert_allclose(rates("cosine")[10:], 1 + np.cos(np.pi * left / 90), atol=1e-6)
    np.testing.assert_allclose(rates("linear")[10:], 2 * (1 - left / 90), atol=1e-6)
    np.testing.assert_allclose(rates("rsqrt")[10:], 2 * np.sqrt(10 / (left + 10)), rtol=1e-6)
    np.testing.assert_allclose(rates("constant")[10:], 2)


@pytest.mark.parametrize("decay", ["rsqrt", "constant"])
def test_cooldown_ends_at_zero(decay):
    plain, cooled = rates(decay), rates(decay, cooldown=20)
    np.testing.assert_allclose(cooled[:81], plain[:81])
    np.testing.assert_allclose(cooled[80:], plain[80:] * np.linspace(1, 0, 21), atol=1e-6)


def test_no_warmup_and_a_warmup_longer_than_the_run():
    assert rates("cosine", warmup=0)[0] == 2.0
    short = rates("cosine", total=3, warmup=10)
    assert short[0] > 0 and np.isfinite(short).all() and short.max() <= 2.0


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clipping_is_that_of_optax(limit):
    params = parameters()
    c = section(name="sgd", b1=-1.0, clip_norm=limit, weight_decay=0.0)
    after, _ = run(optimizers.build(c, params, optax.constant_schedule(0.1)), params, 1)
    plain = optax.chain(optax.clip_by_global_norm(limit), optax.sgd(0.1))
    expected, _ = run(plain, params, 1)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
