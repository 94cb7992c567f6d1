"""The one loop. It drives any learner, evaluates with any evaluator, and resumes exactly.

Step t is a function of (config, seed, t, state): batch t comes from the pipeline by its number, the
random key of step t from the seed. So a run that is started again only needs the saved state.
"""

import contextlib
import dataclasses
import io
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import evals, flops, inputs, learners, optim, partition, plan, telemetry
from cap_pretrain.checkpoint import Checkpoints
from cap_pretrain.data import pipeline
from cap_pretrain.errors import UserError
from cap_pretrain.step import init_state, make_train_step


class Stopped(Exception):
    """SIGTERM came; the state has been saved."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen, in steps."""

    total: int
    warmup: int
    cooldown: int
    log: int
    evaluate: int
    save: int


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains as `config` says, in `workdir`, from where an earlier run there stopped.

    Raises:
      UserError: the user's mistake.
      Stopped: SIGTERM ended the run early, after saving.
    """
    configs.validate(config)
    mesh = partition.make_mesh(config)
    is_main = jax.process_index() == 0
    mixture = inputs.open_sources(config)
    schedule = make_schedule(config, epoch=sum(len(source) for source, _ in mixture))
    tokenizer = inputs.prepare_tokenizer(config, mixture, workdir)
    if is_main:
        (workdir / "config.json").write_text(configs.to_json(config))

    rate = learning_rate(config, schedule)
    init, abstract, graphdef, tx = init_state(
        lambda key: learners.build(config, tokenizer.vocab_size, key),
        lambda params: optim.build(config.optim, params, rate),
        config,
        mesh,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step_fn = make_train_step(graphdef, tx, rate, config, shardings)
    peak = flops.system_peak(jax.devices())
    progress = telemetry.Progress(
        schedule.total, mfu_label=peak.label, stream=None if is_main else io.StringIO()
    )
    progress.say(telemetry.parameter_table(abstract.params))
    progress.say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    progress.say(f"MFU is relative to {peak.source}" if peak.flops else peak.source)
    timer = telemetry.StepTimer(
        total_steps=schedule.total,
        batch_size=config.batch_size,
        flops_per_step=config.batch_size
        * plan.flops_per_example(config, tokenizer.vocab_size)["training"],
        peak_flops=peak.flops,
    )

    checkpoints = Checkpoints(workdir, config)
    with timer.pause(), jax.set_mesh(mesh):
        start = checkpoints.latest_step() or 0
        if start:
            progress.say(f"Going on from step {start}.")
            state = checkpoints.restore(abstract, start)
        else:
            state = init()
    suite = evals.Suite(evals.Context(config, graphdef, tokenizer, mesh), workdir, write=is_main)
    reads = learners.learner_class(config.learner.name).reads
    losses = _FiniteLosses(workdir)
    broken = 0
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        stack.callback(checkpoints.close)
        writer = telemetry.MetricsWriter(workdir, enabled=is_main, resume_step=start)
        stack.callback(writer.close)
        stack.enter_context(jax.set_mesh(mesh))
        finished = start >= schedule.total
        if finished or (start and schedule.evaluate and start % schedule.evaluate == 0):
            # The run before may have been stopped between saving and evaluating.
            results = suite.run(start, state.variables, end=finished, only_missing=True)
            _report(start, results, writer, progress)
        if finished:
            progress.say(f"Already at step {start} of {schedule.total}: nothing to do.")
            return
        dataset = inputs.training_batches(config, mixture, tokenizer)
        batches = pipeline.iterate(dataset, start, schedule.total, workers=config.data.workers)
        stack.callback(batches.close)
        sigterm = stack.enter_context(_SigtermFlag())

        for step in range(start + 1, schedule.total + 1):
            with timer.data_wait():
                batch = next(batches)
            arrays = partition.put_batch({k: batch[k] for k in reads}, mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, arrays)
            broken += int(batch["broken"].sum())
            losses.watch(step, metrics)

            last = step == schedule.total
            log, evaluate, save = (
                last or (period and step % period == 0)
                for period in (schedule.log, schedule.evaluate, schedule.save)
            )
            stop = sigterm.is_set()
            if step == start + 1 or log or evaluate or save or stop:
                losses.check()  # which also waits for the device, so that the clock is right
            timer.step_done()
            progress.update(step)
            if log:
                figures = {f"train/{k}": float(v) for k, v in jax.device_get(metrics).items()}
                figures |= {"data/broken": broken, **timer.report(step)}
                writer.write(step, figures)
                progress.update(step, figures)
            with timer.pause():
                if save or stop:
                    checkpoints.save(state)
                if stop and not last:
                    raise Stopped(f"SIGTERM: stopped after step {step}, which is saved.")
                if evaluate:
                    _report(step, suite.run(step, state.variables, end=last), writer, progress)


def dry_run(config: ConfigDict, workdir: Path) -> str:
    """Writes `workdir/plan.json` and returns it as text; builds abstract shapes only."""
    configs.validate(config)
    mixture = inputs.open_sources(config)
    schedule = make_schedule(config, epoch=sum(len(source) for source, _ in mixture))
    vocab_size = config.text.vocab_size
    if config.text.tokenizer:
        vocab_size = inputs.open_tokenizer(config, config.text.tokenizer).vocab_size
    rate = learning_rate(config, schedule)
    made = plan.make_plan(
        config,
        vocab_size=vocab_size,
        total_steps=schedule.total,
        make_optimizer=lambda params: optim.build(config.optim, params, rate),
    )
    return plan.write_plan(made, workdir)


def make_schedule(config: ConfigDict, *, epoch: int) -> Schedule:
    """Resolves every duration of a config to steps; `epoch` is the examples in one."""
    kwargs: dict[str, Any] = dict(batch_size=config.batch_size, epoch=epoch)
    total = configs.duration(config, "total", **kwargs)
    kwargs["total"] = total
    return Schedule(
        total=total,
        warmup=configs.duration(config.optim, "warmup", **kwargs),
        cooldown=configs.duration(config.optim, "cooldown", **kwargs),
        log=configs.duration(config.log, "every", **kwargs),
        evaluate=configs.duration(config.eval, "every", **kwargs),
        save=configs.duration(config.checkpoint, "every", **kwargs),
    )


def learning_rate(config: ConfigDict, schedule: Schedule) -> optax.Schedule:
    """The learning rate as a function of the step."""
    return optim.schedule(
        config.optim, total=schedule.total, warmup=schedule.warmup, cooldown=schedule.cooldown
    )


def _report(
    step: int,
    results: dict[str, evals.Result],
    writer: telemetry.MetricsWriter,
    progress: telemetry.Progress,
) -> None:
    """Shows what the evaluators found, and keeps the figures with the metrics."""
    figures = {f"{n}/{k}": v for n, result in results.items() for k, v in result.figures.items()}
    if figures:
        writer.write(step, figures)
    for name, result in results.items():
        figures = "  ".join(f"{k} {v:.4g}" for k, v in result.figures.items())
        progress.say("\n    ".join([f"step {step}  {name}: {figures}", *result.lines]))
        if result.pictures:
            images, captions = zip(*result.pictures, strict=True)
            writer.images(step, name, np.stack(images), captions)


class _FiniteLosses:
    """Stops the run at the first step whose loss, gradient or parameters are not finite.

    The device runs one step ahead of the check, and nothing is saved unchecked.
    """

    CHECKED = ("loss", "grad_norm", "param_norm")

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def watch(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Checks the step before, and remembers this one."""
        self.check()
        self._pending = (step, {name: metrics[name] for name in self.CHECKED})

    def check(self) -> None:
        """Checks the step remembered, waiting for it if need be."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = jax.device_get(metrics)
        for name in self.CHECKED:
            if not math.isfinite(values[name]):
                raise UserError(
                    f"step {step}: {name} is {values[name]}; nothing was saved since. Lower "
                    "optim.lr or optim.clip_norm and start again: "
                    f"{self._workdir / 'checkpoints'} is intact."
                )


class _SigtermFlag:
    """Remembers SIGTERM while active, instead of dying of it; the second one kills."""

    def __init__(self):
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def __enter__(self) -> "_SigtermFlag":
        self._before: Callable | int | None = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _handle(self, *_: object) -> None:
        self._set = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
