"""Durations of a run in steps, and its learning rate; see config.py on durations."""

import dataclasses
import math
from typing import Any

import optax
from ml_collections import ConfigDict

from cap_pretrain.optim import optimizers

# The units of the length of a run; the first one that is set takes precedence.
UNITS = ("steps", "examples", "epochs")

# A moving average in which the initial parameters have a larger share at the end is too long.
EMA_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The durations of a run in steps."""

    total: int  # the whole run
    warmup: int  # linear rise of the learning rate
    cooldown: int  # its linear fall at the end
    log: int  # between reports
    evaluate: int  # between evaluations; 0: none on the way
    save: int  # between checkpoints; 0: none on the way


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


def make_schedule(config: ConfigDict, *, epoch: int) -> Schedule:
    """Resolve every duration of a config to steps; `epoch` is its training examples per epoch."""
    kwargs: dict[str, Any] = dict(batch_size=config.batch_size, epoch=epoch)
    total = duration(config, "total", **kwargs)
    kwargs["total"] = total
    return Schedule(
        total=total,
        warmup=duration(config.optim, "warmup", **kwargs),
        cooldown=duration(config.optim, "cooldown", **kwargs),
        log=duration(config.log, "every", **kwargs),
        evaluate=duration(config.eval, "every", **kwargs),
        save=duration(config.checkpoint, "every", **kwargs),
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
    """Return a line if a moving average of the parameters is too long for the run."""
    share = config.optim.ema**schedule.total if schedule.total else 0.0
    if share < EMA_SHARE:
        return []
    better = max(0.0, 1 + math.log(EMA_SHARE) / schedule.total)
    return [
        f"optim.ema: {config.optim.ema} is long for {schedule.total:,} steps: at the end, "
        f"{share:.0%} of the averaged parameters, which are evaluated, are the initial ones; give "
        f"at most {better:.4g}."
    ]


def learning_rate(config: ConfigDict, schedule: Schedule) -> optax.Schedule:
    """Return the learning rate of a run as a function of the step."""
    return optimizers.schedule(
        config.optim,
        total=schedule.total,
        warmup=schedule.warmup,
        cooldown=schedule.cooldown,
        batch_size=config.batch_size,
    )
