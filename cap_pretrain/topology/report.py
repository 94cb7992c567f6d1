"""What `check_topology` tells of a config on a topology, as a dict for JSON and as text."""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import flops
from cap_pretrain.telemetry.tables import format_table
from cap_pretrain.topology import hlo
from cap_pretrain.topology.compile import TooLarge, compile_step
from cap_pretrain.topology.cost import Cost, measure
from cap_pretrain.training import plan

Report = dict[str, Any]


def check(
    config: ConfigDict, vocab_size: int, topology: str, devices: Sequence[jax.Device]
) -> Report:
    """Compiles the step of a config, which went through `compile.prepare`, and tells what it takes.

    Raises:
      UserError: as `compile.compile_step`; or nothing is known of such chips.
    """
    chip = flops.chip_of(devices[0])
    if chip is None or chip.clock is None:
        raise UserError(f"--topology: nothing is known of the speed of {devices[0].device_kind}.")
    mesh = sharding.mesh_shape(config, devices)
    per_chip = config.batch_size / (mesh["data"] * mesh["fsdp"])
    report: Report = {
        "learner": config.learner.name,
        "model": config.model.name,
        "topology": topology,
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
    except TooLarge as e:
        return report | {"fits": False, "needed": e.needed, "limit": e.limit}
    memory = compiled.memory
    cost = measure(hlo.parse(compiled.text), chip, len(devices))
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
            "cycles": cost.cycles,
            "clock": chip.clock,
            "step_seconds": cost.seconds,
            "waiting_for_collectives": cost.waited["ici"],
            "waiting_for_copies": cost.waited["hbm"],
            "mfu": step_flops / (cost.seconds * len(devices) * chip.peak),
            "examples_per_second": config.batch_size / cost.seconds,
            "roofline_seconds": max(bounds.values()),
            "roofline": bounds,
        },
        "loops_of_unknown_length": cost.endless,
        "seconds_by_part": parts(cost, chip.clock),
        "seconds_by_operation": operations(cost, chip.clock),
        "compile_seconds": compiled.seconds,
    }


def parts(cost: Cost, clock: float) -> dict[str, dict[str, float]]:
    """Predicted seconds by part of the step and kind of work."""
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for (opcode, name), cycles in cost.cycles_of.items():
        table[_part(name)][_kind(opcode, name)] += cycles / clock
    return {part: dict(kinds) for part, kinds in sorted(table.items())}


def operations(cost: Cost, clock: float, count: int = 40) -> list[dict[str, Any]]:
    """The operations that take most, by where in the program they are from."""
    merged: collections.Counter = collections.Counter()
    for (opcode, name), cycles in cost.cycles_of.items():
        merged[opcode, _part(name), _short(name)] += cycles / clock
    return [
        {"seconds": seconds, "opcode": opcode, "part": part, "name": name}
        for (opcode, part, name), seconds in merged.most_common(count)
    ]


def _part(name: str) -> str:
    if "rematted_computation" in name:
        return "forward, again"
    if "transpose(jvp" in name:
        return "backward"
    return "forward" if "jvp(" in name else "update and other"


def _kind(opcode: str, name: str) -> str:
    if opcode in ("copy", "transpose", "reshape", "bitcast-convert"):
        return "layout"
    if re.search(r"BTNH|BSNH|BNTS|bthd|bhts|/vmap\(\)/", name):  # its einsums, and softmax
        return "attention"
    if "dot_general" in name or "conv_general" in name:
        return "products"
    return "other"


def _short(name: str) -> str:
    """The end of a path, without what transformations wrote around it."""
    steps = [
        s
        for s in name.split(";", maxsplit=1)[0].split("/")
        if s not in ("while", "body", "closed_call")
    ]
    return "/".join(steps[-2:]) or "(of the compiler)"


def text(report: Report, breakdown: bool = False) -> str:
    """A report for people."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items())
    per_chip = f"{report['batch_per_chip']:g} examples a chip"
    if report["accumulate"] > 1:
        per_chip += f" in {report['accumulate']} parts"
    head = (
        f"{report['learner']} {report['model']}, batch {report['batch_size']:,} on "
        f"{report['topology']}: {report['chips']:,} x {report['chip']}, mesh {mesh}; {per_chip}; "
        f"remat {report['remat']}"
    )
    if not report["fits"]:
        return f"{head}\n{too_large(report)}"
    rows = [(k, gib(report[k])) for k in ("arguments", "outputs", "temporaries", "code")]
    rows += [("needed", gib(report["needed"])), ("there is", gib(report["limit"]))]
    told = [head, format_table(rows, ("HBM a chip", "GiB"))]
    rows = [
        (kind, c["count"], megabytes(c["bytes"]), megabytes(c["sent"]), milli(c["seconds"]))
        for kind, c in report["collectives"].items()
    ]
    headers = ("collectives a step", "count", "MB a chip", "MB sent", "ms")
    told.append(format_table(rows, headers) if rows else "No collectives.")
    guess = report["predicted"]
    rows = [
        ("operations: the compiler's cycles", milli(guess["cycles"] / guess["clock"])),
        ("waiting for collectives", milli(guess["waiting_for_collectives"])),
        ("waiting for copies from HBM", milli(guess["waiting_for_copies"])),
        ("step, predicted", milli(guess["step_seconds"])),
        ("roofline: arithmetic of the model", milli(guess["roofline"]["compute"])),
        ("roofline: HBM", milli(guess["roofline"]["hbm"])),
        ("roofline: interconnect", milli(guess["roofline"]["interconnect"])),
    ]
    told += [
        format_table(rows, ("predicted, not measured", "ms")),
        f"{report['flops_per_step'] / 1e12:,.1f} TFLOP a step (counted), predicted "
        f"{guess['examples_per_second']:,.0f} examples/s, MFU {guess['mfu']:.1%}; by the "
        f"roofline this program takes no less than {milli(guess['roofline_seconds'])} ms",
    ]
    if loops := report["loops_of_unknown_length"]:
        told.append(f"Counted as one turn, as their length is not known: {', '.join(loops)}.")
    if breakdown:
        kinds = ("products", "attention", "layout", "other")
        rows = [
            (part, *(milli(by.get(kind, 0.0)) for kind in kinds))
            for part, by in report["seconds_by_part"].items()
        ]
        told.append(format_table(rows, ("ms, predicted", *kinds)))
        rows = [
            (f"{o['part']}: {o['name']}", o["opcode"], milli(o["seconds"]))
            for o in report["seconds_by_operation"]
        ]
        told.append(format_table(rows, ("operation", "opcode", "ms, predicted")))
    return "\n\n".join(told)


def too_large(report: Report) -> str:
    """By how much a step does not fit."""
    over = report["needed"] - report["limit"]
    return (
        f"does not fit: needs {gib(report['needed'])} GiB of HBM a chip, there are "
        f"{gib(report['limit'])}: {gib(over)} GiB too many"
    )


def table(reports: Sequence[Report]) -> str:
    """Several reports, a line each."""
    headers = ("chips", "topology", "batch", "accumulate", "remat", "HBM GiB", "step ms", "MFU",
               "examples/s", "collectives MB", "waiting ms")  # fmt: skip
    rows = []
    for r in reports:
        row = [str(r["chips"]), r["topology"], f"{r['batch_size']:,}", r["accumulate"], r["remat"]]
        row.append(gib(r["needed"]))
        if r["fits"]:
            guess = r["predicted"]
            waiting = guess["waiting_for_collectives"] + guess["waiting_for_copies"]
            row += [milli(guess["step_seconds"]), f"{guess['mfu']:.1%}"]
            row += [f"{guess['examples_per_second']:,.0f}"]
            row += [megabytes(sum(c["bytes"] for c in r["collectives"].values())), milli(waiting)]
        else:
            row += ["too large", *4 * ["-"]]
        rows.append(row)
    return format_table(rows, headers)


def gib(n: float) -> str:
    """Bytes in GiB."""
    return f"{n / 2**30:.2f}"


def megabytes(n: float) -> str:
    """Bytes in MB."""
    return f"{n / 1e6:,.1f}"


def milli(seconds: float) -> str:
    """Seconds in ms."""
    return f"{seconds * 1e3:,.1f}" if math.isfinite(seconds) else "-"
