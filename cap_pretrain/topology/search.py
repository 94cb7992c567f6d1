"""Searches: what would make a step fit, what is fastest, and how it scales with the chips."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.models.layers import REMAT_POLICIES
from cap_pretrain.topology.compile import open_topology
from cap_pretrain.topology.report import Report, check, gib, milli

# Slices of these chips are planes, of at most so many chips (Google Cloud documentation, "TPU v5e"
# and "TPU v6e": 16 x 16); those of others are blocks.
PLANES = ("v5e", "v6e")
LARGEST_PLANE = 256

# What is tried when a step does not fit: nothing is computed twice, or only what is cheap.
USUAL_POLICIES = ("none", "lean")

Say = Callable[[str], None]


def fit(
    config: ConfigDict,
    vocab_size: int,
    topology: str,
    devices: Sequence[jax.Device],
    first: Report,
    *,
    everything: bool,
    say: Say,
) -> list[Report]:
    """Tries other settings of the same step, which change how it is computed and not what.

    For each policy of rematerialisation, the batch is taken in as few parts as fit, and in more for
    as long as that is faster: what is small enough stays in the core's own memory. A learner that
    cannot do so gets a smaller batch instead. If nothing fits, parameters are split over all chips.

    Args:
      config: went through `compile.prepare`.
      vocab_size: of the tokenizer.
      topology: its name.
      devices: its devices.
      first: what `check` said of the config as it is.
      everything: try all policies, not only the usual ones.
      say: is told what is tried.

    Returns:
      What `check` says of each, with what was changed as `changes`.
    """
    tried: list[Report] = []
    for policy in REMAT_POLICIES if everything else USUAL_POLICIES:
        changes: dict[str, Any] = {"model.remat": policy}
        best: Report | None = None
        while True:
            known = first if policy == first["remat"] and len(changes) == 1 else None
            report = known or _try(config, changes, vocab_size, topology, devices, say)
            if report is None:
                break
            if not known:
                tried.append(report)
            if report["fits"]:
                if best and _rate(report) <= _rate(best):
                    break
                best = report
            smaller = _smaller(config, changes, report, devices)
            if smaller is None or (best and "accumulate" not in smaller):
                break
            changes = changes | smaller
    if not any(report["fits"] for report in [first, *tried]):
        split = {"mesh.data": 1, "mesh.fsdp": len(devices), "mesh.tensor": 1}
        changes = {"model.remat": "full", **changes, **split}
        tried += filter(None, [_try(config, changes, vocab_size, topology, devices, say)])
    return tried


def _smaller(config: ConfigDict, changes: dict, report: Report, devices) -> dict | None:
    """Changes that take less memory: half of it, or so little that it fits; None for none."""
    factor = 2 ** max(1, math.ceil(math.log2(report["needed"] / report["limit"])))
    for field, value in (
        ("accumulate", report["accumulate"] * factor),
        ("batch_size", report["batch_size"] // factor),
    ):
        changed = {**changes, field: value}
        if _is_possible(config, changed, devices):
            return {field: value}
    return None


def _is_possible(
    config: ConfigDict, changes: dict[str, Any], devices: Sequence[jax.Device]
) -> bool:
    try:
        changed = _changed(config, changes)
        configs.validate(changed)
        sharding.mesh_shape(changed, devices)
    except UserError:
        return False
    return changed.batch_size >= 1


def _changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(changes)
    return config


def _try(config, changes, vocab_size, topology, devices, say: Say) -> Report | None:
    """What `check` says with these changes; None if the config cannot have them."""
    if not _is_possible(config, changes, devices):
        return None
    told = options(changes)
    say(f"trying {told} …")
    report = check(_changed(config, changes), vocab_size, topology, devices)
    outcome = milli(report["predicted"]["step_seconds"]) + " ms" if report["fits"] else "too large"
    say(f"  {gib(report['needed'])} GiB, {outcome}")
    return report | {"changes": changes}


def options(changes: dict[str, Any]) -> str:
    """Changes as they are given on the command line."""
    return " ".join(f"--config.{field}={value}" for field, value in changes.items())


def advice(first: Report, tried: Sequence[Report]) -> str:
    """Names the fastest of what fits, by examples a second."""
    fitting = [report for report in [first, *tried] if report["fits"]]
    if not fitting:
        return "Nothing that was tried fits: take more chips, a smaller batch or a smaller model."
    best = max(fitting, key=_rate)
    guess = best["predicted"]
    what = options(best["changes"]) if "changes" in best else "the config as it is"
    return (
        f"Predicted to be the fastest of what fits: {what}: {gib(best['needed'])} GiB, "
        f"{milli(guess['step_seconds'])} ms a step, MFU {guess['mfu']:.1%}."
    )


def _rate(report: Report) -> float:
    return report["predicted"]["examples_per_second"]


def scan(
    config: ConfigDict, vocab_size: int, topology: str, chips: Sequence[int], *, say: Say
) -> list[Report]:
    """Weak scaling: the step on so many chips of a kind, with as many examples for each.

    Args:
      config: went through `compile.prepare`; its batch is that of `topology`.
      vocab_size: of the tokenizer.
      topology: where the config's batch size holds.
      chips: numbers of chips, each a power of two.
      say: is told what is tried.

    Raises:
      UserError: there is no slice of so many chips, or the batch cannot be split over them.
    """
    kind = topology.partition(":")[0]
    there = len(open_topology(topology))
    if config.batch_size % there:
        raise UserError(f"batch_size: {config.batch_size} is no multiple of the {there} chips.")
    reports = []
    for number in chips:
        name, slices = slice_of(kind, number)
        changed = _changed(config, {"batch_size": config.batch_size // there * number})
        say(f"trying {slices} x {name} …")
        devices = open_topology(name, slices)
        report = check(changed, vocab_size, name if slices == 1 else f"{slices} x {name}", devices)
        reports.append(report)
    return reports


def slice_of(kind: str, chips: int) -> tuple[str, int]:
    """A topology of so many chips in all, and how many of it.

    Raises:
      UserError: it is no power of two from 4 on.
    """
    if chips < 4 or chips & (chips - 1):
        raise UserError(f"--scan: {chips} chips is no power of two from 4 on.")
    slices = max(1, chips // LARGEST_PLANE) if kind in PLANES else 1
    doublings = int(math.log2(chips // slices))
    dimensions = 2 if kind in PLANES else 3
    shape = sorted(2 ** ((doublings + extra) // dimensions) for extra in range(dimensions))
    if dimensions == 3 and doublings < 6:  # less than a cube of 4 x 4 x 4
        shape = {2: [2, 2, 1], 3: [2, 2, 2], 4: [2, 2, 4], 5: [2, 4, 4]}[doublings]
    return f"{kind}:{'x'.join(map(str, shape))}", slices
