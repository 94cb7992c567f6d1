"""Mixing datasets by weight in many lanes at once, evenly over rows and lanes."""

import math
from collections.abc import Sequence

import numpy as np

GOLDEN = (math.sqrt(5) - 1) / 2
"""A number whose multiples spread most evenly, modulo 1."""

_PERIOD = 2**18  # about so many rows, weights of 0.0002 are kept within 1%


class Mixing:
    """Which member a lane draws at each row, and how many it has drawn of it before.

    Row q of lane v draws the member in whose part of [0, 1), as long as its weight, v / V + q c / P
    lies, modulo 1. So at every q the lanes spread evenly over [0, 1), and so do the rows of a lane,
    because c / P is about the golden ratio. P, a multiple of V, is the period in q, and c has no
    common divisor with P, so lane v is lane 0 from some row on.
    """

    def __init__(self, weights: np.ndarray, lanes: int):
        self._period = period = lanes * -(-_PERIOD // lanes)
        stride = round(period * GOLDEN)
        while math.gcd(stride, period) > 1:
            stride += 1
        bounds = np.rint(np.cumsum(weights) / weights.sum() * period).astype(np.int64)
        for member in range(len(bounds)):  # every member is drawn
            bounds[member] = max(bounds[member], (bounds[member - 1] if member else 0) + 1)
        bounds = np.minimum(bounds, period - np.arange(len(bounds))[::-1])
        places = np.arange(period, dtype=np.int64) * stride % period
        self._members = np.searchsorted(bounds, places, side="right").astype(np.int16)
        self._rows = [np.flatnonzero(self._members == member) for member in range(len(bounds))]
        self._before = np.zeros(period, np.int32)
        for rows in self._rows:
            self._before[rows] = np.arange(len(rows))
        inverse = pow(stride, -1, period)
        self._phases = [lane * (period // lanes) * inverse % period for lane in range(lanes)]
        self._skipped = [rows.searchsorted(self._phases).tolist() for rows in self._rows]

    def drawn(self, lane: int, row: int) -> tuple[int, int]:
        """Return the member that row `row` of a lane draws, and the index of the example in it."""
        periods, place = divmod(row + self._phases[lane], self._period)
        member = int(self._members[place])
        before = int(self._before[place]) - self._skipped[member][lane]
        return member, periods * len(self._rows[member]) + before

    def count(self, member: int, lanes: Sequence[int], rows: int) -> np.ndarray:
        """Return how many of the first `rows` rows of each lane draw a member, int64 [lanes]."""
        periods, places = np.divmod(rows + np.take(self._phases, lanes), self._period)
        own = self._rows[member]
        skipped = np.take(self._skipped[member], lanes)
        return periods * len(own) + own.searchsorted(places) - skipped
