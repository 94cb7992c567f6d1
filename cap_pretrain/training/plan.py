"""The plan of a run, from abstract shapes alone: nothing is computed or allocated."""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from cap_pretrain import files, learners
from cap_pretrain.data.resolution import training_side
from cap_pretrain.distributed import sharding
from cap_pretrain.models.build import image_shape
from cap_pretrain.optim import optimizers
from cap_pretrain.telemetry import flops
from cap_pretrain.telemetry.tables import format_table
from cap_pretrain.training.phases import Phase, phases_of
from cap_pretrain.training.step import init_state, loss_and_stats, split_learner


def abstract_batch(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the global batch that the learner reads of the data.

    The config may be a phase's.
    """
    b, s, t = config.batch_size, training_side(config), config.text.length
    everything = {
        "image": image_shape(config, b, s),
        "text": jax.ShapeDtypeStruct((b, t), np.int32),
        "prompt": jax.ShapeDtypeStruct((b,), np.int32),
        "label": jax.ShapeDtypeStruct((b,), np.int32),
        "phrases": jax.ShapeDtypeStruct((b, config.data.regions, t), np.int32),
        "boxes": jax.ShapeDtypeStruct((b, config.data.regions, 4), np.float32),
    }
    return {k: everything[k] for k in learners.reads(config)}


def flops_per_example(
    config: ConfigDict, vocab_size: int, passes: Sequence[str] = ("forward", "training")
) -> dict[str, float]:
    """Count the model FLOPs per example of `forward`, and of `training`: forward and backward.

    What rematerialization computes a second time is not counted.
    """
    plain = copy.deepcopy(config)
    plain.model.remat, plain.model.attention = "none", "xla"
    key = jax.eval_shape(lambda: jax.random.key(0))
    learner = nnx.eval_shape(lambda: learners.build(plain, vocab_size, jax.random.key(0)))
    graphdef, params, stats = split_learner(learner)

    def forward(params, stats, batch, key):
        params = optimizers.hold_frozen(config.optim, params)
        return loss_and_stats(graphdef, params, stats, batch, key)

    def training(*args):
        return jax.value_and_grad(forward, has_aux=True)(*args)

    def per_example(fn: Callable) -> float:
        args = (params, stats, abstract_batch(plain), key)
        return flops.count_flops(fn, *args) / config.batch_size

    counted = {"forward": forward, "training": training}
    return {name: per_example(counted[name]) for name in passes}


def training_flops(phases: Sequence[Phase], vocab_size: int) -> list[float]:
    """Return the model FLOPs per example of training in each phase."""
    counted = (flops_per_example(phase.config, vocab_size, ["training"]) for phase in phases)
    return [counts["training"] for counts in counted]


def described(phases: Sequence[Phase], flops: Sequence[float]) -> list[dict[str, Any]]:
    """Return phases, and their FLOPs per example of training, as JSON."""
    return [
        {"start": phase.start, "stop": phase.stop, "what": phase.describe(), "training": count}
        for phase, count in zip(phases, flops, strict=True)
    ]


def flops_until(phases: Sequence[Mapping[str, Any]], examples: Callable[[int], int]) -> float:
    """Return the model FLOPs of training up to a step, for phases from `described`.

    `examples` returns how many examples were shown by then in the steps up to a given one.
    """
    seen = [examples(phase["stop"]) - examples(phase["start"]) for phase in phases]
    return float(sum(n * phase["training"] for n, phase in zip(seen, phases, strict=True)))


def count_parameters(params: Any) -> dict[str, int]:
    """Return the number of parameters, in total and by the first part of their paths."""
    sizes = {part: sum(map(_size, jax.tree.leaves(tree))) for part, tree in params.items()}
    return {"total": sum(sizes.values()), **sizes}


def make_plan(
    config: ConfigDict, *, vocab_size: int, total_steps: int, make_optimizer: Callable
) -> dict[str, Any]:
    """Return the plan of a run, the content of `plan.json`.

    It is for as many devices as the mesh of the config names, perhaps another number than there
    are. Runs of 0 `total_steps` only evaluate and have no training FLOPs. `make_optimizer` takes
    parameters. The FLOPs per example of `training` are the mean over the run, and `phases` has
    those of each phase.
    """
    if is_for_present_devices(config):
        shape = sharding.mesh_shape(config, jax.devices())
    else:
        shape = sharding.mesh_shape(config, math.prod(n or 1 for n in _named(config)))
    mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
    _, abstract, _, _ = init_state(
        lambda key: learners.build(config, vocab_size, key), make_optimizer, config, mesh
    )
    parameter_bytes = bytes_per_device(abstract.params)
    others = bytes_per_device(abstract.stats)  # BatchNorm statistics, teachers
    counted = flops_per_example(config, vocab_size) if total_steps else {}
    phases = phases_of(config, total_steps)
    if len(phases) > 1 or phases[0].changed:
        by_phase = training_flops(phases, vocab_size)
        steps = [phase.stop - phase.start for phase in phases]
        counted["training"] = float(np.average(by_phase, weights=steps))
    else:
        by_phase = [counted.get("training", 0.0)]
    return {
        "learner": config.learner.name,
        "model": config.model.name,
        "vocab_size": vocab_size,
        "parameters": count_parameters(abstract.params),
        "flops_per_example": counted,
        "total_steps": total_steps,
        "phases": described(phases, by_phase),
        "batch_size": config.batch_size,
        "devices": math.prod(shape.values()),
        "mesh": shape,
        "batch_per_device": config.batch_size / (shape["data"] * shape["fsdp"]),
        "bytes_per_device": {
            "parameters": parameter_bytes,
            "optimizer": bytes_per_device(abstract.opt_state),
            "gradients": parameter_bytes if total_steps else 0,
            "ema": bytes_per_device(abstract.ema),
            **({"other variables": others} if others else {}),
        },
    }


def is_for_present_devices(config: ConfigDict) -> bool:
    """Return whether the mesh of a config follows from the devices, or names as many as there are.

    Otherwise it names another number of devices.
    """
    named = _named(config)
    if -1 in named or (0 in named and jax.default_backend() != "cpu"):
        return True
    return math.prod(n or 1 for n in named) == jax.device_count()


def _named(config: ConfigDict) -> list[int]:
    return [config.mesh[axis] for axis in ("data", "fsdp", "tensor")]


def write_plan(plan: dict[str, Any], workdir: Path) -> str:
    """Write `plan.json`, and return the plan as tables of text."""
    files.write_text(workdir / "plan.json", json.dumps(plan, indent=2) + "\n")
    parameters = [(part, n, f"{n / 1e6:.1f}M") for part, n in plan["parameters"].items()]
    tables = [
        f"{plan['learner']} {plan['model']}, vocabulary {plan['vocab_size']:,}",
        format_table(parameters, ("parameters", "number", "")),
    ]
    if plan["flops_per_example"]:
        forward, training = (plan["flops_per_example"][k] for k in ("forward", "training"))
        mean = " (mean)" if len(plan["phases"]) > 1 else ""
        whole = training * plan["batch_size"] * plan["total_steps"]
        cost = [
            ("forward, one example", f"{forward / 1e9:.3f} GFLOP"),
            (f"training, one example{mean}", f"{training / 1e9:.3f} GFLOP"),
            (f"training, one step{mean}", f"{training * plan['batch_size'] / 1e12:.3f} TFLOP"),
            (f"training, {plan['total_steps']:,} steps", f"{whole / 1e18:.4g} EFLOP"),
        ]
        if len(plan["phases"]) > 1:
            cost += [
                (
                    f"steps {phase['start'] + 1:,} to {phase['stop']:,}, {phase['what']}",
                    f"{phase['training'] / 1e9:.3f} GFLOP an example",
                )
                for phase in plan["phases"]
            ]
        tables.append(format_table(cost, ("arithmetic", "")))
    memory = [
        (name, f"{n / 2**20:,.1f} MiB")
        for name, n in plan["bytes_per_device"].items()
        if name != "limit"
    ]
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items())
    tables += [
        format_table(memory, (f"per device ({mesh})", "")),
        f"batch {plan['batch_size']:,}: {plan['batch_per_device']:g} examples per device"
        + ("" if "activations" in plan["bytes_per_device"] else "; activations come on top"),
        f"written to {workdir / 'plan.json'}",
    ]
    return "\n\n".join(tables)


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes of a tree of abstract arrays on one device, by their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
