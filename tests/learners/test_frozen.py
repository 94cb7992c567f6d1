"""Every learner with a ResNet-18: frozen encoders do not change, others are trained."""

import jax
import numpy as np
import pytest

from cap_pretrain import rules
from cap_pretrain.training import step
from tests import tiny, toy

LEARNERS = {
    "captioner": {},
    "dual_encoder": {},
    "classifier": {"classes": 3},
}
TOWER = {"depth": 1, "width": 32, "mlp": 64, "heads": 2}  # the text tower


def two_steps(learner, **fields):
    """Return the states before and after two steps, and the losses."""
    fields |= {f"model__decoder_{k}": v for k, v in TOWER.items()}
    fields |= {"model__name": "resnet18", "optim__name": "adamw", "optim__lr": 1e-3}
    c = toy.config(learner, LEARNERS[learner], **fields)
    _, abstract, graphdef, tx, rate, _ = toy.prepared(c)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    take = step.make_train_step(graphdef, tx, rate, c, shardings)
    state, losses = tiny.state(c, tx), []
    before = jax.device_get(state)
    for seed in range(2):
        state, metrics = take(state, toy.batch(c, seed))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    return before, jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_of_a_frozen_encoder_no_bit_changes_whatever_learns_from_it(learner):
    before, after = two_steps(learner, optim__lr_rules=(("encoder/.*", 0.0),))
    toy.assert_same(before.params["encoder"], after.params["encoder"])
    toy.assert_same(before.stats["encoder"], after.stats["encoder"])
    before, after = (rules.flatten(state.params) for state in (before, after))
    learned = [path for path in after if "encoder/" not in path and path.endswith("/kernel")]
    assert learned and all((before[path] != after[path]).any() for path in learned)


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS)
def test_otherwise_parameters_and_statistics_move(learner):
    before, after = two_steps(learner, model__stem="small")
    for part in ("params", "stats"):
        moved = jax.tree.map(
            lambda a, b: bool((a != b).any()),
            *(getattr(state, part)["encoder"] for state in (before, after)),
        )
        assert all(jax.tree.leaves(moved)), part
