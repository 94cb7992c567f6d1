"""How many examples an evaluation reads, so that it does not outlast the training it belongs to.

An evaluator whose `work` is known reads all of its examples if their forward passes fit into its
part of the budget: the passes of the training since the previous evaluation (a training example
costs three: forward, and backward at twice that), divided among the evaluators that run together.
Else it reads the first examples that fit, or `LEAST`. Long runs, such as published recipes, are
therefore evaluated in full. Options that differ from their defaults are never changed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

PASSES = 3
"""Forward passes that a training example costs: the backward pass takes two (see flops.py)."""

LEAST = 64
"""Examples that an evaluation reads if it has them: fewer say nothing."""


class Work(NamedTuple):
    """What an evaluation costs.

    `images` are the examples it reads; `passes` maps a number of examples to the forward passes for
    them, about; `limits` maps it to the options that make the evaluator read so many; `least` is
    the smallest number to reduce them to.
    """

    images: int
    passes: Callable[[int], float] = float
    limits: Callable[[int], dict[str, int]] = lambda n: {"limit": n}
    least: int = LEAST


def work_of(evaluator: Any) -> Work | None:
    """Return the work of an evaluator, or None if it does not say."""
    work = getattr(evaluator, "work", None)
    return work() if work else None


def fitted(options: Any, work: Work | None, budget: float) -> Any:
    """Return the options with which an evaluation needs at most `budget` forward passes.

    They are those given if the work is unknown or fits, or if the user has set what would change.
    """
    if work is None or work.passes(work.images) <= budget:
        return options
    least = min(work.least, work.images)
    low, high = least, work.images
    while low < high:  # the most that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if work.passes(middle) <= budget else (low, middle - 1)
    batch = getattr(options, "batch_size", 1)
    count = low // batch * batch if low > batch else low  # whole batches
    count = max(count, least)
    changes, defaults = work.limits(count), type(options)()
    if count >= work.images or any(
        getattr(options, name) != getattr(defaults, name) for name in changes
    ):
        return options
    if hasattr(options, "batch_size"):
        changes["batch_size"] = min(options.batch_size, *changes.values())
    return dataclasses.replace(options, **changes)
