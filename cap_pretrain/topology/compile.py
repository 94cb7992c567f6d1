"""Compiling the training step of a config for devices that this machine lacks.

The step is as in a run, in learner, optimizer, shardings and buffer donation, with abstract shapes
instead of arrays. `compilers` has what differs between TPUs and GPUs.
"""

import copy
import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import inputs, learners
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.distributed import sharding
from cap_pretrain.distributed.platform import tracing_for
from cap_pretrain.errors import UserError
from cap_pretrain.optim import schedule as schedules
from cap_pretrain.topology.compilers import compiler_for
from cap_pretrain.topology.tpu import TPU
from cap_pretrain.training import automatic, plan
from cap_pretrain.training.setup import make_optimizer
from cap_pretrain.training.step import init_state, make_train_step
from cap_pretrain.validation import validate


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device, of which a program may use `limit`.

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


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled training step: its optimized HLO, memory on one chip, and seconds of compiling."""

    text: str
    memory: Memory
    seconds: float


def prepare(config: ConfigDict, devices: Sequence[jax.Device] = ()) -> tuple[ConfigDict, int]:
    """Resolve what a config leaves to data and platform; return it and its vocabulary size.

    `devices` are from `open_topology`; without them, choices are those for TPUs. Captions need not
    be available, because their shape follows from the config. Raises UserError if the config is
    invalid, or depends on data that is not available.
    """
    config, _ = warm_start.resolve(config)
    validate(config)
    config = copy.deepcopy(config)
    vocab_size = config.text.vocab_size
    try:
        mixture = inputs.open_sources(config)
        config = inputs.completed(config, mixture)
        tokenizer = inputs.planned_tokenizer(config, mixture)
        vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    except UserError:
        given = config.text.tokenizer or config.text.kind == "words"
        if given or not {"text"} & {*learners.reads(config)}:
            raise
    compiler = compiler_for(devices) if devices else TPU()
    for field, value in compiler.choices(config, vocab_size, devices).items():
        part, _, key = field.rpartition(".")
        parent = config[part] if part else config
        if parent[key] in ("auto", 0):  # "auto" would detect this machine
            parent[key] = value
    if devices:
        limit = compiler.memory_limit(devices[0])
        optimizer = functools.partial(make_optimizer, config, _rate(config), idle=False)
        config = automatic.settle(config, vocab_size, optimizer, devices, limit).config
    return config, vocab_size


def _rate(config: ConfigDict) -> optax.Schedule:
    """Return a learning rate; its length does not matter."""
    schedule = schedules.make_schedule(config, epoch=config.batch_size)
    return schedules.learning_rate(config, schedule)


def compile_step(config: ConfigDict, vocab_size: int, devices: Sequence[jax.Device]) -> Compiled:
    """Compile the training step of a config from `prepare` for devices from `open_topology`.

    Raises UserError if the mesh does not fit the devices or the batch the mesh, and
    OutOfMemoryError if the compiler refuses what does not fit into HBM.
    """
    compiler = compiler_for(devices)
    mesh = sharding.make_mesh(config, devices)
    step, state, batch = abstract_step(config, vocab_size, mesh)
    start = time.monotonic()
    try:
        with jax.set_mesh(mesh), tracing_for(devices[0]):
            compiled = step.lower(state, batch).compile()
    except Exception as e:
        if out_of_memory := compiler.out_of_memory(e):
            raise out_of_memory from None
        raise
    stats = compiled.memory_analysis()
    memory = Memory(
        limit=compiler.memory_limit(devices[0]),
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    return Compiled(compiled.as_text(), memory, time.monotonic() - start)


def abstract_step(config: ConfigDict, vocab_size: int, mesh: Mesh):
    """Return the jitted step of a run as `train` builds it, and its abstract state and batch."""
    rate = _rate(config)
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
