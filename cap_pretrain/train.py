"""The training loop. It drives any learner, runs any evaluator and resumes exactly.

`setup.prepare` builds data, tokenizer and training step, `Run.restore` loads the newest checkpoint,
`Run.train` takes steps and `Run.evaluate` runs the evaluators. Step t is a function of (config,
seed, t, state): the pipeline computes batch t from its number, and the random key comes from the
seed and t. So the saved state is all that a restarted run needs.
"""

import contextlib
import dataclasses
import importlib
import json
import sys
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import inputs
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.checkpoints.earlier import earlier, keep_config
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.checkpoints.local_copies import LocalCopies
from cap_pretrain.checkpoints.warm_start import PretrainedWeights
from cap_pretrain.distributed import cluster, compile_cache, heartbeat, sharding
from cap_pretrain.distributed.ahead import Ahead
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Interrupted
from cap_pretrain.reports.journal import Journal
from cap_pretrain.telemetry import console, flops, trackers
from cap_pretrain.telemetry.metrics import MetricsWriter, read_metrics
from cap_pretrain.telemetry.profiler import Profiler
from cap_pretrain.telemetry.progress import Progress
from cap_pretrain.training import ending
from cap_pretrain.training import setup as setups
from cap_pretrain.training.broken import BrokenList
from cap_pretrain.training.changes import fields, unused
from cap_pretrain.training.evaluation import Evaluation
from cap_pretrain.training.lock import locked
from cap_pretrain.training.programs import StepFn, program_at
from cap_pretrain.training.setup import Earlier, Setup
from cap_pretrain.training.step import TrainState
from cap_pretrain.training.supply import supply
from cap_pretrain.training.watch import Stopped, StopRequest, Watch


def run(
    config: ConfigDict,
    workdir: Path,
    allow_changes: Sequence[str] = (),
    given: Collection[str] = (),
) -> None:
    """Train as `config` says in `workdir`, resuming an earlier run there.

    The config may differ from that of the earlier run in the fields `allow_changes`. Raises
    UserError, or `watch.Stopped` if SIGTERM or SIGINT ended the run early, after saving.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(console.used()).quiet = jax.process_index() > 0
        same = {"the fields on the command line": sorted(given)}
        cluster.check_same(fields(json.loads(configs.to_json(config))) | same)
        config, initial = warm_start.resolve(config, given, console.say, workdir)
        for line in unused(config, given):
            console.say(line)
        resuming = bool(saved_steps(workdir))

        def check(config: ConfigDict) -> Earlier:
            stack.enter_context(locked(workdir))
            found = earlier(config, workdir, allow_changes)
            compile_cache.use(config, workdir, console.say)  # before anything is compiled
            return found

        setup = setups.prepare(config, workdir, check, resuming=resuming)
        started = Run(setup, stack)
        started.restore(initial)
        if started.catch_up():
            return
        started.train()


@dataclasses.dataclass(frozen=True)
class Due:
    """What happens after a step."""

    last: bool  # the last step of the schedule
    log: bool  # write metrics
    evaluate: bool  # run evaluators
    save: bool  # write a checkpoint
    copy: bool  # copy the state to the hosts' own disks or memory
    stop: bool  # a signal came to this host or, one step ago, to any host of the cluster


class Run:
    """A run in progress.

    The mesh is current, and what the run opens stays open, until `stack` unwinds. `restore` sets
    `state`, the training state.
    """

    state: TrainState

    def __init__(self, setup: Setup, stack: contextlib.ExitStack):
        self._setup, self._stack = setup, stack
        self._config, self._schedule = setup.config, setup.schedule
        self._is_main = jax.process_index() == 0
        self._several_hosts = jax.process_count() > 1
        with console.doing("Measuring the devices", say=False):
            peak = flops.system_peak(jax.devices())
        self._progress = Progress(setup.schedule.total, mfu_label=peak.label)
        setup.describe(self._progress, peak)
        self._timer = setup.timer(peak)
        self._journal = Journal(setup.workdir, setup.facts, enabled=self._is_main)
        stack.callback(self._progress.close)
        stack.enter_context(jax.set_mesh(setup.mesh))
        self._writing = stack.enter_context(contextlib.ExitStack())  # ends after the checkpoints
        identity = inputs.tokenizer_identity(setup.workdir)
        self._checkpoints = Checkpoints(
            setup.workdir, self._config, identity=identity, batches=setup.batches
        )
        stack.callback(self._checkpoints.close)
        self._copies = LocalCopies(
            setup.workdir, self._config, setup.mesh, self._checkpoints, self._progress.say
        )
        stack.callback(self._copies.close)

    def restore(self, initial: PretrainedWeights | None) -> None:
        """Load the newest valid checkpoint, or make the initial state; open the logs.

        Weights in `initial` replace random ones at step 0.
        """
        config, workdir, total = self._config, self._setup.workdir, self._schedule.total
        say = self._progress.say
        newest = self._checkpoints.latest_step() or 0
        ends = newest >= total
        compiling = contextlib.nullcontext() if ends else self._setup.compiling()
        with self._timer.pause(), compiling:
            program = program_at(self._setup.programs, newest)
            step_fn = program.step_fn if ends else self._setup.ahead(program)
            if total and not isinstance(step_fn, Ahead):
                self._checkpoints.prepare(self._setup.abstract)
            restored = self._copies.restore(self._setup.abstract)
            restored = restored or self._checkpoints.restore_newest(self._setup.abstract, say)
            self.state = restored or self._setup.init()
            start = int(self.state.step)
            if start < self._setup.batches.sizes[-1][0]:
                raise UserError(
                    f"{workdir}: step {start} is now the newest checkpoint, and the batch size "
                    "changes after it; run the same command again."
                )
            if initial and not start:
                self.state = initial.put(self.state)
                say(f"Initialized from {initial.source}.")
        # The state that was restored may be of an earlier phase than the newest checkpoint.
        present = program_at(self._setup.programs, start)
        self._step_fn = step_fn if present is program else present.step_fn
        self._timer.flops_per_step = self._setup.flops_of_step(start)
        if start:
            say("\n".join([f"Resuming from step {start}.", *self._setup.changes]))
        if self._is_main:
            keep_config(config, workdir, start)
        lines = read_metrics(workdir)
        self._logged = [line for line in lines if line["step"] == start]
        # Without a checkpoint a run starts over, and so do the metrics of step 0.
        keep_until = start if start or not total else -1
        opened = []
        if self._is_main:
            given = json.loads(configs.to_json(config))
            about = trackers.Run(workdir, given, lines, keep_until, trains=bool(total))
            opened = trackers.start(config.log.trackers, about, say)
        self._writer = MetricsWriter(workdir, self._is_main, keep_until, opened)
        self._logs: list[MetricsWriter | BrokenList] = [self._writer]
        self._writing.push(lambda _, error, __: self._writer.close(failed=error is not None))
        self._watch = Watch(config, workdir, self._writer, self._progress)
        self._stop = self._stack.enter_context(StopRequest())
        weights = initial.source if initial and not (start or total) else ""
        self._evaluation = Evaluation(
            self._setup,
            self._writer,
            self._progress,
            # The hosts of a cluster cannot leave an evaluation one by one.
            interrupt=(lambda: False) if self._several_hosts else self._stop.is_set,
            weights=weights,
            pace=lambda: self._timer.seconds_per_step / config.batch_size,
        )

    def catch_up(self) -> bool:
        """Run the evaluations that an earlier process owes; return whether the run is complete.

        The process may have been stopped after saving a step and before evaluating it.
        """
        start, total, period = int(self.state.step), self._schedule.total, self._schedule.evaluate
        done = {name.rpartition("/")[0] for line in self._logged for name in line}
        for line in self._logged:
            self.state = self._evaluation.remember(self.state, start, line)
        finished = start >= total
        if finished or (start and period and start % period == 0):
            self.evaluate("always", done=done)
        if finished or self._evaluation.ended(self.state):
            self.evaluate("end", done=done)
            if total:
                self._progress.say(f"Already at step {start} of {total}: nothing to do.")
            self._finish()
            return True
        return False

    def train(self) -> None:
        """Take the steps that are left.

        Raises `Stopped` if a signal stopped the run, after saving, and UserError if a loss or
        gradient is not finite or too many images are broken.
        """
        start, step_fn = int(self.state.step), self._step_fn
        begun = {phase.start + 1 for phase in self._setup.phases}
        batches, broken = supply(self._setup, start, self._timer, self._stack)
        self._logs.append(broken)
        self._stack.enter_context(jax.transfer_guard("disallow"))
        self._stack.push(lambda _, error, __: heartbeat.ending(error) if error else None)
        steps, say = self._config.log.profile_steps, self._progress.say
        profiler = Profiler(steps, self._setup.workdir, say, self._timer.pause)
        for step, batch in profiler.traced(batches, lambda: self.state):
            first = step == start + 1
            doing = console.doing("Compiling and taking the first step", say=False)
            with doing if first else contextlib.nullcontext():
                requests = self._requests() if self._several_hosts else None
                if step in begun and not first:
                    step_fn = self._begin_phase(step, batch, requests)
                if self._several_hosts and first:
                    step_fn = cluster.compiled_everywhere(step_fn, self.state, batch, requests)
                self.state, metrics = step_fn(self.state, batch, requests)
                metrics = self._watch.add(step, metrics)
                due = self._due(step)
                if first or due.log or due.evaluate or due.save or due.copy or due.stop:
                    self._watch.check()  # waits for the device, so that the clock is right
            self._timer.step_done()
            self._progress.update(
                step, self._first_figures(metrics) if first and not due.log else None
            )
            if first and not start and isinstance(step_fn, Ahead):  # the first step comes first
                self._checkpoints.prepare(self._setup.abstract, background=True)
            if due.log:
                self._log(step, metrics)
            with self._timer.pause():
                if self._save_and_evaluate(step, due):
                    break

    def evaluate(self, when: str, done: Collection[str] = ()) -> bool:
        """Run the evaluators of `when`, "always" or "end", except those `done` at this step.

        Returns whether the metric of `config.plateau` ends the run. Raises `Stopped`, with the
        state saved, if a signal interrupts.
        """
        step = int(jax.device_get(self.state.step))
        try:
            for plateau in self._evaluation.run(self.state, step, when, done):
                self.state = self.state.replace(plateau=plateau)
        except Interrupted:
            if step and self._checkpoints.latest_step() != step:
                self._save(self._checkpoints)
            if step:
                self._saved_at_a_signal(step)
            raise Stopped(self._stop, step) from None
        self._writer.flush()  # the page is made of the files
        self._journal.write(step, last=when == "end")
        return self._evaluation.ended(self.state)

    def _begin_phase(self, step: int, *args: Any) -> StepFn:
        """Compile the training step of the phase that begins with `step`, for its arguments."""
        program = program_at(self._setup.programs, step - 1)
        jax.block_until_ready(self.state)  # the time of the steps before counts as theirs
        with self._timer.pause():
            self._progress.say(f"From step {step:,} on: {program.phase.describe()}")
            with console.doing("Compiling its training step", say=False):
                compiled = program.compiled(self.state, *args)
        self._timer.flops_per_step = self._setup.flops_of_step(step - 1)
        return compiled

    def _requests(self) -> jax.Array:
        """Put this host's requests, to stop and to save, on its devices."""
        requests = (self._stop.is_set(), self._checkpoints.minutes_passed())
        return sharding.put_requests(requests, self._setup.mesh)

    def _due(self, step: int) -> Due:
        """Return what happens after a step. All hosts of a cluster return the same."""
        if self._several_hosts:  # what any host requested before the previous step
            stop, overdue = self._watch.requests
        else:
            stop, overdue = self._stop.is_set(), self._checkpoints.minutes_passed()
        if stop:
            self._stop.notice()
        last = step == self._schedule.total
        log, evaluate, save = (
            last or bool(period and step % period == 0)
            for period in (self._schedule.log, self._schedule.evaluate, self._schedule.save)
        )
        save |= log and overdue
        save |= evaluate and bool(self._config.checkpoint.best or self._several_hosts)
        save |= bool(self._watch.fault) or stop
        copy = self._copies.due(step) and not save
        return Due(last, log, evaluate, save, copy, stop)

    def _first_figures(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
        """Return what is shown of the first step, whether or not it is logged."""
        loss = float(jax.device_get(metrics["loss"]))
        return {"train/loss": loss, "time/compile_s": self._timer.first_step_s}

    def _log(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Write and print the metrics of a step."""
        values = {
            k if k.startswith("data/") else f"train/{k}": v
            for k, v in jax.device_get(metrics).items()
        } | self._timer.report(step)
        self._writer.write(step, values)
        self._progress.update(step, values)

    def _save_and_evaluate(self, step: int, due: Due) -> bool:
        """Do what is due after a step; return whether the run is complete.

        Raises, with the state saved, `Stopped` after a signal and UserError for too many broken
        images.
        """
        self._checkpoints.check()
        if due.save or due.copy:
            self._save(self._checkpoints if due.save else self._copies)
        if due.stop and not due.last:
            self._saved_at_a_signal(step)
            raise Stopped(self._stop, step)
        if self._watch.fault and due.save and not due.last:
            raise UserError(self._watch.fault)
        if not due.evaluate:
            return False
        last = due.last
        if self.evaluate("always") and not last:
            metric = self._config.plateau.figure
            self._progress.say(f"{metric} no longer improves: the run ends at step {step}.")
            if not due.save:
                self._save(self._checkpoints)
            last = True
        if last:
            self.evaluate("end")
            self._finish()
        return last

    def _save(self, kept: Checkpoints | LocalCopies) -> None:
        """Start saving the state, after what was logged up to it, which no restart logs again."""
        kept.save(self.state, lambda: [log.flush() for log in self._logs])

    def _saved_at_a_signal(self, step: int) -> None:
        """Wait until the last checkpoint is complete; say how long that took after the signal."""
        self._checkpoints.wait()
        self._copies.remove()
        self._progress.say(f"Saved step {step} in {self._stop.describe()}.")

    def _finish(self) -> None:
        """Say where the results are and what to do with them."""
        workdir = self._setup.workdir
        self._checkpoints.wait()
        self._copies.remove()
        self._progress.close()
        self._progress.say(
            ending.lines(self._config, workdir, max(saved_steps(workdir), default=0))
        )


def dry_run(
    config: ConfigDict,
    workdir: Path,
    allow_changes: Sequence[str] = (),
    given: Collection[str] = (),
) -> str:
    """Write `workdir/plan.json` and return it as text; nothing is computed or allocated.

    Mistakes of the user are printed as by `run`.
    """

    def check(config: ConfigDict) -> Earlier:
        return earlier(config, workdir, allow_changes)

    with console.used():
        config, _ = warm_start.resolve(config, given, console.say, workdir)
        for line in unused(config, given):
            console.say(line)
        return setups.dry_run(config, workdir, check, resuming=bool(saved_steps(workdir)))


class _Callable(types.ModuleType):
    """This module, which may be called as `cap_pretrain.train(config, workdir)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with the arguments of `api.training.train`."""
        return importlib.import_module("cap_pretrain.api.training").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
