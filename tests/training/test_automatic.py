"""Rematerialization follows from the memory of the devices."""

import functools

import jax
import pytest

from cap_pretrain.distributed import sharding
from cap_pretrain.optim import schedule as schedules
from cap_pretrain.training import automatic
from cap_pretrain.training.setup import make_optimizer
from tests import tiny

VOCAB = 64


class Device:
    """Stands for a device of a platform, of which there are as many as a test wants."""

    process_index = 0

    def __init__(self, platform: str, capability: str = "9.0"):
        self.platform = platform
        self.compute_capability = capability


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


def needs(config, remat, fsdp, capability="9.0"):
    config = config.copy_and_resolve_references()
    config.model.remat, config.mesh.fsdp = remat, fsdp
    return automatic.estimate(config, VOCAB, optimizer(config), [Device("gpu", capability)] * 8)


def test_the_first_that_fits_is_taken(config, monkeypatch):
    totals = dict(zip(automatic.POLICIES, (60, 40, 20), strict=True))

    def estimate(config, *_):
        return automatic.Need(totals[config.model.remat], 0, 0, 0)

    monkeypatch.setattr(automatic, "estimate", estimate)
    for limit, wanted in ((70, "none"), (60, "lean"), (41, "full"), (25, "full")):
        choice = settled(config, limit)
        assert choice.config.model.remat == wanted and f"remat={wanted}" in choice.line
        assert "may not fit" not in choice.line
    assert "may not fit" in settled(config, 15).line
    assert config.model.remat == "auto"


@pytest.mark.slow
def test_policies_and_sharding_need_less_and_less(config):
    none, lean, full = (needs(config, remat, 1) for remat in automatic.POLICIES)
    assert none.activations > lean.activations > full.activations > 0
    assert none.state == full.state
    assert needs(config, "none", 8).state < none.state / 6


@pytest.mark.slow
def test_gpus_before_hopper_need_more_without_rematerialization(config):
    ampere, hopper = (needs(config, "none", 1, capability) for capability in ("8.0", "9.0"))
    assert ampere.activations == pytest.approx(1.25 * hopper.activations, rel=1e-3)
    assert needs(config, "full", 1, "8.0") == needs(config, "full", 1)


def test_what_the_user_gives_is_kept(config):
    config = config.copy_and_resolve_references()
    config.model.remat = "dots"
    assert settled(config, 1).config.model.remat == "dots"
    assert settled(config, 1).config == config


@pytest.mark.parametrize(
    ("hosts", "gpus", "processes", "fsdp"),
    [
        (1, 8, 1, 8),
        (4, 8, 4, 8),
        (2, 4, 2, 4),  # not over two hosts
        (2, 8, 16, 8),  # one process per GPU
        (1, 8, 8, 8),
        (1, 6, 1, 2),
        (1, 1, 1, 1),
    ],
)
def test_gpus_of_a_host_share_the_state(config, hosts, gpus, processes, fsdp):
    devices = [Device("gpu") for _ in range(hosts * gpus)]
    for n, device in enumerate(devices):
        device.process_index = n * processes // len(devices)
        device.slice_index = n // gpus
    config = config.copy_and_resolve_references()
    config.batch_size = 192
    assert sharding.mesh_shape(config, devices) == {
        "data": hosts * gpus // fsdp, "fsdp": fsdp, "tensor": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "tensor", "fsdp"), [(8, 1, 1), (4, 2, 1), (2, 1, 4), (1, 1, 8), (-1, 2, 4)]
)
def test_what_data_and_tensor_leave_of_the_gpus_shares_the_state(config, data, tensor, fsdp):
    config = config.copy_and_resolve_references()
    config.mesh.data, config.mesh.tensor = data, tensor
    shape = sharding.mesh_shape(config, [Device("gpu")] * 8)
    assert shape["fsdp"] == fsdp


def test_frozen_parameters_need_no_activations(config):
    trained = needs(config, "none", 1)
    config = config.copy_and_resolve_references()
    config.optim.lr_rules = ((".*", 0.0),)
    assert needs(config, "none", 1).activations < trained.activations / 4


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_keep_the_config(config, platform):
    assert settled(config, 1, platform=platform).config == config
    assert automatic.memory_of(jax.devices("cpu")[0]) is None
