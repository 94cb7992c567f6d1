r"""Measure the training step on the devices that are there, against PyTorch and other settings.

    python tools/bench_step.py --suite=gpu          # about five minutes; none was measured yet
    python tools/bench_step.py --suite=cpu
    python tools/bench_step.py --config=configs/pretrain.py:objective=cap,model=S/16 \
        --config.batch_size=8 --compare=torch --against="--config.model.unroll=1"

The step is that of a run, in learner, optimizer, shardings and buffer donation, on random images
and tokens that are already on the devices. Each candidate has a process of its own and takes a
block of steps in turn, so that changes of the machine's speed affect all alike. Where memory does
not suffice for all together, they run one after the other, and if one alone needs too much, the
batch of a suite is halved; both are reported. A candidate given by --against has further settings,
and perhaps environment variables: "XLA_FLAGS=… --config.model.remat=lean", or "PYTHONPATH=…" for
another version of the package; "--config=configs/pretrain.py:objective=siglip" is another config,
whose parameters may differ. --compare=torch is a plain PyTorch model of the same size and number of
parameters (tools/torch_baseline.py), compiled by torch.compile on GPUs and eager on CPUs;
torch-eager and torch-compiled choose. PyTorch has AdamW, and so have we, unless --config.optim.name
is given.

The columns: median and quartiles of the time of a step; examples a second; model FLOP utilization,
of the FLOPs without rematerialization, relative to the dense bfloat16 peak, or to the measured rate
of a matrix product on CPUs (MFU(cpu)); the peak of memory on a device, from JAX's or PyTorch's
allocator, or on CPUs from JAX's compiler; seconds to compile (JAX_COMPILATION_CACHE_DIR shortens
them); speed, how many times as fast as PyTorch (without it: as the first row), the median over the
rounds; for the kinds of GPUs and TPUs that tools/check_topology.py knows, the time that it predicts
for the same compiled program; on CPUs the CPU time of all cores, and the speed by it. On a busy
machine only that speed is fair, and only with --threads=1, since PyTorch's threads wait for each
other at every operation.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `tools`

from cap_pretrain import files
from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry.tables import written
from tools.bench_step_candidates import Case, Variant, Worker, fitting, say

PRETRAIN = "configs/pretrain.py:objective={},model={}"


# Objectives and sizes, with examples per device. The candidates of L/14 exceed 80 GB together.
SUITES = {
    "cpu": [Case(f"{o} S/16", PRETRAIN.format(o, "S/16"), 8) for o in ("cap", "clip")],
    "gpu": [
        Case(f"{o} {size}", PRETRAIN.format(o, size), 256, together=size != "L/14", platform="gpu")
        for o, size in zip(
            ("cap", "cap", "clip", "cappa", "siglip"), ("B/16", "L/14", *["B/16"] * 3), strict=True
        )
    ],
}
SUITE_SECONDS = 240  # no case starts later than this


def records(case: Case, workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """Return what was measured of a case, JSON-compatible, a record for each candidate."""
    first = workers[0].facts
    alike = [worker for worker in workers if not worker.variant.config]
    counts = {worker.name: worker.facts["parameters"] for worker in alike}
    if len(set(counts.values())) > 1:
        raise UserError(f"{case.name}: the candidates differ in their parameters: {counts}.")
    reference = next((w for w in workers if w.variant.kind == "torch"), workers[0])
    found = []
    for worker in workers:
        median = statistics.median(worker.seconds)
        quartiles = statistics.quantiles(worker.seconds, method="inclusive")
        facts = first | worker.facts
        if facts["platform"] != first["platform"]:
            raise UserError(
                f"{case.name}: {worker.name} runs on a {facts['platform']}, but {workers[0].name} "
                f"on a {first['platform']}; install JAX and PyTorch for the same devices."
            )
        rate = facts["flops_per_step"] / median
        found.append(
            {
                "case": case.name,
                "candidate": worker.name,
                **facts,
                "together": case.together,
                "step_seconds": median,
                "quartiles": [quartiles[0], quartiles[-1]],
                "blocks": worker.seconds,
                "cpu_seconds": statistics.median(worker.cpu_seconds),
                "examples_per_second": facts["batch_size"] / median,
                "mfu": rate / first["peak_flops"] if first["peak_flops"] else None,
                "memory_bytes": worker.memory,
                "speed": _speed(worker.seconds, reference.seconds, case.together),
                "cpu_speed": _speed(worker.cpu_seconds, reference.cpu_seconds, case.together),
                "predicted_seconds": worker.facts.get("predicted_seconds"),
            }
        )
    return found


def _speed(own: list[float], reference: list[float], together: bool) -> float:
    """Return the median of reference / own, by rounds if the two took turns."""
    if not together:
        return statistics.median(reference) / statistics.median(own)
    return statistics.median(theirs / ours for theirs, ours in zip(reference, own, strict=True))


def _ms(seconds: float) -> str:
    """Return milliseconds with three digits or more."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the records as a table."""
    rows = []
    for record in found:
        mfu, memory, compiled = (record[k] for k in ("mfu", "memory_bytes", "compile_seconds"))
        alone = "" if record["together"] else ", alone"
        row = {
            "case": record["case"],
            "batch": f"{record['batch_size']}{alone}",
            "step": record["candidate"],
            "ms": _ms(record["step_seconds"]),
            "quartiles": " - ".join(map(_ms, record["quartiles"])),
            "examples/s": f"{record['examples_per_second']:.3g}",
            "MFU": f"{mfu:.1%}" if mfu else "",
            "GiB": f"{memory / 2**30:.2f}" if memory else "",
            "compile s": f"{compiled:.1f}" if compiled else "",
            "speed": f"{record['speed']:.3f}",
        }
        if any(r["predicted_seconds"] for r in found):
            predicted = record["predicted_seconds"]
            row["predicted ms"] = _ms(predicted) if predicted else ""
        if record["platform"] == "cpu":
            row["CPU ms"] = _ms(record["cpu_seconds"])
            row["CPU speed"] = f"{record['cpu_speed']:.3f}"
        rows.append(row)
    return written(rows, "markdown")


def heading(found: Sequence[dict[str, Any]]) -> str:
    """Return lines about devices, versions, parameters and optimizers."""
    first = found[0]
    lines = [
        f"{first['devices']} x {first['device']}; "
        + ", ".join(dict.fromkeys(r["version"] for r in found)),
        f"MFU is relative to {first['peak_source']}" if first["mfu"] else first["peak_source"],
    ]
    for record in {r["case"]: r for r in found}.values():
        own = [r for r in found if r["case"] == record["case"]]
        how = (f"{r['candidate']}: {r['optimizer']}, {r['dtype']}" for r in own)
        lines.append(f"{record['case']}: {record['parameters']:,} parameters; {'; '.join(how)}")
    return "\n".join(lines)


def candidates(args: argparse.Namespace, overrides: Sequence[str]) -> list[Variant]:
    """Return what to measure of each case: ours, ours with other settings, PyTorch's."""
    ours = ()
    if args.compare and not any(o.startswith("--config.optim.name=") for o in overrides):
        ours = ("--config.optim.name=adamw",)
    found = [Variant("ours", "ours", ours)]
    for text in args.against:
        parts = shlex.split(text)
        given = tuple(part for part in parts if part.startswith("--config."))
        configs = [part for part in parts if part.startswith("--config=")]
        variables = [part.partition("=") for part in parts if part not in (*given, *configs)]
        if not all(equals and name.isidentifier() for name, equals, _ in variables):
            raise UserError(
                f"--against: {text!r} is not made of --config.FIELD=VALUE, --config=FILE and "
                "NAME=VALUE."
            )
        environment = tuple((name, value) for name, _, value in variables)
        config = "".join(configs[-1:]).removeprefix("--config=")
        found.append(Variant(f"ours, {text}", "ours", (*ours, *given), environment, config=config))
    for name in args.compare:
        compiled = {"torch": None, "torch-eager": False, "torch-compiled": True}[name]
        found.append(Variant(name, "torch", (), (), compiled))
    return found


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Measure, print and write what the arguments ask for; return the exit status."""
    start = time.monotonic()
    if args.suite == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if args.suite and not args.compare:
        args.compare = ["torch"]
    args.compare = [name for name in args.compare if name != "none"]
    if args.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.compare:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]  # PyTorch's step is for one GPU
    cases = SUITES[args.suite] if args.suite else [Case(args.config, args.config)]
    if any(o.startswith("--config.batch_size=") for o in overrides):
        cases = [dataclasses.replace(c, batch_per_device=0, platform=None) for c in cases]
    variants = candidates(args, overrides)
    found: list[dict[str, Any]] = []
    failed = []
    for case in cases:
        if args.suite == "gpu" and time.monotonic() - start > SUITE_SECONDS:
            failed.append(f"{case.name}: left out, since {SUITE_SECONDS} s were over.")
            continue
        say(f"{case.name} …")
        try:
            found += records(*fitting(case, variants, overrides, args.steps))
        except UserError as error:
            failed.append(str(error))
            say(failed[-1])
            continue
        if args.json:
            files.write_text(args.json, json.dumps(found, indent=2) + "\n")
    if found:
        print(f"{heading(found)}\n\n{table(found)}")
    if failed:
        raise UserError("\n".join(failed))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    args, overrides = _parse(argv)
    return arguments.run(lambda args: run(args, overrides), args, catch=(UserError,))


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = arguments.documented_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="configs/NAME.py[:key=value,…]")
    what.add_argument("--suite", choices=SUITES, help="configs to measure in one table")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        choices=["torch", "torch-eager", "torch-compiled", "none"],
        help="also measure PyTorch; may be repeated; default: torch with --suite, else none",
    )
    parser.add_argument(
        "--against", action="append", default=[], help="further settings of ours; may be repeated"
    )
    parser.add_argument(
        "--steps", type=arguments.positive_int, default=20, help="of each candidate; default: 20"
    )
    parser.add_argument("--threads", type=arguments.positive_int, help="CPU cores; default: all")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if words and words[-1] == "--against":  # argparse would take its value for an option
            words[-1] += f"={word}"
        else:
            words.append(word)
    return parser.parse_known_args(words)


if __name__ == "__main__":
    sys.exit(main())
