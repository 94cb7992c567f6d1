"""Reports of tools/check_topology.py on a config and a topology, as JSON dicts and as text."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import flops
from cap_pretrain.telemetry.tables import format_table
from cap_pretrain.topology import hlo
from cap_pretrain.topology.compile import compile_step
from cap_pretrain.topology.compiler import Compiler, OutOfMemoryError
from cap_pretrain.topology.compilers import compiler_for
from cap_pretrain.topology.cost import Cost
from cap_pretrain.training import plan

Report = dict[str, Any]
"""The report of one config on one topology, JSON-compatible; see `check`."""


def check(
    config: ConfigDict, vocab_size: int, topology: str, devices: Sequence[jax.Device]
) -> Report:
    """Compile the step of a config from `compile.prepare` and report its memory and predicted time.

    `topology` is the name of `devices`. If the compiler refuses the step because it does not fit
    into HBM, the report ends with the keys `fits`, `needed` and `limit`. Raises UserError as
    `compile.compile_step`, or if the performance of these devices is unknown.
    """
    compiler, chip = compiler_for(devices), flops.chip_of(devices[0])
    if not (chip and chip.peak and chip.hbm_bandwidth and chip.ici_bandwidth):
        raise UserError(f"--topology: the performance of {devices[0].device_kind} is unknown.")
    mesh = sharding.mesh_shape(config, devices)
    per_chip = config.batch_size / (mesh["data"] * mesh["fsdp"])
    report: Report = {
        "learner": config.learner.name,
        "model": config.model.name,
        "topology": topology,
        "device": compiler.device,
        "chip": devices[0].device_kind,
        "chips": len(devices),
        "mesh": mesh,
        "batch_size": config.batch_size,
        "batch_per_chip": per_chip,
        "accumulate": config.accumulate,
        "remat": config.model.remat,
    }
    try:
        compiled = compile_step(config, vocab_size, devices)
    except OutOfMemoryError as e:
        return report | {"fits": False, "needed": e.needed, "limit": e.limit}
    memory = compiled.memory
    cost = compiler.measure(hlo.parse(compiled.text), chip, devices)
    training = plan.flops_per_example(config, vocab_size)["training"]
    step_flops = training * config.batch_size
    bounds = {
        "compute": step_flops / len(devices) / chip.peak,
        "hbm": cost.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(c.sent for c in cost.collectives.values()) / chip.ici_bandwidth,
    }
    return report | {
        "fits": memory.needed <= memory.limit,
        "needed": memory.needed,
        "limit": memory.limit,
        "arguments": memory.arguments,
        "outputs": memory.outputs,
        "temporaries": memory.temporaries,
        "code": memory.code,
        "flops_per_example": training,
        "flops_per_step": step_flops,
        "collectives": {
            kind: {"count": c.count, "bytes": c.bytes, "sent": c.sent, "seconds": c.seconds}
            for kind, c in sorted(cost.collectives.items())
        },
        "predicted": {
            **compiler.operations(cost),
            "step_seconds": cost.seconds,
            "waiting_for_collectives": cost.waited["ici"],
            "waiting_for_copies": cost.waited["hbm"],
            "mfu": step_flops / (cost.seconds * len(devices) * chip.peak),
            "examples_per_second": config.batch_size / cost.seconds,
            "roofline_seconds": max(bounds.values()),
            "roofline": bounds,
        },
        "loops_of_unknown_length": cost.endless,
        "seconds_by_part": parts(cost, compiler),
        "seconds_by_operation": operations(cost),
        "compile_seconds": compiled.seconds,
        **compiler.notes(config, vocab_size, cost, devices),
    }


def parts(cost: Cost, compiler: Compiler) -> dict[str, dict[str, float]]:
    """Return predicted seconds by part of the step (such as "forward") and kind of work."""
    seconds: dict[str, dict[str, float]] = {}
    for (kernel, name), work in cost.work_of.items():
        kinds, kind = seconds.setdefault(_part(name), {}), compiler.kind(kernel, name)
        kinds[kind] = kinds.get(kind, 0) + work / cost.rate
    return dict(sorted(seconds.items()))


def operations(cost: Cost, count: int = 40) -> list[dict[str, Any]]:
    """Return the `count` slowest operations with their predicted seconds and origin."""
    merged: dict[tuple[str, str, str], float] = collections.defaultdict(float)
    for (kernel, name), work in cost.work_of.items():
        merged[kernel, _part(name), _short(name)] += work / cost.rate
    return [
        {"seconds": seconds, "opcode": kernel, "part": part, "name": name}
        for (kernel, part, name), seconds in sorted(
            merged.items(), key=lambda item: item[1], reverse=True
        )[:count]
    ]


def _part(name: str) -> str:
    if "rematted_computation" in name:
        return "forward, again"
    if "transpose(jvp" in name:
        return "backward"
    return "forward" if "jvp(" in name else "update and other"


def _short(name: str) -> str:
    """Return the end of an operation's path, without loops and calls."""
    steps = [
        s
        for s in name.split(";", maxsplit=1)[0].split("/")
        if s not in ("while", "body", "closed_call")
    ]
    return "/".join(steps[-2:]) or "(of the compiler)"


def text(report: Report, breakdown: bool = False) -> str:
    """Return a report as text; `breakdown` adds predicted time by part and by operation."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items())
    per_chip = f"{report['batch_per_chip']:g} examples per {report['device']}"
    if report["accumulate"] > 1:
        per_chip += f" in {report['accumulate']} parts"
    head = (
        f"{report['learner']} {report['model']}, batch {report['batch_size']:,} on "
        f"{report['topology']}: {report['chips']:,} x {report['chip']}, mesh {mesh}; {per_chip}; "
        f"remat {report['remat']}"
    )
    if not report["fits"]:
        head += f"\n{too_large(report)}"
    if "predicted" not in report:
        return head
    rows: list[tuple] = [
        (key, gib(report[key])) for key in ("arguments", "outputs", "temporaries", "code")
    ]
    rows += [("needed", gib(report["needed"])), ("available", gib(report["limit"]))]
    blocks = [head, format_table(rows, (f"{memory_of(report)} per {report['device']}", "GiB"))]
    rows = [
        (kind, c["count"], megabytes(c["bytes"]), megabytes(c["sent"]), milli(c["seconds"]))
        for kind, c in report["collectives"].items()
    ]
    unit = f"MB per {report['device']}"
    headers = ("collectives per step", "count", unit, "MB sent", "ms")
    blocks.append(format_table(rows, headers) if rows else "No collectives.")
    predicted = report["predicted"]
    rows = [
        *((what, milli(seconds)) for what, seconds in predicted["operations"].items()),
        ("waiting for collectives", milli(predicted["waiting_for_collectives"])),
        ("waiting for copies from HBM", milli(predicted["waiting_for_copies"])),
        ("step, predicted", milli(predicted["step_seconds"])),
        ("roofline: arithmetic of the model", milli(predicted["roofline"]["compute"])),
        ("roofline: HBM", milli(predicted["roofline"]["hbm"])),
        ("roofline: interconnect", milli(predicted["roofline"]["interconnect"])),
    ]
    blocks += [
        format_table(rows, ("predicted, not measured", "ms")),
        f"{report['flops_per_step'] / 1e12:,.1f} TFLOP per step (counted), predicted "
        f"{predicted['examples_per_second']:,.0f} examples/s, MFU {predicted['mfu']:.1%}; by "
        f"the roofline, this program takes at least {milli(predicted['roofline_seconds'])} ms",
    ]
    blocks += report.get("remarks", [])
    if loops := report["loops_of_unknown_length"]:
        blocks.append(f"Loops of unknown length, counted once: {', '.join(loops)}.")
    if breakdown:
        kinds = ("products", "attention", "layout", "other")
        rows = [
            (part, *(milli(by.get(kind, 0.0)) for kind in kinds))
            for part, by in report["seconds_by_part"].items()
        ]
        blocks.append(format_table(rows, ("ms, predicted", *kinds)))
        rows = [
            (f"{o['part']}: {o['name']}", o["opcode"], milli(o["seconds"]))
            for o in report["seconds_by_operation"]
        ]
        blocks.append(format_table(rows, ("operation", "opcode", "ms, predicted")))
        rows = [
            (k["kernel"], f"{k['count']:,.0f}", f"{k['bytes'] / 1e9:,.2f}", milli(k["seconds"]))
            for k in report.get("kernels", [])
        ]
        if rows:
            blocks.append(format_table(rows, ("kernel", "count", "GB", "ms, predicted")))
    return "\n\n".join(blocks)


def too_large(report: Report) -> str:
    """Return a line about a step that does not fit: needed, available and missing memory."""
    over = report["needed"] - report["limit"]
    return (
        f"does not fit: needs {gib(report['needed'])} GiB of {memory_of(report)} per "
        f"{report['device']}, "
        f"{gib(report['limit'])} are available: {gib(over)} GiB too many"
    )


def memory_of(report: Report) -> str:
    """Return what the memory of a device is called; that of some GPUs is not HBM."""
    return "memory" if report["device"] == "GPU" else "HBM"


def table(reports: Sequence[Report]) -> str:
    """Return several reports as a table with one line each."""
    headers = (
        *(f"{reports[0]['device']}s", "topology", "batch", "accumulate", "remat"),
        *(f"{memory_of(reports[0])} GiB", "step ms", "MFU", "examples/s", "collectives MB"),
        "waiting ms",
    )
    rows = []
    for r in reports:
        row = [str(r["chips"]), r["topology"], f"{r['batch_size']:,}", r["accumulate"], r["remat"]]
        row.append(gib(r["needed"]))
        if r["fits"]:
            predicted = r["predicted"]
            waiting = predicted["waiting_for_collectives"] + predicted["waiting_for_copies"]
            row += [milli(predicted["step_seconds"]), f"{predicted['mfu']:.1%}"]
            row += [f"{predicted['examples_per_second']:,.0f}"]
            row += [megabytes(sum(c["bytes"] for c in r["collectives"].values())), milli(waiting)]
        else:
            row += ["too large", *4 * ["-"]]
        rows.append(row)
    return format_table(rows, headers)


def gib(n: float) -> str:
    """Format bytes in GiB."""
    return f"{n / 2**30:.2f}"


def megabytes(n: float) -> str:
    """Format bytes in MB."""
    return f"{n / 1e6:,.1f}"


def milli(seconds: float) -> str:
    """Format seconds in ms; "-" if not finite."""
    return f"{seconds * 1e3:,.1f}" if math.isfinite(seconds) else "-"
