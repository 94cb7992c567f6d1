"""Searching for settings that fit and are fastest, and predicting weak scaling."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.models.layers import REMAT_POLICIES
from cap_pretrain.topology.compilers import compiler_of, open_topology
from cap_pretrain.topology.report import Report, check, gib, milli
from cap_pretrain.validation import validate

# Rematerialization policies tried by default: recompute nothing, or only what is cheap.
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
    """Try settings that change how a step is computed but not its result; return the reports.

    For each rematerialization policy, gradients are accumulated over as few parts of the batch as
    fit, then over more parts as long as that is faster, because smaller arrays may stay in the
    core's own memory. If accumulation is not possible, the batch is reduced instead. If nothing
    fits, parameters are sharded over all devices.

    `config` is from `compile.prepare`, and `first` the report of `check` on it unchanged;
    `everything` tries all policies, not only `USUAL_POLICIES`; `say` receives lines about progress.
    The key `changes` of a report has the changed fields.
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
    """Return a change that should fit, at most half of the memory; None if there is none."""
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
    """Return whether the changed config is valid on the devices."""
    try:
        changed = _changed(config, changes)
        validate(changed)
        sharding.mesh_shape(changed, devices)
    except UserError:
        return False
    return changed.batch_size >= 1


def _changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Return a copy of the config with some fields changed."""
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(changes)
    return config


def _try(config, changes, vocab_size, topology, devices, say: Say) -> Report | None:
    """Return the report with these changes, or None if they make the config invalid."""
    if not _is_possible(config, changes, devices):
        return None
    say(f"trying {options(changes)} …")
    report = check(_changed(config, changes), vocab_size, topology, devices)
    outcome = milli(report["predicted"]["step_seconds"]) + " ms" if report["fits"] else "too large"
    say(f"  {gib(report['needed'])} GiB, {outcome}")
    return report | {"changes": changes}


def options(changes: dict[str, Any]) -> str:
    """Return changes in the syntax of the command line."""
    return " ".join(f"--config.{field}={value}" for field, value in changes.items())


def advice(first: Report, tried: Sequence[Report]) -> str:
    """Return a line about the setting that fits and has the most examples per second."""
    fitting = [report for report in [first, *tried] if report["fits"]]
    if not fitting:
        return (
            f"Nothing that was tried fits: use more {first['device']}s, a smaller batch or a "
            "smaller model."
        )
    best = max(fitting, key=_rate)
    predicted = best["predicted"]
    what = options(best["changes"]) if "changes" in best else "the config as given"
    return (
        f"Predicted to be the fastest that fits: {what}: {gib(best['needed'])} GiB, "
        f"{milli(predicted['step_seconds'])} ms per step, MFU {predicted['mfu']:.1%}."
    )


def _rate(report: Report) -> float:
    return report["predicted"]["examples_per_second"]


def scan(
    config: ConfigDict, vocab_size: int, topology: str, chips: Sequence[int], *, say: Say
) -> list[Report]:
    """Predict weak scaling: reports on several numbers of devices, with a fixed batch on each.

    `config` is from `compile.prepare`, its batch size for `topology`, which determines the kind of
    device and the batch on each; `say` receives lines about progress. Raises UserError if there is
    no topology of so many devices, or the batch does not divide by them.
    """
    compiler, base = compiler_of(topology), len(open_topology(topology))
    if config.batch_size % base:
        raise UserError(
            f"batch_size: {config.batch_size} does not divide by the {base} {compiler.device}s."
        )
    reports = []
    for number in chips:
        name, slices = compiler.of_size(topology, number)
        changed = _changed(config, {"batch_size": config.batch_size // base * number})
        say(f"trying {slices} x {name} …")
        devices = open_topology(name, slices)
        report = check(changed, vocab_size, name if slices == 1 else f"{slices} x {name}", devices)
        reports.append(report)
    return reports
