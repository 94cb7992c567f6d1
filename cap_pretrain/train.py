"""The one loop. It drives any learner, evaluates with any evaluator, and resumes exactly.

Step t is a function of (config, seed, t, state): batch t comes from the pipeline by its number, the
random key of step t from the seed. So a run that is started again only needs the saved state.
"""

import dataclasses
import io
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import evals, flops, learners, optim, partition, plan, telemetry
from cap_pretrain.checkpoint import Checkpoints
from cap_pretrain.data import pipeline, tokenizers
from cap_pretrain.data.sources import Source, parse_mixture
from cap_pretrain.errors import UserError
from cap_pretrain.step import init_state, make_train_step

# Examples of each dataset whose captions a new tokenizer is trained on.
TOKENIZER_EXAMPLES = 50_000


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
    sources = open_sources(config)
    schedule = make_schedule(config, epoch=sum(len(source) for source, _ in sources))
    tokenizer = prepare_tokenizer(config, sources, workdir)
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
    if start >= schedule.total:
        progress.say(f"Already at step {start} of {schedule.total}: nothing to do.")
        checkpoints.close()
        return

    writer = telemetry.MetricsWriter(workdir, enabled=is_main, resume_step=start)
    context = evals.Context(config, graphdef, tokenizer, mesh)
    suite = evals.Suite(context, workdir if is_main else None)
    batches = pipeline.iterate(
        training_batches(config, sources, tokenizer),
        start,
        schedule.total,
        workers=config.data.workers,
    )
    stop = _SigtermFlag()
    losses = _FiniteLosses(workdir)
    broken = 0
    try:
        with stop, jax.set_mesh(mesh):
            for step in range(start + 1, schedule.total + 1):
                with timer.data_wait():
                    batch = next(batches)
                broken += int(batch["broken"].sum())
                arrays = partition.put_batch(
                    {k: batch[k] for k in plan.abstract_batch(config)}, mesh
                )
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, arrays)
                losses.watch(step, metrics)
                progress.update(step)

                last = step == schedule.total
                if step == start + 1 or last or stop.is_set() or _due(step, schedule):
                    losses.check()  # also waits for the device, so that the clock is right
                timer.step_done()
                if last or _every(step, schedule.log):
                    figures = {f"train/{k}": float(v) for k, v in jax.device_get(metrics).items()}
                    figures |= {"data/broken": broken, **timer.report(step)}
                    writer.write(step, figures)
                    progress.update(step, figures)
                with timer.pause():
                    if last or stop.is_set() or _every(step, schedule.save):
                        checkpoints.save(state)
                    if stop.is_set():
                        raise Stopped(f"SIGTERM: stopped after step {step}, which is saved.")
                    if last or _every(step, schedule.evaluate):
                        results = suite.run(step, state.variables, end=last)
                        _report(step, results, writer, progress)
    finally:
        batches.close()
        checkpoints.close()
        writer.close()
        progress.close()


def dry_run(config: ConfigDict, workdir: Path) -> str:
    """Writes `workdir/plan.json` and returns it as text; builds abstract shapes only."""
    configs.validate(config)
    sources = open_sources(config)
    schedule = make_schedule(config, epoch=sum(len(source) for source, _ in sources))
    vocab_size = config.text.vocab_size
    if config.text.tokenizer:
        vocab_size = open_tokenizer(config, config.text.tokenizer).vocab_size
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


def open_sources(config: ConfigDict) -> list[tuple[Source, float]]:
    """Opens the members of the training mixture, with their weights."""
    return [
        (evals.open_data(config, config.data.split, name), weight)
        for name, weight in parse_mixture(config.data.name)
    ]


def open_tokenizer(config: ConfigDict, path: str | Path) -> tokenizers.SentencePieceTokenizer:
    """Opens a sentencepiece model with the config's length and casing."""
    return tokenizers.SentencePieceTokenizer(path, config.text.length, config.text.lower)


def prepare_tokenizer(
    config: ConfigDict, sources: list[tuple[Source, float]], workdir: Path
) -> tokenizers.SentencePieceTokenizer:
    """Returns the run's tokenizer, kept in `workdir/tokenizer/`: given, or trained once."""
    path = workdir / "tokenizer" / "tokenizer.model"
    if jax.process_index() == 0 and not path.exists():
        if config.text.tokenizer:
            path.parent.mkdir(parents=True, exist_ok=True)
            open_tokenizer(config, config.text.tokenizer)  # refuses a file that does not fit
            shutil.copyfile(config.text.tokenizer, path)
        else:
            captions = (
                caption
                for source, _ in sources
                for caption in tokenizers.source_captions(source, TOKENIZER_EXAMPLES)
            )
            tokenizers.train_sentencepiece(
                captions, path.parent, config.text.vocab_size, lower=config.text.lower
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tokenizer")
    return open_tokenizer(config, path)


def training_batches(config: ConfigDict, sources: list[tuple[Source, float]], tokenizer: Any):
    """The dataset whose element t is this host's slice of batch t."""
    return pipeline.train_dataset(
        sources,
        tokenizer,
        image_size=config.data.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        crop=config.data.crop,
        flip=config.data.flip,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def _every(step: int, period: int) -> bool:
    return bool(period) and step % period == 0


def _due(step: int, schedule: Schedule) -> bool:
    return any(_every(step, period) for period in (schedule.log, schedule.evaluate, schedule.save))


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
        progress.say(
            f"step {step}  {name}: " + "  ".join(f"{k} {v:.4g}" for k, v in result.figures.items())
        )
        for line in result.lines:
            progress.say(f"    {line}")


class _FiniteLosses:
    """Stops the run at the first step whose loss or gradient is not finite.

    The device runs one step ahead of the check, and nothing is saved unchecked.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def watch(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Checks the step before, and remembers this one."""
        self.check()
        self._pending = (step, {k: metrics[k] for k in ("loss", "grad_norm")})

    def check(self) -> None:
        """Checks the step remembered, waiting for it if need be."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        for name, value in jax.device_get(metrics).items():
            if not math.isfinite(value):
                raise UserError(
                    f"step {step}: {name} is {value}; nothing was saved since. Lower optim.lr or "
                    f"optim.clip_norm and start again: {self._workdir / 'checkpoints'} is intact."
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
