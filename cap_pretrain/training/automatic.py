"""What `model.remat=auto` becomes on GPUs: the fastest policy that fits into memory.

The memory of a step is estimated from shapes alone, by tracing the loss: state and gradients by
their shardings, and the activations that the backward pass keeps under a policy. BENCHMARKS.md
("The step's memory traffic") compares the estimates with what XLA's compilers need.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.distributed import cluster, sharding
from cap_pretrain.distributed.platform import platform_of
from cap_pretrain.optim import optimizers
from cap_pretrain.training import plan
from cap_pretrain.training.phases import phases_of
from cap_pretrain.training.step import init_state, loss_and_stats, split_learner

# From the fastest on GPUs to the one that needs the least memory. (On TPUs, lean is the fastest of
# all; see BENCHMARKS.md.)
POLICIES = ("none", "lean", "full")
# Where layers are not a loop, XLA's GPU compiler keeps more than the policy asks for: for "lean"
# 1.2 times as much for L/14 and 1.5 times for g/14; for "none" on an A100, which is older than
# Hopper (compute capability 9.0), 1.14 times for Cap L/14 and 1.23 times for CLIP L/14.
OVERHEAD = {"lean": 1.5}
OVERHEAD_BEFORE_HOPPER = OVERHEAD | {"none": 1.25}
# Share of the memory that a step may be estimated to need: the other estimates are between 8% too
# high and 2% too low.
USABLE = 0.96

MakeOptimizer = Callable[[Any], Any]


class Need(NamedTuple):
    """The estimated bytes that a step needs on one device."""

    state: int  # parameters, optimizer, moving average
    gradients: int
    activations: int  # kept for the backward pass
    workspace: int  # arrays of one layer while it is computed

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A config in which `model.remat` is settled, and why: a line for the log, or ""."""

    config: ConfigDict
    line: str = ""


def memory_of(device: jax.Device) -> int | None:
    """Return the bytes that programs may use on a GPU of this process, the least on any host.

    All hosts must call it. It is None on other platforms.
    """
    if platform_of(device) != "gpu":
        return None
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return cluster.decided(limit, lambda limits: min(limits) if all(limits) else None)


def settle(
    config: ConfigDict,
    vocab_size: int,
    make_optimizer: MakeOptimizer,
    devices: Sequence[jax.Device],
    limit: int | None,
    total: int = 0,
) -> Choice:
    """Choose the rematerialization policy where the config leaves it open.

    Args:
        config: A complete config.
        vocab_size: Number of tokens.
        make_optimizer: Makes the optimizer for abstract parameters.
        devices: All devices, or devices that exist only for a compiler.
        limit: Bytes that a step may use on one of them. None leaves the config as it is.
        total: Steps of the run, from which its phases follow.

    Returns:
        The first policy whose estimate fits, or the last with a line that says that none does.
    """
    if limit is None or config.model.remat != "auto" or platform_of(devices[0]) != "gpu":
        return Choice(config)
    candidate = copy.deepcopy(config)
    for policy in POLICIES:
        candidate.model.remat = policy
        need = estimate_run(candidate, vocab_size, make_optimizer, devices, total)
        if need.total <= USABLE * limit:
            break
    fits = need.total <= USABLE * limit
    gib = f"{need.total / 2**30:.1f} of {limit / 2**30:.1f} GiB"
    line = (
        f"model.remat={candidate.model.remat} (automatic): the step is estimated to need {gib} on "
        "a device"
    )
    if not fits:
        line += "; that may not fit: lower batch_size, or raise accumulate"
    elif candidate.model.remat == "full":
        line += "; accumulate=2 or more may be faster (tools/check_topology.py --fit)"
    return Choice(candidate, line)


def estimate_run(
    config: ConfigDict,
    vocab_size: int,
    make_optimizer: MakeOptimizer,
    devices: Sequence[jax.Device],
    total: int,
) -> Need:
    """Estimate as `estimate` the step of that phase of a run which needs most."""
    phases = phases_of(config, total)
    needs = [estimate(phase.config, vocab_size, make_optimizer, devices) for phase in phases]
    return max(needs, key=lambda need: need.total)


def estimate(
    config: ConfigDict,
    vocab_size: int,
    make_optimizer: MakeOptimizer,
    devices: Sequence[jax.Device],
) -> Need:
    """Estimate the bytes that a step of a settled config needs on one device."""
    shape = sharding.mesh_shape(config, devices)
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
    _, state, _, _ = init_state(
        lambda key: learners.build(config, vocab_size, key), make_optimizer, config, mesh
    )
    part = copy.deepcopy(config)
    part.batch_size = config.batch_size // (shape["data"] * shape["fsdp"] * config.accumulate)
    kept, largest = _kept(part, vocab_size)
    capability = float(getattr(devices[0], "compute_capability", 9.0))
    overhead = OVERHEAD if capability >= 9 else OVERHEAD_BEFORE_HOPPER
    kept = int(kept * overhead.get(config.model.remat, 1))
    gradients = plan.bytes_per_device(state.params)
    return Need(
        plan.bytes_per_device(state),
        gradients * (1 if config.accumulate == 1 else 2),
        kept + (_bytes(state.params) // 2 if shape["fsdp"] > 1 else 0),  # gathered, in bfloat16
        2 * largest,
    )


def _kept(config: ConfigDict, vocab_size: int) -> tuple[int, int]:
    """Return the bytes that the backward pass keeps for a batch, and those of the largest array.

    Parameters do not count. An array stacked over layers counts by its layers in the latter.
    """
    config = copy.deepcopy(config)
    if config.model.attention == "cudnn":  # cannot be traced without a GPU
        config.model.attention = "recompute"  # keeps the same
    config.model.unroll = 1
    key = jax.eval_shape(lambda: jax.random.key(0))
    learner = nnx.eval_shape(lambda: learners.build(config, vocab_size, jax.random.key(0)))
    graphdef, params, stats = split_learner(learner)

    def backward(params: Any, stats: Any, batch: Any, key: jax.Array) -> Any:
        def loss(params):
            params = optimizers.hold_frozen(config.optim, params)
            return loss_and_stats(graphdef, params, stats, batch, key)[0]

        return jax.vjp(loss, params)[1]

    batch = plan.abstract_batch(config)
    kept = jax.tree.leaves(jax.eval_shape(backward, params, stats, batch, key))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in kept]
    single = [
        size // (leaf.shape[0] if leaf.ndim > 2 and leaf.shape[0] != config.batch_size else 1)
        for size, leaf in zip(sizes, kept, strict=True)
    ]
    return max(0, sum(sizes) - _bytes(params)), max(single, default=0)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
