"""Rematerialization and sharding follow from the memory of the devices."""

import functools

import jax
import pytest

from cap_pretrain.optim import schedule as schedules
from cap_pretrain.training import automatic
from cap_pretrain.training.setup import make_optimizer
from tests import tiny

VOCAB = 64


class Device:
    """Stands for a device of a platform, of which there are as many as a test wants."""

    process_index = 0

    def __init__(self, platform: str):
        self.platform = platform


def optimizer(config):
    schedule = schedules.make_schedule(config, epoch=config.batch_size)
    return functools.partial(
        make_optimizer, config, schedules.learning_rate(config, schedule), idle=False
    )


@pytest.fixture(scope="module")
def config():
    config = tiny.config()
    config.batch_size, config.total_steps = 64, 5
    return config


def settled(config, limit, *, devices=8, platform="gpu"):
    return automatic.settle(config, VOCAB, optimizer(config), [Device(platform)] * devices, limit)


def needs(config, remat, fsdp):
    config = config.copy_and_resolve_references()
    config.model.remat, config.mesh.fsdp = remat, fsdp
    return automatic.estimate(config, VOCAB, optimizer(config), [Device("gpu")] * 8)


def test_the_first_that_fits_is_taken(config, monkeypatch):
    order = [(remat, fsdp) for remat in automatic.POLICIES for fsdp in (1, 8)]
    totals = dict(zip(order, (60, 50, 40, 45, 30, 20), strict=True))

    def estimate(config, *_):
        return automatic.Need(totals[config.model.remat, config.mesh.fsdp], 0, 0, 0)

    monkeypatch.setattr(automatic, "estimate", estimate)
    for limit, wanted in ((70, 0), (60, 1), (50, 2), (41, 4), (25, 5)):
        choice = settled(config, limit)
        assert (choice.config.model.remat, choice.config.mesh.fsdp) == order[wanted]
        assert f"remat={order[wanted][0]}, mesh.fsdp={order[wanted][1]}" in choice.line
        assert "may not fit" not in choice.line
    assert "may not fit" in settled(config, 15).line
    assert settled(config, 60, devices=1).config.model.remat == "lean"  # nothing to shard over


def test_policies_and_sharding_need_less_and_less(config):
    none, lean, full = (needs(config, remat, 1) for remat in automatic.POLICIES)
    assert none.activations > lean.activations > full.activations > 0
    assert none.state == full.state
    assert needs(config, "none", 8).state < none.state / 6


def test_what_the_user_gives_is_kept(config):
    config = config.copy_and_resolve_references()
    config.model.remat = "dots"
    assert settled(config, 1).config.model.remat == "dots"
    config.mesh.fsdp = 2
    assert settled(config, 1).config == config


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_keep_the_config(config, platform):
    assert settled(config, 1, platform=platform).config == config
    assert automatic.memory_of(jax.devices("cpu")[0]) is None
