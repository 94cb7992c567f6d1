"""The training step: accumulation computes the same, averages and steps are counted."""

import jax
import numpy as np
import pytest

from cap_pretrain import learners, rules
from cap_pretrain.distributed import sharding
from cap_pretrain.optim import optimizers
from cap_pretrain.training import step
from tests import quick, toy

SMALL = dict(model__depth=1, model__width=32, model__mlp=64)


@pytest.mark.slow
@pytest.mark.parametrize("average", ["example", "token"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(average):
    c = toy.config(options={"average": average}, **SMALL)
    learner = learners.build(c, 100, jax.random.key(0))
    graphdef, params, stats = step.split_learner(learner)
    # A trained logits layer, so that gradients reach everything.
    params = jax.tree.map(
        lambda p: p + 0.02 * jax.random.normal(jax.random.key(1), p.shape), params
    )
    batch = toy.batch(c)
    batch["text"][5] = 0  # an image without a caption counts nowhere
    compute = jax.jit(step.accumulated_gradients, static_argnums=(0, 5))
    whole, in_parts = (
        jax.device_get(compute(graphdef, params, stats, batch, jax.random.key(0), parts))
        for parts in (1, 4)
    )
    largest = max(np.abs(g).max() for g in jax.tree.leaves(whole[0]))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole[0], in_parts[0])
    np.testing.assert_allclose(whole[1]["loss"], in_parts[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(whole[1]["token_accuracy"], in_parts[1]["token_accuracy"], rtol=1e-5)


@pytest.mark.parametrize("name", ["schedule_free", "adafactor"])
def test_optimizers_keep_their_state_of_idle_parameters(name):
    c = toy.config(optim__name=name, optim__weight_decay=0.1).optim
    params = {
        "encoder": {"kernel": np.ones((4, 4), np.float32)},
        "parts": {part: {"kernel": np.ones((4, 4), np.float32)} for part in ("idle", "other")},
    }
    tx = optimizers.build(c, params, lambda _: 0.1)
    before = tx.init(params)
    after = step._held(tx.update(params, before, params)[1], before, ("parts/idle/",))
    before, after = rules.flatten(before), rules.flatten(after)
    arrays = [path for path in before if path.endswith("parts/idle/kernel")]
    assert arrays
    for path in arrays:
        assert np.array_equal(before[path], after[path])
    others = [path.replace("/idle/", "/other/") for path in arrays]
    assert any(not np.array_equal(before[path], after[path]) for path in others)


def test_a_bad_step_is_left_out_whole():
    c = toy.config(quick.NAME, optim__ema=0.5, optim__skip_bad_steps=3, optim__warmup_share=0.0)
    init, abstract, graphdef, tx, rate, mesh = toy.prepared(c)
    take = step.make_train_step(
        graphdef, tx, rate, c, jax.tree.map(lambda leaf: leaf.sharding, abstract)
    )
    batch = sharding.put_batch(toy.batch(c), mesh)
    ruined = jax.tree.map(lambda p: p * np.nan, init().params["decoder"])
    state = init()
    good = jax.device_get(state.params["decoder"])
    state = state.replace(params=state.params | {"decoder": ruined})
    before = jax.device_get(state)
    state, metrics = take(state, batch)
    after = jax.device_get(state)
    assert not np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    assert after.step == 1 and after.counts["skipped"] == 1
    for part in ("params", "stats", "opt_state", "ema"):
        toy.assert_same(getattr(after, part), getattr(before, part))
    state, metrics = take(state.replace(params=state.params | {"decoder": good}), batch)
    assert np.isfinite(metrics["update_norm"]) and metrics["skipped"] == 1 and state.step == 2


def test_examples_and_broken_images_are_counted_where_the_step_runs():
    c = toy.config(quick.NAME)
    init, abstract, graphdef, tx, rate, mesh = toy.prepared(c)
    take = step.make_train_step(
        graphdef, tx, rate, c, jax.tree.map(lambda leaf: leaf.sharding, abstract)
    )
    batch = toy.batch(c) | {"index": np.arange(8), "broken": np.arange(8) % 4 == 0}
    state, first = take(init(), sharding.put_batch(batch, mesh))
    batch["index"] = batch["index"][::-1]
    state, second = take(state, sharding.put_batch(batch, mesh))
    assert (first["data/broken"], second["data/broken"], state.counts["broken"]) == (2, 4, 4)
    assert first["data/ids"].dtype == np.uint32 and first["data/ids"] != second["data/ids"]


def test_a_step_counts_averages_and_leaves_what_is_frozen():
    c = toy.config(
        quick.NAME,
        optim__ema=0.75,
        optim__lr_rules=(("encoder/.*", 0.0),),
        optim__warmup_share=0.0,
    )
    init, abstract, graphdef, tx, rate, mesh = toy.prepared(c)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    take = step.make_train_step(graphdef, tx, rate, c, shardings)
    first = init()
    before = jax.device_get(first)
    toy.assert_same(before.ema, before.params)
    batch = sharding.put_batch(toy.batch(c), mesh)
    state, metrics = take(first, batch)
    after = jax.device_get(state)

    given = init()  # not looked at by NumPy, which would hold on to its memory
    take(given, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params["decoder"]))
    assert (before.step, after.step) == (0, 1)
    toy.assert_same(after.params["encoder"], before.params["encoder"])
    averaged = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, before.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.ema, averaged)
    assert after.variables[0] is after.ema
    assert "loss_weight" not in metrics
    np.testing.assert_allclose(metrics["learning_rate"], c.optim.lr, rtol=1e-6)
    moved = jax.tree.map(lambda a, b: a - b, after.params, before.params)
    norm = lambda tree: np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree)))
    np.testing.assert_allclose(metrics["update_norm"], norm(moved), rtol=1e-3)
    np.testing.assert_allclose(metrics["param_norm"], norm(after.params), rtol=1e-5)
