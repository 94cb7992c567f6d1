"""Checkpoints hold the whole state, go onto another layout, and say when they do not fit."""

import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cap_pretrain import partition
from cap_pretrain.checkpoint import Checkpoints
from cap_pretrain.errors import UserError
from cap_pretrain.step import TrainState
from tests import toy


def make_state(step=3, width=4, ema=True, names=("kernel",)):
    mesh = partition.make_mesh(toy.config())
    rng = np.random.default_rng(0)

    def array(*shape, dtype=np.float32):
        values = rng.normal(size=shape).astype(dtype)
        return jax.device_put(values, NamedSharding(mesh, P()))

    params = {"encoder": {name: array(3, width) for name in names}}
    return TrainState(
        step=jax.device_put(np.int32(step), NamedSharding(mesh, P())),
        params=params,
        stats={"norm": {"mean": array(width)}},
        opt_state=({"mu": array(3, width, dtype=jax.numpy.bfloat16), "none": ()},),
        counts={"broken": jax.device_put(np.int32(1), NamedSharding(mesh, P()))},
        ema={"encoder": {name: array(3, width) for name in names}} if ema else None,
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def saved(workdir, *states, **fields):
    checkpoints = Checkpoints(workdir, toy.config(**fields))
    for state in states:
        checkpoints.save(state)
    checkpoints.close()


def opened(workdir, read_only=True):
    return contextlib.closing(Checkpoints(workdir, toy.config(), read_only=read_only))


@pytest.mark.parametrize("ema", [True, False])
def test_everything_comes_back_bit_by_bit(ema, tmp_path):
    state = make_state(ema=ema)
    saved(tmp_path, state)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
        toy.assert_same(checkpoints.restore(abstract(state), 3), state)


def test_there_is_none_at_first(tmp_path):
    with opened(tmp_path, read_only=False) as checkpoints:
        assert checkpoints.latest_step() is None


def test_keeps_the_last_and_every_nth(tmp_path):
    fields = {"checkpoint__keep_last": 2, "checkpoint__keep_every_steps": 4}
    saved(tmp_path, *(make_state(step) for step in (2, 4, 6, 8, 10)), **fields)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [4, 8, 10]


@pytest.mark.parametrize(
    "other",
    [dict(width=5), dict(names=("kernel", "bias")), dict(names=("weight",))],
    ids=["shape", "more", "renamed"],
)
def test_a_checkpoint_of_another_model_is_refused(other, tmp_path):
    saved(tmp_path, make_state())
    message = "checkpoints/3: holds another model"
    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match=message) as error:
        checkpoints.restore(abstract(make_state(**other)), 3)
    assert len(str(error.value).splitlines()) == 2


def test_a_save_that_was_interrupted_does_not_count(tmp_path):
    saved(tmp_path, make_state(2))
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (half / "learner").mkdir(parents=True)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2
    with opened(tmp_path, read_only=False) as checkpoints:
        assert checkpoints.latest_step() == 2
        checkpoints.save(make_state(4))
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert not half.exists()
