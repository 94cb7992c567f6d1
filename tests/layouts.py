"""Mesh layouts of eight virtual devices, and training of each objective on them."""

import atexit
import collections
import copy
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.distributed import sharding
from cap_pretrain.training import step
from tests import toy

# The number of devices along data, fsdp and tensor.
LAYOUTS = {
    "one": (1, 1, 1),
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "all": (2, 2, 2),
}
VOCAB = 104
READS = ("image", "text", "phrases", "boxes")  # of `toy.batch`
# Captions use only these many words, so that twenty steps suffice to learn something.
WORDS = 20

# Fields that make compiling faster.
SMALL = dict(model__depth=1, model__width=32, model__mlp=64, optim__name="adamw")

# Together they cover what training may do: both kinds of optimizers, random masks, moving averages,
# gradient accumulation, rematerialization, and heads that the devices divide or do not divide.
OBJECTIVES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cap": (
        "captioner",
        {"parallel_fraction": 0.0},
        {"optim__name": "adamw", "accumulate": 2, "model__remat": "full"},
    ),
    "cappa": (
        "captioner",
        {"parallel_fraction": 0.75},
        {"model__dropout": 0.1, "optim__ema": 0.9},
    ),
    "clip": (
        "dual_encoder",
        {"contrast": "softmax", "head": "map"},
        SMALL | {"model__heads": 8, "optim__name": "muon"},
    ),
    "siglip": (
        "dual_encoder",
        {"contrast": "sigmoid"},
        SMALL | {"model__heads": 8, "model__dropout": 0.1, "optim__ema": 0.9},
    ),
    "recurrent": (
        "recurrent",
        dict(decoder="attention", embed=32, hidden=32, attention=16, dropout=0.2, penalty=1.0),
        SMALL | {"accumulate": 2},
    ),
    "simclr": (
        "simclr",
        {"outputs": 32},
        SMALL | {"optim__name": "lars", "optim__lr": 4.0, "optim__lr_batch": 16},
    ),
    "colorization": ("colorization", {"prior": "uniform"}, SMALL | {"accumulate": 2}),
}


def config(objective: str, **fields: Any) -> ConfigDict:
    """Return the toy config of an objective, by default with the optimizer of the recipe."""
    learner, options, more = OBJECTIVES[objective]
    lr = 0.01 if learner == "captioner" else 0.001
    fields = {"batch_size": 16, "optim__lr": lr} | more | fields
    return toy.config(learner, options, **fields)


def mesh(layout: str) -> Mesh:
    """Return the mesh of a layout over the first devices of this process."""
    shape = LAYOUTS[layout]
    axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), shape, strict=True))
    return sharding.make_mesh(toy.config(**axes), jax.devices()[: math.prod(shape)])


class Training:
    """Training of a config on the first devices of this process.

    Args:
        c: the config; its mesh is replaced.
        layout: a name of `LAYOUTS`.
        vocab_size: of the tokenizer.
    """

    def __init__(self, c: ConfigDict, layout: str, vocab_size: int = VOCAB):
        self.config = c = copy.deepcopy(c)
        c.mesh.data, c.mesh.fsdp, c.mesh.tensor = LAYOUTS[layout]
        self.mesh = mesh(layout)
        self.init, self.abstract, graphdef, tx, rate, _ = toy.prepared(c, vocab_size, self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self._take = step.make_train_step(graphdef, tx, rate, c, shardings)

    def go_on(
        self,
        state: step.TrainState,
        steps: int,
        batch_of: Callable[..., dict[str, np.ndarray]] = toy.batch,
    ) -> tuple[step.TrainState, list[float]]:
        """Train for `steps` steps on different batches; return the new state and the losses.

        Args:
            state: of the first step.
            steps: number of steps.
            batch_of: returns a batch of (config, number of the batch, size of the vocabulary).
        """
        losses = []
        with jax.set_mesh(self.mesh):
            for number in range(int(state.step), int(state.step) + steps):
                batch = batch_of(self.config, number, WORDS)
                batch = {k: batch[k] for k in READS if k in batch}
                arrays = sharding.put_batch(batch, self.mesh)
                state, metrics = self._take(state, arrays)
                losses.append(float(metrics["loss"]))
        return state, losses

    def program(self) -> str:
        """Return the step as compiled by XLA, which is the program of one device."""
        batch = toy.batch(self.config)
        rows = sharding.batch_sharding(self.mesh)
        shapes = {
            k: jax.ShapeDtypeStruct(batch[k].shape, batch[k].dtype, sharding=rows)
            for k in READS
            if k in batch
        }
        with jax.set_mesh(self.mesh):
            return self._take.lower(self.abstract, shapes).compile().as_text()

    def save(self, state: step.TrainState, workdir: Path) -> None:
        """Save the state as a run would."""
        with closing(Checkpoints(workdir, self.config)) as checkpoints:
            checkpoints.save(state)

    def restored(self, workdir: Path, at: int) -> step.TrainState:
        """Return the state saved in `workdir`, restored on this layout."""
        with closing(Checkpoints(workdir, self.config, read_only=True)) as checkpoints:
            return checkpoints.restore(self.abstract, at)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes that `tree` takes on the device that holds most of it."""
    held: collections.Counter[jax.Device] = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


# Reads calls from stdin and writes each one's results to the former stdout; the functions print to
# stderr.
SERVER = """
import gc, importlib, json, os, sys, traceback
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    module, name, calls = json.loads(line)
    try:
        function = getattr(importlib.import_module(module), name)
        reply = {"results": [function(*call) for call in calls]}
    except BaseException:
        reply = {"error": traceback.format_exc()}
    print(json.dumps(reply), file=replies, flush=True)
    gc.collect()
"""


@functools.cache
def _server() -> subprocess.Popen:
    """Start the process with eight devices, which serves all tests of this process."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=toy.CONFIGS.parent,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # which ends it; called before `wait`
    return process


def on_eight_devices(function: Callable, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """Call a module's function in a process with eight devices.

    The process is started at the first call and serves later ones, too, so that they need not
    import and start JAX again. It keeps the environment of its start.

    Args:
        function: a function at the top level of a module.
        calls: the arguments of each call, JSON-compatible.

    Returns:
        The result of each call, after a round trip through JSON.
    """
    return begun_on_eight_devices(function, calls)()


def begun_on_eight_devices(
    function: Callable, calls: Sequence[Sequence[Any]]
) -> Callable[[], list[Any]]:
    """Begin what `on_eight_devices` does; return a function that waits for the results."""
    process = _server()
    print(
        json.dumps([function.__module__, function.__name__, calls]), file=process.stdin, flush=True
    )

    def results():
        line = process.stdout.readline()
        if not line:
            _server.cache_clear()
            raise AssertionError(f"the process with eight devices ended: {process.wait()}")
        reply = json.loads(line)
        assert "error" not in reply, reply["error"]
        return reply["results"]

    return results
