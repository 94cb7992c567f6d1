"""Compiling the training step of a config for a TPU pod, on a machine without TPUs.

The compiler is that of the `libtpu` wheel; `get_topology_desc` returns devices that exist only for
it. The step is as in a run, in learner, optimizer, shardings and buffer donation, with abstract
shapes instead of arrays.
"""

import copy
import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import inputs, learners
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.optim import schedule as schedules
from cap_pretrain.training import plan
from cap_pretrain.training.setup import make_optimizer
from cap_pretrain.training.step import init_state, make_train_step
from cap_pretrain.validation import validate

# Prefixes of topology names, and how libtpu should set up the chips. The two cores of a v4 chip act
# as one device, as on Cloud TPU; those of later chips always do.
CHIPS: dict[str, dict[str, str]] = {
    "v4": {"chip_config_name": "megacore"},
    "v5e": {},
    "v5p": {},
    "v6e": {},
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REQUIRED = re.compile(
    r"memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds[^(]*\(([\d.]+)([KMGT]?)\)"
)
_USED = re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm")


def set_environment() -> None:
    """Keep libtpu from looking for TPUs, before JAX starts a backend; set variables are kept."""
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask a metadata server for the machine type
        "TPU_WORKER_HOSTNAMES": "localhost",  # these two only silence warnings
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        # Nothing is loaded onto a TPU, so other processes may compile at the same time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip, of which the compiler may use `limit`.

    `arguments` are state and batch; `outputs` do not reuse the memory of an argument; `temporaries`
    are activations, gradients and all else within the step; `code` is the program.
    """

    limit: int
    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def needed(self) -> int:
        """The sum of arguments, outputs, temporaries and code."""
        return self.arguments + self.outputs + self.temporaries + self.code


class OutOfMemoryError(Exception):
    """The step needs `needed` bytes of HBM on one chip, if known, of the usable `limit`."""

    def __init__(self, needed: int, limit: int):
        super().__init__(f"needs {needed:,} bytes of HBM, but only {limit:,} are available")
        self.needed, self.limit = needed, limit


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled training step: its optimized HLO, memory on one chip, and seconds of compiling."""

    text: str
    memory: Memory
    seconds: float


def open_topology(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """Return the devices of `slices` slices of a topology like "v5e:16x16"; may raise UserError."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, the TPU compiler, is not installed: pip install -e '.[tpu]'")
    from jax.experimental import topologies

    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology: no chip {kind!r} in {name!r}.{did_you_mean(kind, CHIPS)}")
    if not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology: {name!r} lacks a shape; write it as {kind}:4x4.")
    kwargs: dict[str, Any] = CHIPS[kind] | ({"num_slices": slices} if slices > 1 else {})
    try:
        return topologies.get_topology_desc(name, "tpu", **kwargs).devices
    except Exception as e:  # JaxRuntimeError or others, depending on libtpu
        reason = str(e).splitlines()[0].partition(": ")[2] or str(e)
        raise UserError(f"--topology: {name!r} is not possible: {reason}") from e


@functools.cache
def hbm_limit(device: jax.Device) -> int:
    """Return the bytes of HBM that the compiler may use, from its message about a huge array."""
    alone = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**20, 2**22), jnp.int8, sharding=alone)  # 4 TiB
    try:
        jax.jit(lambda x: x + 1).lower(x).compile()
    except Exception as e:
        if error := _out_of_memory(e):
            return error.limit
        raise
    raise AssertionError("the compiler accepted an array of 4 TiB")


def prepare(config: ConfigDict) -> tuple[ConfigDict, int]:
    """Resolve what a config leaves to data and platform; return it and its vocabulary size.

    Captions need not be available, because their shape follows from the config. Raises UserError if
    the config is invalid, or depends on data that is not available.
    """
    config, _ = warm_start.resolve(config)
    validate(config)
    config = copy.deepcopy(config)
    if config.dtype == "auto":
        config.dtype = "bfloat16"  # the choices for TPUs; "auto" would detect this machine
    if config.model.attention == "auto":
        config.model.attention = "recompute"
    if config.model.remat == "auto":
        config.model.remat = "lean"
    if config.model.unroll == 0:
        config.model.unroll = 2**31 - 1  # all layers; the largest value that `validate` accepts
    vocab_size = config.text.vocab_size
    try:
        mixture = inputs.open_sources(config)
        config = inputs.completed(config, mixture)
        tokenizer = inputs.planned_tokenizer(config, mixture)
        vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    except UserError:
        given = config.text.tokenizer or config.text.kind == "words"
        if given or not {"text"} & {*learners.learner_class(config.learner.name).reads}:
            raise
    return config, vocab_size


def compile_step(config: ConfigDict, vocab_size: int, devices: Sequence[jax.Device]) -> Compiled:
    """Compile the training step of a config from `prepare` for devices from `open_topology`.

    Raises UserError if the mesh does not fit the devices or the batch the mesh, and
    OutOfMemoryError if the step does not fit into HBM.
    """
    mesh = sharding.make_mesh(config, devices)
    step, state, batch = abstract_step(config, vocab_size, mesh)
    start = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(state, batch).compile()
    except Exception as e:
        if out_of_memory := _out_of_memory(e):
            raise out_of_memory from None
        raise
    stats = compiled.memory_analysis()
    memory = Memory(
        limit=hbm_limit(devices[0]),
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    return Compiled(compiled.as_text(), memory, time.monotonic() - start)


def abstract_step(config: ConfigDict, vocab_size: int, mesh: Mesh):
    """Return the jitted step of a run as `train` builds it, and its abstract state and batch."""
    schedule = schedules.make_schedule(
        config, epoch=config.batch_size
    )  # the length does not matter
    rate = schedules.learning_rate(config, schedule)
    _, state, graphdef, tx = init_state(
        lambda key: learners.build(config, vocab_size, key),
        functools.partial(make_optimizer, config, rate, idle=False),
        config,
        mesh,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(graphdef, tx, rate, config, shardings)
    batch = plan.abstract_batch(config)
    batch["broken"] = jax.ShapeDtypeStruct((config.batch_size,), np.bool_)
    if config.log.ids:
        batch["index"] = jax.ShapeDtypeStruct((config.batch_size,), np.uint32)
    split = sharding.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=split) for k, v in batch.items()}
    return step, state, batch


def _out_of_memory(error: Exception) -> OutOfMemoryError | None:
    """Parse the compiler's message about memory; None if the error is another one."""
    for pattern in (_REQUIRED, _USED):
        if found := pattern.search(str(error)):
            needed, unit, limit, limit_unit = found.groups()
            return OutOfMemoryError(
                round(float(needed) * _UNITS[unit]), round(float(limit) * _UNITS[limit_unit])
            )
    return None
