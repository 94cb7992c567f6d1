"""The one loop. It drives any learner, evaluates with any evaluator, and resumes exactly.

Step t is a function of (config, seed, t, state): batch t comes from the pipeline by its number, the
random key of step t from the seed. So a run that is started again only needs the saved state.
"""

import contextlib
import functools
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import files, inputs, learners
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.checkpoints.checkpoint import Checkpoints, saved_steps
from cap_pretrain.data import prefetch
from cap_pretrain.distributed import cluster, heartbeat, sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Interrupted, Result
from cap_pretrain.evals.suite import Suite
from cap_pretrain.optim import optimizers
from cap_pretrain.optim import schedule as schedules
from cap_pretrain.optim.plateau import Plateau
from cap_pretrain.telemetry import flops
from cap_pretrain.telemetry.metrics import MetricsWriter, read_metrics
from cap_pretrain.telemetry.progress import Progress, parameter_table
from cap_pretrain.telemetry.timer import StepTimer
from cap_pretrain.training import history, plan
from cap_pretrain.training.broken import BrokenList
from cap_pretrain.training.changes import check_unchanged, fields
from cap_pretrain.training.step import init_state, make_train_step
from cap_pretrain.training.watch import Stopped, StopRequest, Watch


def run(config: ConfigDict, workdir: Path, allow_changes: Sequence[str] = ()) -> None:
    """Trains as `config` says, in `workdir`, from where an earlier run there stopped.

    Args:
      config: see config.py.
      workdir: the folder of everything the run writes.
      allow_changes: fields in which `config` may differ from the one the run began with.

    Raises:
      UserError: the user's mistake.
      watch.Stopped: SIGTERM or SIGINT ended the run early, after saving.
    """
    cluster.check_same(fields(json.loads(configs.to_json(config))))
    config, beginning = warm_start.resolve(config)
    configs.validate(config)
    mesh = sharding.make_mesh(config)
    is_main, hosts = jax.process_index() == 0, jax.process_count()
    mixture = inputs.open_sources(config) if configs.trains(config) else []
    config = inputs.completed(config, mixture)
    files.make_workdir(workdir)
    cluster.check_shared(workdir)
    changes = allowed_changes(config, workdir, allow_changes)
    tokenizer = inputs.prepare_tokenizer(config, mixture, workdir, anew=not saved_steps(workdir))
    mixture = inputs.in_buckets(config, mixture, tokenizer)
    epoch = inputs.examples_an_epoch(config, mixture)
    schedule = schedules.make_schedule(config, epoch=epoch)
    rate = schedules.learning_rate(config, schedule)
    idle = not schedule.total and not saved_steps(workdir)  # which are read as they were saved
    init, abstract, graphdef, tx = init_state(
        lambda key: learners.build(config, tokenizer.vocab_size, key),
        functools.partial(make_optimizer, config, rate, idle=idle),
        config,
        mesh,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step_fn = make_train_step(graphdef, tx, rate, config, shardings)
    peak = flops.system_peak(jax.devices())
    progress = Progress(
        schedule.total, mfu_label=peak.label, stream=None if is_main else io.StringIO()
    )
    progress.say(parameter_table(abstract.params))
    progress.say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    for line in inputs.describe(config, mixture):
        progress.say(line)
    step_flops = 0.0
    if schedule.total:
        progress.say(schedules.describe(config, schedule))
        progress.say(f"MFU is relative to {peak.source}" if peak.flops else peak.source)
        counted = plan.flops_per_example(config, tokenizer.vocab_size)
        step_flops = config.batch_size * counted["training"]
    timer = StepTimer(
        total_steps=schedule.total,
        batch_size=config.batch_size,
        flops_per_step=step_flops,
        peak_flops=peak.flops,
    )

    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(workdir, config, identity=inputs.tokenizer_identity(workdir))
        stack.callback(checkpoints.close)
        with timer.pause():
            if schedule.total:
                checkpoints.prepare(abstract)
            state = checkpoints.restore_newest(abstract, progress.say) or init()
            start = int(state.step)
            if beginning and not start:
                state = beginning.put(state)
                progress.say(f"Beginning with {beginning.source}.")
        if start:
            progress.say("\n".join([f"Going on from step {start}.", *changes]))
        if is_main:
            keep_config(config, workdir, start)
        logged = read_metrics(workdir)
        evaluated = {
            name.rpartition("/")[0] for line in logged if line["step"] == start for name in line
        }
        # Without a checkpoint a run begins again, step 0's own metrics included.
        keep_until = start if start or not schedule.total else -1
        writer = MetricsWriter(workdir, enabled=is_main, keep_until=keep_until)
        stack.callback(writer.close)
        watch = Watch(config, workdir, writer, progress)
        stop = stack.enter_context(StopRequest())
        # Hosts of a cluster may not leave an evaluation one by one.
        interrupt = stop.is_set if hosts == 1 else lambda: False
        context = Context(config, graphdef, tokenizer, mesh, interrupt, workdir)
        weights = beginning.source if beginning and not (start or schedule.total) else ""
        suite = Suite(context, workdir, write=is_main, weights=weights)
        plateau = Plateau.of(config)

        def asked_for() -> tuple[bool, bool]:
            """Whether to stop, and whether to save, as this host has it."""
            return stop.is_set(), checkpoints.minutes_passed()

        # Evaluators bring their figures to the host as they like.
        @jax.transfer_guard_device_to_host("allow")
        def evaluate(step: int, when: str, done: Collection[str] = ()) -> bool:
            """Returns whether the run is to end, as nothing becomes better any more."""
            nonlocal state
            try:
                for name, result in suite.run(step, state.variables, when=when, done=done):
                    figures = {f"{name}/{k}": v for k, v in result.metrics.items()}
                    state = state.replace(plateau=plateau.after(state.plateau, step, figures))
                    _report(step, name, result, writer, progress)
            except Interrupted:
                if step and checkpoints.latest_step() != step:
                    checkpoints.save(state)
                raise Stopped(stop, step) from None
            if is_main and schedule.total and config.evals:
                rows = history.keep(workdir, config.evals, epoch / config.batch_size)
                if when == "end":
                    progress.say(history.tables(rows))
            return plateau.ended(state.plateau)

        for line in logged:
            if line["step"] == start:
                state = state.replace(plateau=plateau.after(state.plateau, start, line))
        finished = start >= schedule.total
        if finished or (start and schedule.evaluate and start % schedule.evaluate == 0):
            # The run before may have been stopped between saving and evaluating.
            evaluate(start, "always", done=evaluated)
        if finished or plateau.ended(state.plateau):
            evaluate(start, "end", done=evaluated)
            if schedule.total:
                progress.say(f"Already at step {start} of {schedule.total}: nothing to do.")
            return
        reads = (*learners.learner_class(config.learner.name).reads, "broken")
        reads += ("index",) if config.log.ids else ()
        rows = sharding.batch_rows(mesh, config.batch_size)
        dataset = inputs.training_batches(config, mixture, tokenizer, rows)
        batches = prefetch.iterate(dataset, start, schedule.total, workers=config.data.workers)
        stack.callback(batches.close)
        members = [source for source, _ in mixture]
        broken = BrokenList(config.data, members, workdir, jax.process_index())
        stack.enter_context(jax.transfer_guard("disallow"))
        stack.push(lambda _, error, __: heartbeat.ending(error) if error else None)

        for step in range(start + 1, schedule.total + 1):
            with timer.data_wait():
                batch = next(batches)
                broken.see(step, batch)
            batch = {k: batch[k] for k in reads}
            if hosts > 1:
                batch["asked"] = np.tile(asked_for(), (len(batch["broken"]), 1))
            arrays = sharding.put_batch(batch, mesh)
            if hosts > 1 and step == start + 1:
                step_fn = cluster.compiled_everywhere(step_fn, state, arrays)
            state, metrics = step_fn(state, arrays)
            watch.add(step, metrics)
            # Several hosts do what any of them asked for in the step before: all the same, at once.
            stopped, overdue = asked_for() if hosts == 1 else watch.asked

            last = step == schedule.total
            log, due, save = (
                last or bool(period and step % period == 0)
                for period in (schedule.log, schedule.evaluate, schedule.save)
            )
            save |= (log and overdue) or (due and bool(config.checkpoint.best or hosts > 1))
            save |= bool(watch.fault)
            if step == start + 1 or log or due or save or stopped:
                watch.check()  # which also waits for the device, so that the clock is right
            timer.step_done()
            progress.update(step)
            if log:
                for name in ("data/ids", "asked"):  # which the watch reads, of every step
                    metrics.pop(name, None)
                figures = {
                    k if "/" in k else f"train/{k}": v for k, v in jax.device_get(metrics).items()
                }
                figures |= timer.report(step)
                writer.write(step, figures)
                progress.update(step, figures)
            with timer.pause():
                checkpoints.check()
                if save or stopped:
                    checkpoints.save(state)
                if stopped and not last:
                    raise Stopped(stop, step)
                if watch.fault and save and not last:
                    raise UserError(watch.fault)
                if not due:
                    continue
                if evaluate(step, "always") and not last:
                    progress.say(f"{plateau.figure} becomes no better: ending at step {step}.")
                    if not save:
                        checkpoints.save(state)
                    last = True
                if last:
                    evaluate(step, "end")
                    break


def allowed_changes(config: ConfigDict, workdir: Path, allowed: Sequence[str]) -> list[str]:
    """Returns what has changed since the run in `workdir` began, if it may.

    Raises:
      UserError: it may not.
    """
    path = workdir / "config.json"
    if path.exists() and (saved_steps(workdir) or not configs.trains(config)):
        return check_unchanged(config, path, allowed)
    return []


def keep_config(config: ConfigDict, workdir: Path, start: int) -> None:
    """Writes config.json; the one before, if it differs, stays as config.until_STEP.json."""
    path, text = workdir / "config.json", configs.to_json(config)
    if start and path.exists() and path.read_text(encoding="utf-8") != text:
        path.replace(workdir / f"config.until_{start}.json")
    files.write_text(path, text)


def dry_run(config: ConfigDict, workdir: Path) -> str:
    """Writes `workdir/plan.json` and returns it as text; builds abstract shapes only."""
    config, _ = warm_start.resolve(config)
    configs.validate(config)
    files.make_workdir(workdir)
    mixture = inputs.open_sources(config) if configs.trains(config) else []
    config = inputs.completed(config, mixture)
    tokenizer = inputs.planned_tokenizer(config, mixture)
    mixture = inputs.in_buckets(config, mixture, tokenizer)
    schedule = schedules.make_schedule(config, epoch=inputs.examples_an_epoch(config, mixture))
    rate = schedules.learning_rate(config, schedule)
    made = plan.make_plan(
        config,
        vocab_size=tokenizer.vocab_size if tokenizer else config.text.vocab_size,
        total_steps=schedule.total,
        make_optimizer=functools.partial(make_optimizer, config, rate, idle=not schedule.total),
    )
    return plan.write_plan(made, workdir)


def make_optimizer(
    config: ConfigDict, rate: optax.Schedule, params: Any, *, idle: bool
) -> optax.GradientTransformation:
    """The optimizer for `params`; an idle one, for no step at all, has no state."""
    return optax.set_to_zero() if idle else optimizers.build(config.optim, params, rate)


def _report(
    step: int,
    name: str,
    result: Result,
    writer: MetricsWriter,
    progress: Progress,
) -> None:
    """Shows what an evaluator found, and keeps the figures with the metrics."""
    writer.write(step, {f"{name}/{k}": v for k, v in result.metrics.items()})
    figures = "  ".join(f"{k} {v:.4g}" for k, v in result.metrics.items())
    progress.say("\n    ".join([f"step {step}  {name}: {figures}", *result.lines]))
    if result.pictures:
        images, captions = zip(*result.pictures, strict=True)
        writer.images(step, name, np.stack(images), captions)
