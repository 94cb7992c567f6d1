"""Reduce the learning rate, then stop early, when an evaluation metric stops improving.

The plateau state is saved with the training state. Each evaluation counts once, even if a run is
interrupted between an evaluation and its consequences.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.errors import UserError

Memory = dict[str, Any]
"""The plateau state, scalars by name: `best`, the best value of the metric (float32); `since`, the
number of consecutive evaluations without improvement (int32); `step`, that of the last evaluation
(int32); `scale`, a factor on the learning rate (float32)."""


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Settings of `config.plateau`, which counts evaluations without a new best value."""

    figure: str = ""  # the metric, such as "val/loss" or "scores/CIDEr"; "" disables
    mode: str = "min"  # whether "min" or "max" is better
    factor: float = 0.8  # multiplies the learning rate after every `patience` evaluations
    patience: int = 8  # consecutive evaluations; 0 never changes the rate
    stop: int = 0  # end the run after so many consecutive evaluations; 0: never

    def __post_init__(self):
        if self.mode not in ("min", "max"):
            raise UserError(f"plateau.mode: {self.mode!r} is neither 'min' nor 'max'.")
        if not 0 < self.factor <= 1:
            raise UserError(f"plateau.factor: {self.factor} is not in (0, 1].")
        for field in ("patience", "stop"):
            if getattr(self, field) < 0:
                raise UserError(f"plateau.{field}: {getattr(self, field)} must not be negative.")

    @classmethod
    def of(cls, config: ConfigDict) -> "Plateau":
        """Return the settings of a run's config; raise UserError if they are invalid."""
        plateau = cls(**config.plateau)
        if plateau.figure and plateau.figure.partition("/")[0] not in config.evals:
            raise UserError(
                f"plateau.figure: {plateau.figure!r} is not a metric of an evaluator of this "
                f"config; write EVALUATOR/METRIC with one of {', '.join(config.evals) or 'evals'}."
            )
        return plateau

    def begin(self) -> Memory | None:
        """Return the plateau state before the first evaluation, or None if disabled."""
        if not self.figure:
            return None
        worst = np.float32(np.inf if self.mode == "min" else -np.inf)
        return {
            "best": worst,
            "since": np.int32(0),
            "step": np.int32(-1),
            "scale": np.float32(1),
        }

    def after(
        self, memory: Memory | None, step: int, metrics: Mapping[str, float]
    ) -> Memory | None:
        """Return the plateau state after the evaluation of `step`, with the same shardings.

        `metrics` are by "EVALUATOR/METRIC". `memory` is unchanged if the plateau's metric is
        missing, or this step was already counted.
        """
        if memory is None or self.figure not in metrics:
            return memory
        known = jax.device_get(memory)
        if step <= known["step"]:
            return memory
        value, best = np.float32(metrics[self.figure]), known["best"]
        better = value < best if self.mode == "min" else value > best
        since = 0 if better else int(known["since"]) + 1
        lower = bool(self.patience and since and since % self.patience == 0)
        new = {
            "best": value if better else best,
            "since": np.int32(since),
            "step": np.int32(step),
            "scale": np.float32(known["scale"] * (self.factor if lower else 1)),
        }
        return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), new, memory)

    def ended(self, memory: Memory | None) -> bool:
        """Return whether the run should stop early."""
        if memory is None or not self.stop:
            return False
        return int(jax.device_get(memory["since"])) >= self.stop
