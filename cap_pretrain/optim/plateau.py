"""Waiting for a figure of an evaluator to get better: a lower learning rate, then an early end.

What is remembered is part of the state, so it is saved with it, and each evaluation counts once,
also when a run is stopped between an evaluation and what should have followed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.errors import UserError

Memory = dict[str, Any]
"""Scalars: `best`, the best figure (float32); `since`, evaluations in a row that were no better;
`step`, of the last evaluation (int32); `scale`, what the learning rate is multiplied by."""


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Settings of `config.plateau`.

    Attributes:
      figure: which figure, as "val/loss" or "scores/CIDEr"; "" waits for nothing.
      mode: which is better: "min" or "max".
      factor: the learning rate is multiplied by it after every `patience` evaluations in a row
        that were no better than the best.
      patience: in evaluations; 0 leaves the learning rate.
      stop: the run ends after so many evaluations in a row that were no better; 0: it does not.
    """

    figure: str = ""
    mode: str = "min"
    factor: float = 0.8
    patience: int = 8
    stop: int = 0

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
        """The settings of a run's config; raises UserError if they make no sense."""
        plateau = cls(**config.plateau)
        if plateau.figure and plateau.figure.rpartition("/")[0] not in config.evals:
            raise UserError(
                f"plateau.figure: {plateau.figure!r} is no figure of an evaluator of this config; "
                f"write EVALUATOR/FIGURE with one of {', '.join(config.evals) or 'evals'}."
            )
        return plateau

    def begin(self) -> Memory | None:
        """What is remembered before the first evaluation; None if nothing is waited for."""
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
        self, memory: Memory | None, step: int, figures: Mapping[str, float]
    ) -> Memory | None:
        """Returns `memory` after an evaluation, laid out on the devices as it was.

        Args:
          memory: before it.
          step: when it was.
          figures: what it found, by "EVALUATOR/FIGURE"; nothing changes if the figure is not there,
            or this step is known already.
        """
        if memory is None or self.figure not in figures:
            return memory
        known = jax.device_get(memory)
        if step <= known["step"]:
            return memory
        figure, best = np.float32(figures[self.figure]), known["best"]
        better = figure < best if self.mode == "min" else figure > best
        since = 0 if better else int(known["since"]) + 1
        lower = bool(self.patience and since and since % self.patience == 0)
        new = {
            "best": figure if better else best,
            "since": np.int32(since),
            "step": np.int32(step),
            "scale": np.float32(known["scale"] * (self.factor if lower else 1)),
        }
        return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), new, memory)

    def ended(self, memory: Memory | None) -> bool:
        """Whether the run is to end, as nothing has become better for long enough."""
        if memory is None or not self.stop:
            return False
        return int(jax.device_get(memory["since"])) >= self.stop
