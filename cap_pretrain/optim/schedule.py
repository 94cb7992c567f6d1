"""When things happen in a run, in steps, and the learning rate; see config.py on durations."""

import dataclasses
import math
from typing import Any

import optax
from ml_collections import ConfigDict

from cap_pretrain.optim import optimizers

# What a run's length is given in; the first that is set counts.
UNITS = ("steps", "examples", "epochs")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When things happen, in steps."""

    total: int
    warmup: int
    cooldown: int
    log: int
    evaluate: int
    save: int


def duration(section: ConfigDict, name: str, *, batch_size: int, epoch: int, total: int = 0) -> int:
    """Returns a duration in steps, rounded up, however it was given; 0 if it was not.

    Args:
      section: the part of the config that holds the fields.
      name: "total", "warmup", "cooldown" or "every".
      batch_size: examples a step.
      epoch: training examples in an epoch.
      total: steps of the whole run, for shares.
    """
    if steps := section[f"{name}_steps"]:
        return steps
    if examples := section[f"{name}_examples"] or section[f"{name}_epochs"] * epoch:
        steps = examples / batch_size
    else:
        steps = section.get(f"{name}_share", 0.0) * total
    # Without the noise of floating point: 0.07 of 100 steps are 7.000000000000001.
    return max(1, math.ceil(round(steps, 6))) if steps else 0


def make_schedule(config: ConfigDict, *, epoch: int) -> Schedule:
    """Resolves every duration of a config to steps; `epoch` is the examples in one."""
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
    """How long the run is, and which lengths the config gives besides, which do not count."""
    lengths = {f"total_{unit}": config[f"total_{unit}"] for unit in UNITS}
    counts, *others = [f"{field}={value:,}" for field, value in lengths.items() if value]
    told = f"{schedule.total:,} steps, from {counts}"
    if others:
        told += f" and not {', '.join(others)}, for which set {counts.partition('=')[0]}=0"
    return told


def learning_rate(config: ConfigDict, schedule: Schedule) -> optax.Schedule:
    """The learning rate as a function of the step."""
    return optimizers.schedule(
        config.optim,
        total=schedule.total,
        warmup=schedule.warmup,
        cooldown=schedule.cooldown,
        batch_size=config.batch_size,
    )
