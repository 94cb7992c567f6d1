"""Candidates of tools/bench_step.py: processes that take training steps in turns."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cap_pretrain.errors import UserError

WORKER = Path(__file__).with_name("bench_step_worker.py")
WARMUP = 2  # steps that are not timed
BLOCK = 0.5  # seconds that a block of steps should take at least
BLOCKS = 5  # fewest blocks of a candidate


@dataclasses.dataclass(frozen=True)
class Case:
    """A config to measure; a batch per device of 0 keeps the batch size of the config."""

    name: str
    config: str
    batch_per_device: int = 0
    together: bool = True  # whether the candidates are in memory at the same time
    platform: str | None = None  # of JAX, if it must be that one


@dataclasses.dataclass(frozen=True)
class Variant:
    """A candidate: our step with further settings, or PyTorch's."""

    name: str
    kind: str  # ours or torch
    overrides: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    compiled: bool | None = None  # by torch.compile; None: on GPUs
    config: str = ""  # in place of the case's


class OutOfMemoryError(Exception):
    """A candidate does not fit into the memory of a device."""


class Worker:
    """The process of a candidate; `facts` are empty until it is ready."""

    def __init__(self, case: Case, variant: Variant, overrides: Sequence[str], shared: bool):
        environment = dict(os.environ)
        if shared:  # the memory of a GPU
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.name, self.variant, self.memory = variant.name, variant, None
        self.facts: dict[str, Any] = {}
        self.seconds: list[float] = []  # of a step, by block
        self.cpu_seconds: list[float] = []  # likewise, of all cores
        self._process = subprocess.Popen(
            [sys.executable, WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | dict(variant.environment),
        )
        self._send(
            kind=variant.kind,
            config=variant.config or case.config,
            overrides=[*overrides, *variant.overrides],
            batch_per_device=case.batch_per_device,
            compiled=variant.compiled,
            platform=case.platform,
            warmup=WARMUP,
        )

    def wait(self) -> None:
        """Wait until the candidate is ready; raise UserError or OutOfMemoryError if it fails."""
        self.facts = self.facts or self._receive()

    def take(self, steps: int) -> dict[str, float]:
        """Take so many steps; return their average `seconds` and `cpu` seconds of all cores."""
        self._send(steps=steps)
        answer = self._receive()
        self.memory = answer.pop("memory")
        return answer

    def time(self, steps: int) -> None:
        """Time a block of so many steps."""
        answer = self.take(steps)
        self.seconds.append(answer["seconds"])
        self.cpu_seconds.append(answer["cpu"])

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # of a process that has ended
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
        workers = []
        try:
            for variant in group:
                workers.append(Worker(case, variant, overrides, shared=len(group) > 1))
                workers[-1].wait()  # XLA chooses kernels by timing, so nothing may run beside it
            _alternate(workers, steps)
        finally:
            for worker in workers:
                worker.close()
        done += workers
    return done


def _alternate(workers: Sequence[Worker], steps: int) -> None:
    """Let each worker take `steps` steps, in blocks in turn; every second round is reversed."""
    most = max(1, steps // BLOCKS)
    lengths = [min(most, max(1, round(BLOCK / worker.take(1)["seconds"]))) for worker in workers]
    rounds = max(2, *(-(-steps // length) for length in lengths))
    turns = list(zip(workers, lengths, strict=True))
    for number in range(rounds):
        for worker, length in turns if number % 2 == 0 else reversed(turns):
            worker.time(length)


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
            say(f"{case.name}: out of memory; next {case.batch_per_device or ''} {how}")


def say(line: str) -> None:
    """Print a line about progress."""
    print(line, file=sys.stderr, flush=True)
