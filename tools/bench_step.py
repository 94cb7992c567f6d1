r"""Measure the training step on the devices that are there, against PyTorch and other settings.

    python tools/bench_step.py --suite=gpu                  # a table within five minutes
    python tools/bench_step.py --suite=cpu --compare=torch
    python tools/bench_step.py --config=configs/pretrain.py:objective=cap,model=S/16 \
        --config.batch_size=8 --compare=torch --against="--config.model.unroll=1"

The step is that of a run, in learner, optimizer, shardings and buffer donation, on random images
and tokens that are already on the devices. Each candidate has a process of its own and takes a
block of steps in turn, so that changes of the machine's speed meet all of them. Where their memory
does not suffice together, they run one after the other, and if one alone needs too much, the batch
is halved; both are reported. A candidate given by --against has further settings, and perhaps
environment variables: "XLA_FLAGS=… --config.model.remat=lean", or "PYTHONPATH=…" for another
version of the package. --compare=torch is a plain PyTorch model of the same size and number of
parameters (tools/torch_baseline.py), compiled by torch.compile on GPUs and eager on CPUs;
torch-eager and torch-compiled choose. PyTorch has AdamW, and so have we, unless --config.optim.name
is given.

The columns: median and quartiles of the time of a step; examples a second; model FLOP utilization,
of the FLOPs without rematerialization, relative to the dense bfloat16 peak, or to the measured rate
of a matrix product on CPUs (MFU(cpu)); the peak of memory on a device, from JAX's or PyTorch's
allocator, or on CPUs from JAX's compiler; seconds to compile (JAX_COMPILATION_CACHE_DIR shortens
them); and speed, how many times as fast as PyTorch (without it: as the first row), the median over
the rounds. --prediction reads the times that tools/check_topology.py --json has written.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cap_pretrain import files
from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry.tables import written

WORKER = Path(__file__).with_name("bench_step_worker.py")
WARMUP = 2  # steps that are not timed
BLOCK = 0.5  # seconds that a block of steps should take at least
BLOCKS = 5  # fewest blocks of a candidate
PRETRAIN = "configs/pretrain.py:objective={},model={}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A config to measure; a batch per device of 0 keeps the batch size of the config."""

    name: str
    config: str
    batch_per_device: int = 0
    together: bool = True  # whether the candidates are in memory at the same time


# Objectives and sizes, with examples per device. The candidates of L/14 exceed 80 GB together.
SUITES = {
    "cpu": [Case(f"{o} S/16", PRETRAIN.format(o, "S/16"), 8) for o in ("cap", "clip")],
    "gpu": [
        Case("cap B/16", PRETRAIN.format("cap", "B/16"), 256),
        Case("cap L/14", PRETRAIN.format("cap", "L/14"), 256, together=False),
        Case("clip B/16", PRETRAIN.format("clip", "B/16"), 256),
        Case("cappa B/16", PRETRAIN.format("cappa", "B/16"), 256),
        Case("siglip B/16", PRETRAIN.format("siglip", "B/16"), 256),
    ],
}
SUITE_SECONDS = 270  # no case starts later than this


@dataclasses.dataclass(frozen=True)
class Variant:
    """A candidate: our step with further settings, or PyTorch's."""

    name: str
    kind: str  # ours or torch
    overrides: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    compiled: bool | None = None  # by torch.compile; None: on GPUs


class OutOfMemoryError(Exception):
    """A candidate does not fit into the memory of a device."""


class Worker:
    """The process of a candidate. `facts` are set by `wait`."""

    facts: dict[str, Any]

    def __init__(self, case: Case, variant: Variant, overrides: Sequence[str], shared: bool):
        environment = dict(os.environ)
        if shared:  # the memory of a GPU
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.name, self.seconds, self.memory = variant.name, [], None
        self._process = subprocess.Popen(
            [sys.executable, WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | dict(variant.environment),
        )
        self._send(
            kind=variant.kind,
            config=case.config,
            overrides=[*overrides, *variant.overrides],
            batch_per_device=case.batch_per_device,
            compiled=variant.compiled,
            warmup=WARMUP,
        )

    def wait(self) -> None:
        """Wait until the candidate is ready; raise UserError or OutOfMemoryError if it fails."""
        self.facts = self._receive()

    def take(self, steps: int) -> float:
        """Return the seconds of each of so many steps, on average."""
        self._send(steps=steps)
        answer = self._receive()
        self.memory = answer["memory"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, **content: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # of a process that failed; its answer says why
            print(json.dumps(content), file=self._process.stdin, flush=True)

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            status = self._process.wait()
            if status == -9:
                raise OutOfMemoryError  # the system kills a process that takes too much
            raise UserError(f"{self.name}: the process ended with status {status}.")
        answer = json.loads(line)
        if "error" not in answer:
            return answer
        if answer["error"] == "memory":
            raise OutOfMemoryError
        raise UserError(f"{self.name}: {answer['message']}")


def measure(
    case: Case, variants: Sequence[Variant], overrides: Sequence[str], steps: int
) -> list[Worker]:
    """Return the closed workers of a case, with facts and seconds by block."""
    groups = [list(variants)] if case.together else [[variant] for variant in variants]
    done = []
    for group in groups:
        workers = [Worker(case, variant, overrides, shared=len(group) > 1) for variant in group]
        try:
            for worker in workers:
                worker.wait()
            _alternate(workers, steps)
        finally:
            for worker in workers:
                worker.close()
        done += workers
    return done


def _alternate(workers: Sequence[Worker], steps: int) -> None:
    """Let each worker take `steps` steps, in blocks in turn; every second round is reversed."""
    most = max(1, steps // BLOCKS)
    lengths = [min(most, max(1, round(BLOCK / worker.take(1)))) for worker in workers]
    rounds = max(-(-steps // length) for length in lengths)
    turns = list(zip(workers, lengths, strict=True))
    for number in range(rounds):
        for worker, length in turns if number % 2 == 0 else reversed(turns):
            worker.seconds.append(worker.take(length))


def fitting(
    case: Case, variants: Sequence[Variant], overrides: Sequence[str], steps: int
) -> tuple[Case, list[Worker]]:
    """Measure a case, one candidate after the other or with smaller batches if memory is short."""
    while True:
        try:
            return case, measure(case, variants, overrides, steps)
        except OutOfMemoryError:
            if case.together and len(variants) > 1:
                case = dataclasses.replace(case, together=False)
            elif case.batch_per_device > 1:
                case = dataclasses.replace(case, batch_per_device=case.batch_per_device // 2)
            else:
                raise UserError(f"{case.name}: does not fit into memory.") from None
            how = "together" if case.together else "one after the other"
            _say(f"{case.name}: out of memory; next {case.batch_per_device or ''} {how}")


def records(case: Case, workers: Sequence[Worker], predicted: dict) -> list[dict[str, Any]]:
    """Return what was measured of a case, JSON-compatible, a record for each candidate."""
    first = workers[0].facts
    counts = {worker.name: worker.facts["parameters"] for worker in workers}
    if len(set(counts.values())) > 1:
        raise UserError(f"{case.name}: the candidates differ in their parameters: {counts}.")
    reference = next((w for w in workers if w.name.startswith("torch")), workers[0])
    found = []
    for worker in workers:
        rounds = zip(reference.seconds, worker.seconds, strict=True)
        median = statistics.median(worker.seconds)
        quartiles = statistics.quantiles(worker.seconds, method="inclusive")
        rate = first["flops_per_step"] / median
        ours = not worker.name.startswith("torch")
        found.append(
            {
                "case": case.name,
                "candidate": worker.name,
                **{k: v for k, v in first.items() if k not in worker.facts},
                **worker.facts,
                "together": case.together,
                "step_seconds": median,
                "quartiles": [quartiles[0], quartiles[-1]],
                "blocks": worker.seconds,
                "examples_per_second": first["batch_size"] / median,
                "mfu": rate / first["peak_flops"] if first["peak_flops"] else None,
                "memory_bytes": worker.memory,
                "speed": statistics.median(a / b for a, b in rounds),
                "predicted_seconds": predicted.get(_key(first)) if ours else None,
            }
        )
    return found


def _key(facts: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a config among predictions."""
    return facts["learner"], facts["model"], facts["batch_size"] / facts["devices"]


def predictions(path: Path | None) -> dict[tuple[Any, ...], float]:
    """Return the predicted seconds in a file of tools/check_topology.py --json, by `_key`."""
    if path is None:
        return {}
    return {
        (report["learner"], report["model"], report["batch_per_chip"]): found["step_seconds"]
        for report in files.read_json(path)
        if (found := report.get("predicted"))
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the records as a table."""
    rows = []
    for record in found:
        low, high = (1e3 * s for s in record["quartiles"])
        mfu, memory, compiled = (record[k] for k in ("mfu", "memory_bytes", "compile_seconds"))
        alone = "" if record["together"] else ", alone"
        row = {
            "case": record["case"],
            "batch": f"{record['batch_size']}{alone}",
            "step": record["candidate"],
            "ms": f"{1e3 * record['step_seconds']:.4g}",
            "quartiles": f"{low:.4g} - {high:.4g}",
            "examples/s": f"{record['examples_per_second']:.4g}",
            "MFU": f"{mfu:.1%}" if mfu else "",
            "GiB": f"{memory / 2**30:.2f}" if memory else "",
            "compile s": f"{compiled:.1f}" if compiled else "",
            "speed": f"{record['speed']:.3f}",
        }
        if any(r["predicted_seconds"] for r in found):
            predicted = record["predicted_seconds"]
            row["predicted ms"] = f"{1e3 * predicted:.4g}" if predicted else ""
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
        variables = [part.partition("=") for part in parts if part not in given]
        if not all(equals and name.isidentifier() for name, equals, _ in variables):
            raise UserError(
                f"--against: {text!r} is not made of --config.FIELD=VALUE and NAME=VALUE."
            )
        environment = tuple((name, value) for name, _, value in variables)
        found.append(Variant(f"ours, {text}", "ours", (*ours, *given), environment))
    for name in args.compare:
        compiled = {"torch": None, "torch-eager": False, "torch-compiled": True}[name]
        found.append(Variant(name, "torch", (), (), compiled))
    return found


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Measure, print and write what the arguments ask for; return the exit status."""
    start = time.monotonic()
    if args.suite == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif args.suite == "gpu" and not args.compare:
        args.compare = ["torch"]
    if args.compare:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # PyTorch's step is for one GPU
    cases = SUITES[args.suite] if args.suite else [Case(args.config, args.config)]
    if any(o.startswith("--config.batch_size=") for o in overrides):
        cases = [dataclasses.replace(case, batch_per_device=0) for case in cases]
    variants, predicted = candidates(args, overrides), predictions(args.prediction)
    found: list[dict[str, Any]] = []
    for case in cases:
        if args.suite == "gpu" and time.monotonic() - start > SUITE_SECONDS:
            _say(f"{case.name}: left out, {SUITE_SECONDS} s are over")
            continue
        _say(f"{case.name} …")
        case, workers = fitting(case, variants, overrides, args.steps)
        found += records(case, workers, predicted)
        if args.json:
            files.write_text(args.json, json.dumps(found, indent=2) + "\n")
    print(f"{heading(found)}\n\n{table(found)}")
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
        choices=["torch", "torch-eager", "torch-compiled"],
        help="also measure PyTorch (--suite=gpu does); may be repeated",
    )
    parser.add_argument(
        "--against", action="append", default=[], help="further settings of ours; may be repeated"
    )
    parser.add_argument(
        "--steps", type=arguments.positive_int, default=20, help="of each candidate; default: 20"
    )
    parser.add_argument("--prediction", type=Path, help="of tools/check_topology.py --json")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    return parser.parse_known_args(argv)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
