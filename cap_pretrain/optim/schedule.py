"""Durations of a run in steps, and its learning rate; see config.py on durations."""

import dataclasses
import math
from typing import Any

import optax
from ml_collections import ConfigDict

from cap_pretrain.optim import optimizers
from cap_pretrain.optim.schedule_free import NAME

# The units of the length of a run; the first one that is set takes precedence.
UNITS = ("steps", "examples", "epochs")

# A moving average in which the initial parameters have a larger share at the end is too long.
EMA_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of a run: (step, examples a step from there on), ascending from step 0."""

    sizes: tuple[tuple[int, int], ...]

    def then(self, step: int, size: int) -> "BatchSizes":
        """Return these up to `step`, then `size`. If there are none yet, `size` counts from 0."""
        if not self.sizes:
            return BatchSizes(((0, size),))
        kept = tuple(entry for entry in self.sizes if entry[0] < step)
        return BatchSizes(kept if kept and kept[-1][1] == size else (*kept, (step, size)))

    def examples(self, step: int) -> int:
        """Return how many examples the first `step` steps show."""
        ends = [first for first, _ in self.sizes[1:]] + [step]
        pairs = zip(self.sizes, ends, strict=True)
        return sum(size * max(0, min(end, step) - first) for (first, size), end in pairs)

    def steps(self, examples: float) -> float:
        """Return the step, a fraction included, at which so many examples are shown."""
        first, size = next(e for e in reversed(self.sizes) if self.examples(e[0]) <= examples)
        return first + (examples - self.examples(first)) / size

    @property
    def offset(self) -> int:
        """What is added to `step * size`, with the last size, to get the examples shown."""
        first, size = self.sizes[-1]
        return self.examples(first) - first * size


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The durations of a run in steps.

    If the batch size changed in a run whose length is given in examples or epochs, the learning
    rate is a function of the examples shown: `shift` is what is added to a step to get them in
    steps of the present batch size. `warmup` and `cooldown` are in such steps.
    """

    total: int  # the whole run
    warmup: float  # linear rise of the learning rate
    cooldown: float  # its linear fall at the end
    log: int  # between reports
    evaluate: int  # between evaluations; 0: none on the way
    save: int  # between checkpoints; 0: none on the way
    shift: float = 0.0


def duration(section: ConfigDict, name: str, *, batch_size: int, epoch: int, total: int = 0) -> int:
    """Return a duration in steps, rounded up; 0 if it is not set.

    The fields of `section` are `NAME_steps`, `NAME_examples`, `NAME_epochs` and perhaps
    `NAME_share` (a fraction of `total` steps), in order of precedence. `name` is "total", "warmup",
    "cooldown" or "every"; `batch_size` and `epoch` are the examples of a step and of an epoch.
    """
    if steps := section[f"{name}_steps"]:
        return steps
    if examples := section[f"{name}_examples"] or section[f"{name}_epochs"] * epoch:
        steps = examples / batch_size
    else:
        steps = section.get(f"{name}_share", 0.0) * total
    # Rounding removes floating-point noise: 0.07 of 100 steps is 7.000000000000001.
    return max(1, math.ceil(round(steps, 6))) if steps else 0


def make_schedule(config: ConfigDict, *, epoch: int, batches: BatchSizes | None = None) -> Schedule:
    """Resolve every duration of a config to steps; `epoch` is its training examples per epoch.

    `batches`: the batch sizes of the run, if `config.batch_size` is not that of all its steps.
    """
    kwargs: dict[str, Any] = dict(batch_size=config.batch_size, epoch=epoch)
    kwargs["total"] = total = duration(config, "total", **kwargs)
    warmup: float = duration(config.optim, "warmup", **kwargs)
    shift = 0.0
    if batches and len(batches.sizes) > 1:
        by_steps, changed = config.total_steps, batches.sizes[-1][0]
        steps, examples = (config.optim[f"warmup_{unit}"] for unit in UNITS[:2])
        examples = examples or config.optim.warmup_epochs * epoch
        if by_steps and not steps and examples:
            warmup = batches.steps(examples)
            if warmup > changed:
                warmup = changed * examples / batches.examples(changed)
        if not by_steps:
            shift = batches.offset / config.batch_size
            whole = config.total_examples or config.total_epochs * epoch
            total = math.ceil(round(whole / config.batch_size - shift, 6))
            # The last step of the earlier size may have shown a few examples too many.
            total = max(total, changed) if batches.examples(changed - 1) < whole else total
            if steps:
                # A warm-up in progress continues from the share of it that is done.
                shown = batches.examples(min(steps, changed)) * max(1, steps / changed)
                warmup = shown / config.batch_size
    return Schedule(
        total=total,
        warmup=warmup,
        cooldown=duration(config.optim, "cooldown", **kwargs),
        log=duration(config.log, "every", **kwargs),
        evaluate=duration(config.eval, "every", **kwargs),
        save=duration(config.checkpoint, "every", **kwargs),
        shift=shift,
    )


def describe(config: ConfigDict, schedule: Schedule) -> str:
    """Return a line for the log: the length of the run, and the length fields that are ignored."""
    lengths = {f"total_{unit}": config[f"total_{unit}"] for unit in UNITS}
    counts, *others = [f"{field}={value:,}" for field, value in lengths.items() if value]
    line = f"{schedule.total:,} steps, from {counts}"
    if others:
        line += f"; ignoring {', '.join(others)} (set {counts.partition('=')[0]}=0 to use it)"
    return line


def notes(config: ConfigDict, schedule: Schedule) -> list[str]:
    """Return a line if the average of the parameters does not fit the rate or length of the run."""
    decay = config.optim.decay
    if schedule.total and config.optim.name == NAME and (decay != "constant" or schedule.cooldown):
        lowers, instead = f"decay: {decay}", "decay=constant"
        if decay == "constant":
            lowers, instead = "cooldown_share, or _steps, _examples or _epochs,", "cooldown_share=0"
        return [
            f"optim.{lowers} lowers the rate, but optim.name={NAME} averages in place of that; "
            f"give --config.optim.{instead}."
        ]
    share = config.optim.ema**schedule.total if schedule.total else 0.0
    if share < EMA_SHARE:
        return []
    better = max(0.0, 1 + math.log(EMA_SHARE) / schedule.total)
    return [
        f"optim.ema: {config.optim.ema} is long for {schedule.total:,} steps: at the end, the "
        "averaged parameters, which are evaluated, still contain the initial ones with a weight of "
        f"{share:.0%}; give at most {better:.4g}."
    ]


def describe_progress(
    config: ConfigDict, schedule: Schedule, batches: BatchSizes, *, start: int, epoch: int
) -> str:
    """Return a line for the log about a run that resumes with another config at step `start`.

    `epoch` is its training examples per epoch.
    """
    seen, left = batches.examples(start), schedule.total - start
    whole = batches.examples(schedule.total)
    line = (
        f"{seen:,} examples ({seen / epoch:.2f} epochs) are seen; {left:,} more steps of "
        f"{config.batch_size:,} make {whole:,} ({whole / epoch:.2f} epochs)."
    )
    if len(batches.sizes) > 1:
        sizes = ", ".join(f"{size:,} from step {first:,}" for first, size in batches.sizes)
        rate = "steps" if config.total_steps else "examples"
        line += (
            f" Batch size: {sizes}; data continue with the next example, the learning rate is a "
            f"function of {rate}{', scaled to the batch size' if config.optim.lr_batch else ''}."
        )
    return line


def learning_rate(config: ConfigDict, schedule: Schedule) -> optax.Schedule:
    """Return the learning rate of a run as a function of the step."""
    rate = optimizers.schedule(
        config.optim,
        total=schedule.total + schedule.shift if schedule.shift else schedule.total,
        warmup=schedule.warmup,
        cooldown=schedule.cooldown,
        batch_size=config.batch_size,
    )
    return (lambda step: rate(step + schedule.shift)) if schedule.shift else rate
