"""Schedule-free learning: the three sequences, and that runs evaluate and store the average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cap_pretrain import train
from cap_pretrain.checkpoints.load import read_weights
from cap_pretrain.checkpoints.warm_start import PretrainedWeights
from cap_pretrain.errors import UserError
from cap_pretrain.optim import optimizers, schedule
from cap_pretrain.rules import flatten
from cap_pretrain.training.step import TrainState
from cap_pretrain.validation import validate
from tests import quick, toy
from tests.optim.test_optimizers import parameters, section

STEPS, DECAY, B1, B2 = 6, 0.1, 0.8, 0.95
RULES = (("encoder/norm/.*", 0.0), ("head/.*", 0.5))


def rate(step):
    xp = np if isinstance(step, int) else jnp
    return 0.02 * xp.minimum(step + 1, 4)


def in_numpy(path, p):
    """Return x and y of a parameter after STEPS on a quadratic: equations 3 to 5, with Adam's z.

    Defazio et al. 2024 (2405.15682), algorithm 1, with weights of squared rates as optax has them.
    """
    factor = {"norm": 0.0, "head": 0.5}.get(next((k for k in ("norm", "head") if k in path), ""), 1)
    if not factor:
        return p, p
    decay = DECAY if path.endswith("kernel") else 0.0
    x = y = z = np.asarray(p, np.float64)
    second, total, largest = 0.0, 0.0, 0.0
    for t in range(STEPS):
        gradient = y
        second = B2 * second + (1 - B2) * gradient**2
        direction = gradient / (np.sqrt(second / (1 - B2 ** (t + 1))) + 1e-8)
        z = z - factor * rate(t) * (direction + decay * y)
        largest = max(largest, rate(t + 1))  # optax counts from 1
        total += largest**2
        share = largest**2 / total
        x = (1 - share) * x + share * z
        y = (1 - B1) * z + B1 * x
    return x, y


def test_the_sequences_are_those_of_the_paper():
    params = parameters()
    c = section(name="schedule_free", weight_decay=DECAY, clip_norm=0.0, b1=B1, b2=B2)
    c.lr_rules = RULES
    tx = optimizers.build(c, params, rate)
    y, state = params, tx.init(params)

    @jax.jit
    def step(y, state):
        updates, state = tx.update(y, state, y)  # the gradient of half the square
        return optax.apply_updates(y, updates), state

    for _ in range(STEPS):
        y, state = step(y, state)
    x = optimizers.average(c, None, y, state)
    for path, p in flatten(params).items():
        for found, expected in zip((x, y), in_numpy(path, p), strict=True):
            np.testing.assert_allclose(flatten(found)[path], expected, atol=2e-5, err_msg=path)
    toy.assert_same(x["encoder"]["norm"], params["encoder"]["norm"])


def config(tokenizer_path, **fields):
    own = dict(optim__name="schedule_free", optim__decay="constant", checkpoint__every_steps=2)
    return toy.config(quick.NAME, text__tokenizer=str(tokenizer_path), **own | fields)


@pytest.mark.slow
def test_a_run_stores_the_average_and_resumes_exactly(tokenizer_path, tmp_path):
    whole = config(tokenizer_path, total_steps=4)
    train.run(whole, tmp_path / "whole")
    for steps in (2, 4):
        cut = config(tokenizer_path, total_steps=steps)
        train.run(cut, tmp_path / "cut", allow_changes=["total_steps"])
    states = [toy.saved_state(whole, tmp_path / name, 100, 4) for name in ("whole", "cut")]
    toy.assert_same(*states)
    found = read_weights(tmp_path / "whole")
    assert found.averaged
    x = optimizers.average(whole.optim, None, states[0].params, states[0].opt_state)
    for path, leaf in flatten(x).items():
        np.testing.assert_allclose(found.params[path], leaf, rtol=1e-6, atol=1e-7)
        assert np.any(found.params[path] != flatten(states[0].params)[path])
    assert states[0].variables[0] is states[0].ema


def test_trained_weights_are_where_all_sequences_begin():
    params, trained = parameters(), parameters(1)
    c = section(name="schedule_free", lr_rules=RULES)
    tx = optimizers.build(c, params, rate)
    counts = dict.fromkeys(("broken", "skipped"), 0)
    state = TrainState(0, params, {}, tx.init(params), counts, ema=params)
    weights = PretrainedWeights(flatten(jax.tree.map(np.asarray, trained)), {}, "a test")
    started = weights.put(state)
    toy.assert_same(started.opt_state, tx.init(trained))
    toy.assert_same(started.ema, trained)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim__ema", 0.9, "optim.ema: optim.name=schedule_free has an average"),
        ("optim__b1", -1.0, r"optim.b1: schedule_free needs one in \(0, 1\]"),
        ("optim__b1", 1.5, r"optim.b1: schedule_free needs one in \(0, 1\], not 1.5"),
        ("optim__moment_dtype", "bfloat16", "optim.moment_dtype: schedule_free has no first"),
    ],
)
def test_what_does_not_fit_is_refused(field, value, message):
    c = toy.config(optim__name="schedule_free", **{field: value})
    with pytest.raises(UserError, match=message):
        validate(c)


def test_a_rate_that_falls_is_remarked_on():
    c = toy.config(optim__name="schedule_free")
    (line,) = schedule.notes(c, schedule.make_schedule(c, epoch=1))
    assert line.startswith("optim.decay: cosine lowers the rate")
    c.optim.decay = "constant"
    assert not schedule.notes(c, schedule.make_schedule(c, epoch=1))
    c.optim.cooldown_share = 0.2
    (line,) = schedule.notes(c, schedule.make_schedule(c, epoch=1))
    assert line.startswith("optim.cooldown_share, or") and "optim.cooldown_share=0." in line
