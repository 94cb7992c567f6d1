"""Compiles the training step of a config for the chips of a TPU pod, none of which is here.

The compiler is that of the `libtpu` wheel; `get_topology_desc` gives devices that exist only for
it. The step is the one that a run takes: same learner, optimizer, shardings and donation, with
shapes in the place of arrays.
"""

import copy
import dataclasses
import functools
import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import inputs, learners, train
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.optim import schedule as schedules
from cap_pretrain.training import plan
from cap_pretrain.training.step import init_state, make_train_step

# What the names of topologies begin with, and how libtpu is to set up the chips. The two cores of a
# v4 chip work as one device, as they do on Cloud TPU; in later ones they always do.
CHIPS = {
    "v4": {"chip_config_name": "megacore"},
    "v5e": {},
    "v5p": {},
    "v6e": {},
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = re.compile(
    r"memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds[^(]*\(([\d.]+)([KMGT]?)\)"
)
_OVER = re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm")


def set_environment() -> None:
    """Keeps libtpu from looking for TPUs, before JAX sets up a backend; what is set stays."""
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask what machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",  # these two only silence warnings
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        # Nothing is loaded onto a TPU, so others may compile, too.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip.

    Attributes:
      limit: what the compiler may use.
      arguments: state and batch.
      outputs: what is returned and does not take the place of an argument.
      temporaries: activations, gradients and whatever else lives within the step.
      code: the program.
      needed: all of these.
    """

    limit: int
    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def needed(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


class TooLarge(Exception):
    """The step does not fit.

    Attributes:
      needed: bytes of HBM that it would take on one chip, as far as the compiler tells.
      limit: bytes that there are.
    """

    def __init__(self, needed: int, limit: int):
        super().__init__(f"needs {needed:,} bytes of HBM, there are {limit:,}")
        self.needed, self.limit = needed, limit


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step as the compiler left it.

    Attributes:
      text: the optimized program.
      memory: see `Memory`.
      seconds: that compiling took.
    """

    text: str
    memory: Memory
    seconds: float


def open_topology(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """Returns the devices of a topology, such as "v5e:16x16", or of several alike.

    Raises:
      UserError: there is no such topology, or no compiler.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, the TPU compiler, is not installed: pip install -e '.[tpu]'")
    from jax.experimental import topologies

    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology: no chip {kind!r} in {name!r}.{did_you_mean(kind, CHIPS)}")
    if not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology: {name!r} lacks a shape; write it as {kind}:4x4.")
    kwargs = CHIPS[kind] | ({"num_slices": slices} if slices > 1 else {})
    try:
        return topologies.get_topology_desc(name, "tpu", **kwargs).devices
    except Exception as e:  # JaxRuntimeError, or what libtpu makes of it
        reason = str(e).splitlines()[0].partition(": ")[2] or str(e)
        raise UserError(f"--topology: {name!r} cannot be: {reason}") from e


@functools.cache
def hbm_limit(device: jax.Device) -> int:
    """Bytes of HBM that the compiler may use on a device: what it says when given too much."""
    alone = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**20, 2**22), jnp.int8, sharding=alone)  # 4 TiB
    try:
        jax.jit(lambda x: x + 1).lower(x).compile()
    except Exception as e:
        return _too_large(e).limit
    raise AssertionError("an array of 4 TiB fits")


def prepare(config: ConfigDict) -> tuple[ConfigDict, int]:
    """Settles what a config leaves to data and platform; returns it and the vocabulary's size.

    Raises:
      UserError: the config's mistakes; or its data is not here and settles what is built.
    """
    config, _ = warm_start.resolve(config)
    configs.validate(config)
    config = copy.deepcopy(config)
    if config.dtype == "auto":
        config.dtype = "bfloat16"  # these as on a TPU; "auto" would ask what is here
    if config.model.attention == "auto":
        config.model.attention = "recompute"
    if config.model.remat == "auto":
        config.model.remat = "lean"
    if config.model.unroll == 0:
        config.model.unroll = sys.maxsize
    vocab_size = config.text.vocab_size
    try:
        mixture = inputs.open_sources(config)
        config = inputs.completed(config, mixture)
        tokenizer = inputs.planned_tokenizer(config, mixture)
        vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    except UserError:
        # Captions need not be here: their shape is the config's.
        given = config.text.tokenizer or config.text.kind == "words"
        if given or not {"text"} & {*learners.learner_class(config.learner.name).reads}:
            raise
    return config, vocab_size


def compile_step(config: ConfigDict, vocab_size: int, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles the training step of a config, which went through `prepare`.

    Raises:
      UserError: the mesh does not fit the devices, or the batch the mesh.
      TooLarge: the step does not fit into HBM.
    """
    mesh = sharding.make_mesh(config, devices)
    step, state, batch = abstract_step(config, vocab_size, mesh)
    begin = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(state, batch).compile()
    except Exception as e:
        if too_large := _too_large(e):
            raise too_large from None
        raise
    stats = compiled.memory_analysis()
    memory = Memory(
        limit=hbm_limit(devices[0]),
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    return Compiled(compiled.as_text(), memory, time.monotonic() - begin)


def abstract_step(config: ConfigDict, vocab_size: int, mesh: Mesh):
    """Returns the step of a run as `train` builds it, and shapes of state and batch on the mesh."""
    schedule = schedules.make_schedule(config, epoch=config.batch_size)  # how long matters not
    rate = schedules.learning_rate(config, schedule)
    _, state, graphdef, tx = init_state(
        lambda key: learners.build(config, vocab_size, key),
        functools.partial(train.make_optimizer, config, rate, idle=False),
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


def _too_large(error: Exception) -> TooLarge | None:
    """What the compiler says of memory, if that is what is wrong."""
    for pattern in (_TOO_LARGE, _OVER):
        if found := pattern.search(str(error)):
            needed, unit, limit, limit_unit = found.groups()
            return TooLarge(
                round(float(needed) * _UNITS[unit]), round(float(limit) * _UNITS[limit_unit])
            )
    return None
