"""Weights that change during a run, written as text: "0.5", or "0@0.5,1@0.8"."""

import dataclasses
import itertools
import math
from typing import Self

import numpy as np

from cap_pretrain.errors import UserError


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight over the course of a run, linear between points and constant outside of them.

    Attributes:
        points: Pairs (share of the run, weight), by increasing share in [0, 1].
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, text: str | float, field: str) -> Self:
        """Read a number, or points `WEIGHT@SHARE` joined by commas.

        "0@0.5,1@0.8" is 0 in the first half of a run, grows to 1 in the next 30%, and stays 1.

        Args:
            text: The value of the config field.
            field: Name of the field, for messages.

        Raises:
            UserError: The text is not like that, a weight is negative, or shares do not increase.
        """
        text = str(text)
        try:
            written = text if "@" in text else f"{text}@0"
            pairs = [point.split("@") for point in written.split(",")]
            points = tuple((float(share), float(weight)) for weight, share in pairs)
        except ValueError:
            raise UserError(
                f"{field}: {text!r} is not a weight; write a number, or WEIGHT@SHARE joined by "
                "commas, as 0@0.5,1@0.8."
            ) from None
        shares = [share for share, _ in points]
        if not all(0 <= weight < math.inf for _, weight in points):
            raise UserError(f"{field}: {text!r} has a weight that is negative or not finite.")
        if not all(0 <= share <= 1 for share in shares) or sorted({*shares}) != shares:
            raise UserError(
                f"{field}: {text!r} must have shares of the run that increase from 0 to 1."
            )
        return cls(points)

    @property
    def constant(self) -> bool:
        """Whether the weight is the same all the time."""
        return len({weight for _, weight in self.points}) == 1

    @property
    def last(self) -> float:
        """The weight at the end of the run."""
        return self.points[-1][1]

    @property
    def ever(self) -> bool:
        """Whether the weight is positive at some time."""
        return any(weight > 0 for _, weight in self.points)

    def zeros(self) -> list[tuple[float, float]]:
        """Return the parts of the run in which the weight stays 0, as (from, to) in [0, 1]."""
        bounds = [(0.0, self.points[0][1]), *self.points, (1.0, self.last)]
        found: list[tuple[float, float]] = []
        for (start, before), (stop, after) in itertools.pairwise(bounds):
            if not before and not after and start < stop:
                joins = found and found[-1][1] == start
                found[-1:] = [(found[-1][0], stop)] if joins else [*found[-1:], (start, stop)]
        return found

    def then(self, share: float) -> float:
        """Return the weight at a share of the run."""
        shares, weights = zip(*self.points, strict=True)
        return float(np.interp(share, shares, weights))


def never(weights: list[Weight]) -> float | None:
    """Return a share of the run at which all `weights` are 0, or None if one always is positive."""
    shares = {share for weight in weights for share, _ in weight.points} | {0.0, 1.0}
    return next((s for s in sorted(shares) if not any(w.then(s) for w in weights)), None)
