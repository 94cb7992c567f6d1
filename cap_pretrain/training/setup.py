"""Prepare a run: from its config to data, tokenizer, abstract state and compiled training step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import files, inputs, learners
from cap_pretrain.data.blocks import share_read
from cap_pretrain.data.sources.base import parse_mixture
from cap_pretrain.data.sources.open import GENERATED
from cap_pretrain.distributed import cluster, gpu, sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals import suite
from cap_pretrain.models import build
from cap_pretrain.optim import optimizers
from cap_pretrain.optim import schedule as schedules
from cap_pretrain.telemetry import console, flops, profiler
from cap_pretrain.telemetry.metrics import read_metrics
from cap_pretrain.telemetry.progress import Progress, parameter_table
from cap_pretrain.telemetry.timer import StepTimer
from cap_pretrain.training import automatic, feed, forecast, plan, widths
from cap_pretrain.training.changes import reordering, with_earlier_order
from cap_pretrain.training.phases import Phase, phases_of
from cap_pretrain.training.programs import Program, StepFn, program_at, programs_of
from cap_pretrain.training.step import TrainState, init_state, make_train_step
from cap_pretrain.validation import validate

PARAMETERS = "parameters.txt"
"""The file in a workdir that lists names, shapes and sizes of all parameters."""


COMPILED = "time/compile_s"  # in metrics.jsonl


class Earlier(NamedTuple):
    """What an earlier start of the run has left; by default nothing."""

    step: int = 0  # of the newest checkpoint
    batches: schedules.BatchSizes = schedules.BatchSizes(())  # up to that step
    changes: Sequence[str] = ()  # of the config since then, one line each


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that a run computes before its first step and never changes."""

    config: ConfigDict  # complete
    workdir: Path
    mesh: Mesh
    sources: inputs.Mixture  # the datasets of training; empty for a run that only evaluates
    mixture: feed.TrainingMixture  # the same as training reads them, see `feed.in_buckets`
    tokenizer: Any
    schedule: schedules.Schedule
    notes: list[str]  # lines for the log about the data and the moving average
    batches: schedules.BatchSizes
    changes: list[str]  # since the earlier start, for the log
    epoch: int  # examples in one epoch
    init: Callable[[], TrainState]  # makes the initial state on the mesh
    abstract: TrainState  # the state's shapes, dtypes and shardings
    graphdef: nnx.GraphDef  # the structure of the learner
    programs: list[Program]  # the training step of each phase

    def describe(self, progress: Progress, peak: flops.Peak) -> None:
        """Print the parameters, the devices, the data and the schedule.

        The table of all parameters goes to parameters.txt in the workdir.
        """
        table = parameter_table(self.abstract.params)
        if jax.process_index() == 0:
            files.write_text(self.workdir / PARAMETERS, table + "\n")
        if self.config.log.parameters:
            progress.say(table)
        total = plan.count_parameters(self.abstract.params)["total"]
        progress.say(f"{total:,} parameters, listed in {self.workdir / PARAMETERS}")
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        progress.say(f"{devices}, mesh {dict(self.mesh.shape)}")
        size = self.config.batch_size if self.schedule.total else 0
        rows = sharding.batch_rows(self.mesh, size) if size else None
        data = feed.describe(self.config, self.mixture, rows)
        for line in [*gpu.describe(), *data, *self.notes]:
            progress.say(line)
        if self.schedule.total:
            progress.say(schedules.describe(self.config, self.schedule))
            for phase in self.phases if len(self.phases) > 1 else ():
                progress.say(f"Steps {phase.start + 1:,} to {phase.stop:,}: {phase.describe()}")
            progress.say(f"MFU is relative to {peak.source}" if peak.flops else peak.source)

    @property
    def phases(self) -> list[Phase]:
        """The phases of the run."""
        return [program.phase for program in self.programs]

    def ahead(self, program: Program) -> StepFn:
        """Return a training step, which compiles in the background where that is safe."""
        return program.ahead(self.abstract, self.mesh)

    @functools.cached_property
    def training_flops(self) -> list[float]:
        """The model FLOPs per example of training in each phase; 0 if there are no steps."""
        if not self.schedule.total:
            return [0.0]
        return plan.training_flops(self.phases, self.tokenizer.vocab_size)

    def flops_of_step(self, step: int) -> float:
        """Return the model FLOPs of the step after `step` steps, for the present batch size."""
        present = program_at(self.programs, step)
        counts = zip(self.programs, self.training_flops, strict=True)
        return self.config.batch_size * next(n for program, n in counts if program is present)

    def flops_after(self, step: int) -> float:
        """Return the model FLOPs of all steps after `step` steps."""
        left = [max(0, phase.stop - max(phase.start, step)) for phase in self.phases]
        return self.config.batch_size * float(np.dot(left, self.training_flops))

    def compiling(self) -> contextlib.AbstractContextManager[object]:
        """Return a context that says that, and about how long, the training step compiles."""
        before = [line[COMPILED] for line in read_metrics(self.workdir) if COMPILED in line]
        usual = "on a CPU 5 to 30 s" if jax.default_backend() == "cpu" else "some minutes at most"
        if before:
            usual = f"{console.short_duration(before[-1])} at an earlier start"
        return console.doing(f"Compiling the training step, {usual}")

    def timer(self, peak: flops.Peak) -> StepTimer:
        """Return the timer of the run. The clock starts here."""
        several = len(self.programs) > 1
        return StepTimer(
            total_steps=self.schedule.total,
            batch_size=self.config.batch_size,
            flops_per_step=self.flops_of_step(0),
            peak_flops=peak.flops,
            flops_after=self.flops_after if several else None,
        )

    def facts(self) -> dict[str, Any]:
        """Return what the report says of a run besides its config and metrics, as JSON."""
        members = parse_mixture(self.config.data.name) if self.config.data.name else []
        data = [
            {
                "name": name,
                "split": self.config.data.split,
                "examples": len(source),
                "weight": weight,
            }
            for (name, _), (source, weight) in zip(members, self.sources, strict=False)
        ]
        names = [name for name, _ in members if name not in GENERATED]
        places = {name: Path(name) for name in names if not files.is_url(name)}
        folders = {name: str(own.absolute()) for name, own in places.items() if own.is_dir()}
        steps = [phase.stop - phase.start for phase in self.phases]
        mean = float(np.dot(steps, self.training_flops)) / max(sum(steps), 1)
        return {
            "parameters": plan.count_parameters(self.abstract.params),
            "flops_per_example": {"training": mean} if mean else {},
            "phases": plan.described(self.phases, self.training_flops),
            "devices": {
                "kind": jax.devices()[0].device_kind,
                "count": jax.device_count(),
                "processes": jax.process_count(),
            },
            "mesh": dict(self.mesh.shape),
            "schedule": {"total": self.schedule.total},
            "batches": [list(entry) for entry in self.batches.sizes],
            "epoch": self.epoch,
            "data": data,
            "folders": folders,
        }


def prepare(
    config: ConfigDict,
    workdir: Path,
    check: Callable[[ConfigDict], Earlier],
    *,
    resuming: bool,
) -> Setup:
    """Prepare a run without computing anything on the devices; raise UserError for a mistake.

    `config` has the fields of `config.encoder` filled in. `check` is called with the complete
    config before anything is written to the workdir, and may raise UserError to refuse it. Unless
    `resuming` from checkpoints in the workdir, its tokenizer is trained again.
    """
    if resuming:
        config = with_earlier_order(config, workdir / "config.json")
    validate(config, tokenizer=resuming and inputs.tokenizer_path(workdir).exists())
    build.check_device(config)
    mesh, share = sharding.make_mesh(config), 0.0  # refuses one that is not possible
    if configs.trains(config):
        rows = sharding.batch_rows(mesh, config.batch_size)
        share = share_read(config.data, rows, config.batch_size)
    sources, config = _opened(config, share)
    files.make_workdir(workdir)
    cluster.check_shared(workdir)
    earlier = check(config)
    tokenizer = inputs.prepare_tokenizer(
        config, sources, workdir, anew=not (resuming or earlier.step)
    )
    mixture = feed.in_buckets(config, sources, tokenizer)
    epoch = feed.examples_an_epoch(config, mixture)
    data = {"the data": [epoch, *feed.describe(config, mixture)]}
    cluster.agree(data, "Give all hosts the same data.")
    schedule, batches, changes = _resolve_schedule(config, earlier, epoch)
    rate = schedules.learning_rate(config, schedule)
    # Checkpoints are read as they were saved, so a run that only evaluates keeps the optimizer.
    idle = not schedule.total and not resuming
    optimizer = functools.partial(make_optimizer, config, rate, idle=idle)
    with console.doing(f"Building {config.learner.name} {config.model.name}"):
        choice = _settle(config, tokenizer.vocab_size, optimizer, schedule.total)
        mesh = sharding.make_mesh(choice.config)
        init, abstract, graphdef, tx = init_state(
            lambda key: learners.build(choice.config, tokenizer.vocab_size, key),
            optimizer,
            choice.config,
            mesh,
        )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    steps = programs_of(
        phases_of(choice.config, schedule.total),
        lambda graphdef, config: make_train_step(
            graphdef, tx, rate, config, shardings, schedule.total
        ),
        tokenizer.vocab_size,
        graphdef,
        abstract,
    )
    notes = _notes(config, sources, schedule) + ([choice.line] if choice.line else [])
    return Setup(
        *(config, workdir, mesh, sources, mixture, tokenizer, schedule, notes, batches),
        *(changes, epoch, init, abstract, graphdef, steps),
    )


def dry_run(
    config: ConfigDict, workdir: Path, check: Callable[[ConfigDict], Earlier], *, resuming: bool
) -> str:
    """Write `workdir/plan.json` and return it as text, from abstract shapes; see `prepare`."""
    if resuming:
        config = with_earlier_order(config, workdir / "config.json")
    kept = resuming and inputs.tokenizer_path(workdir).exists()
    validate(config, tokenizer=kept)
    sources, config = _opened(config)
    files.make_workdir(workdir)
    earlier = check(config)
    tokenizer = (
        inputs.prepare_tokenizer(config, sources, workdir, anew=False)
        if kept
        else inputs.planned_tokenizer(config, sources)
    )
    mixture = feed.in_buckets(config, sources, tokenizer)
    epoch = feed.examples_an_epoch(config, mixture)
    schedule, _, changes = _resolve_schedule(config, earlier, epoch)
    rate = schedules.learning_rate(config, schedule)
    optimizer = functools.partial(make_optimizer, config, rate, idle=not schedule.total)
    vocab_size = tokenizer.vocab_size if tokenizer else config.text.vocab_size
    trains = bool(schedule.total) and plan.is_for_present_devices(config)
    choice = _settle(config, vocab_size, optimizer, schedule.total if trains else 0)
    made = plan.make_plan(
        choice.config,
        vocab_size=vocab_size,
        total_steps=schedule.total,
        make_optimizer=optimizer,
    )
    foreseen = forecast.datasets(config, sources) if sources else []
    foreseen += feed.describe(config, mixture) if config.data.order == "blocks" else []
    if trains:
        needed, text = forecast.memory(choice.config, vocab_size, optimizer, schedule.total)
        made["bytes_per_device"] |= needed
        made["seconds"], line = forecast.duration(made, workdir)
        foreseen += [text, line]
    notes = _notes(config, sources, schedule)
    length = [schedules.describe(config, schedule)] if schedule.total else []
    lines = "\n".join([*changes, *length, plan.write_plan(made, workdir)])
    return "\n\n".join(filter(None, [lines, "\n".join(foreseen), choice.line, *notes]))


def _notes(config: ConfigDict, sources: inputs.Mixture, schedule: schedules.Schedule) -> list[str]:
    """Return lines for the log about data and settings that may not be meant."""
    notes = [*inputs.held_out(config, sources), *schedules.notes(config, schedule)]
    if schedule.total:
        notes += build.notes(config) + profiler.notes(config.log.profile_steps, schedule.total)
    return notes


def _opened(config: ConfigDict, share: float = 0.0) -> tuple[inputs.Mixture, ConfigDict]:
    """Open the training data, complete the config, and check what its evaluators need.

    `share` is that of the lanes of `data.order=blocks` which this host reads, if it trains.
    """
    sources: inputs.Mixture = []
    if configs.trains(config):
        with console.doing(f"Opening {config.data.name}"):
            sources = inputs.open_sources(config, share)
            config = inputs.completed(config, sources)
    if config.evals:
        with console.doing(f"Checking what is evaluated: {', '.join(config.evals)}"):
            config = suite.check(config)
    return sources, config


def _settle(
    config: ConfigDict, vocab_size: int, optimizer: automatic.MakeOptimizer, total: int
) -> automatic.Choice:
    """Settle what the config leaves to the devices of this run of `total` steps."""
    limit = automatic.memory_of(jax.local_devices()[0]) if total else None
    return automatic.settle(config, vocab_size, optimizer, jax.devices(), limit, total)


def _resolve_schedule(
    config: ConfigDict, earlier: Earlier, epoch: int
) -> tuple[schedules.Schedule, schedules.BatchSizes, list[str]]:
    """Return schedule and batch sizes of a run, and the changes with what follows from them.

    Raises UserError if the run is longer already, or its batch size cannot change.
    """
    start, before, changes = earlier
    batches = before.then(start, config.batch_size)
    if len(batches.sizes) > 1 and config.data.buckets:
        raise UserError(
            f"batch_size: was {before.sizes[-1][1]}, is now {config.batch_size}, but with "
            "data.buckets the examples of an epoch depend on it; restore it, or use another "
            "--workdir."
        )
    lanes = config.data.lanes if config.data.order == "blocks" else 1
    if any(size % lanes for _, size in batches.sizes):
        sizes = ", ".join(f"{size:,} from step {first:,}" for first, size in batches.sizes)
        raise UserError(
            f"data.lanes: {lanes} do not divide every batch size of the run ({sizes}); choose "
            "another batch_size, or another --workdir."
        )
    schedule = schedules.make_schedule(config, epoch=epoch, batches=batches)
    if 0 < schedule.total < start:
        raise UserError(
            f"total_steps: the run would end at step {schedule.total}, but has reached step "
            f"{start}; give {start} or more, or another --workdir."
        )
    lines = [*changes, *reordering(changes)]
    if start and (changes or batches != before):
        line = schedules.describe_progress(config, schedule, batches, start=start, epoch=epoch)
        lines.append(line)
    return schedule, batches, lines


def make_optimizer(
    config: ConfigDict, rate: optax.Schedule, params: Any, *, idle: bool
) -> optax.GradientTransformation:
    """Return the optimizer for `params`; `idle` returns one without state, for runs of no steps."""
    if idle:
        return optax.set_to_zero()
    return optimizers.build(config.optim, params, rate, widths.rates(config))
