"""Fitting power laws y = a x^-b + c, such as of a loss in the number of parameters."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cap_pretrain.errors import UserError

CONFIDENCE = 0.95  # How often the bands of laws fitted to noisy data contain the true value


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = a x^-b + c, fitted to `points` points by least squares of log y.

    `c`, the irreducible part, is 0 if it was not fitted. `covariance` is of those of (log a, b, c)
    that were fitted, float64 [2, 2] or [3, 3]. `spread` is the half-width of the band in standard
    errors (Student's t), infinite if there are no more points than parameters.
    """

    a: float
    b: float
    c: float
    covariance: np.ndarray
    spread: float
    points: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the fitted y at x, of any shape."""
        return self.a * np.asarray(x, np.float64) ** -self.b + self.c

    @property
    def b_band(self) -> tuple[float, float]:
        """The confidence interval of b: lower and upper bound."""
        half = self.spread * np.sqrt(self.covariance[1, 1]) if np.isfinite(self.spread) else np.inf
        return self.b - half, self.b + half

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the confidence band of the curve at x [n]: lower and upper y, [n] each."""
        y = self(x)
        if not np.isfinite(self.spread):
            return np.full_like(y, 0.0), np.full_like(y, np.inf)
        slope = _slope(np.asarray(x, np.float64), self.a, self.b, self.c)[:, : len(self.covariance)]
        error = np.sqrt(np.einsum("ni,ij,nj->n", slope, self.covariance, slope))
        return y * np.exp(-self.spread * error), y * np.exp(self.spread * error)

    def __str__(self) -> str:
        low, high = self.b_band
        offset = f" + {self.c:.4g}" if len(self.covariance) == 3 else ""
        band = f"b in [{low:.3g}, {high:.3g}]" if np.isfinite(high) else "too few points for a band"
        return f"{self.a:.4g} x^{-self.b:.4g}{offset}  ({self.points} points; {band})"


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto frontier of points (x, y): those with less y than all up to their x."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def fit(x: np.ndarray, y: np.ndarray, *, offset: bool = False) -> PowerLaw:
    """Fit a power law to positive x [n] and y [n]; `offset` fits c, too, from 0 to the least y.

    The band comes from the covariance of the least-squares fit (linearized if there is an offset),
    with the noise estimated from the residuals of log y. Raises UserError if there are too few
    points, or some are not positive.
    """
    from scipy import optimize, special

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    needed = 3 if offset else 2
    if len(np.unique(x)) < needed:
        raise UserError(
            f"a power law of {needed} parameters needs as many different x, not "
            f"{len(np.unique(x))}; run more trials."
        )
    if not (np.all(x > 0) and np.all(y > 0) and np.isfinite([x, y]).all()):
        raise UserError("a power law can only be fitted to positive, finite numbers.")

    def line(c: float) -> tuple[np.ndarray, float]:
        """Return (log a, b) for a given c, and the squared error of log y."""
        design = np.stack([np.ones_like(x), -np.log(x)], axis=1)
        log_a, b = np.linalg.lstsq(design, np.log(y - c), rcond=None)[0]
        return np.array([log_a, b]), np.sum(_residual((log_a, b, c), x, y) ** 2)

    if offset:
        # Try values of c ever closer to the least y, since the best may be anywhere.
        tried = y.min() * np.concatenate([[0.0], 1 - np.logspace(-0.01, -6, 200)])
        start = min(tried, key=lambda c: line(c)[1])
        found = optimize.least_squares(
            _residual,
            [*line(start)[0], start],
            args=(x, y),
            bounds=([-np.inf, -np.inf, 0.0], [np.inf, np.inf, y.min()]),
            x_scale=[1.0, 0.1, y.min()],
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )
        log_a, b, c = found.x
    else:
        (log_a, b), c = line(0.0)[0], 0.0
    a, freedom = float(np.exp(log_a)), len(x) - needed
    slope = _slope(x, a, b, c)[:, :needed]
    noise = np.sum(_residual((log_a, b, c), x, y) ** 2) / max(freedom, 1)
    covariance = noise * np.linalg.pinv(slope.T @ slope)
    spread = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2)) if freedom else np.inf
    return PowerLaw(a, float(b), float(c), covariance, spread, len(x))


def _residual(parameters: tuple[float, float, float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the errors [n] of log y."""
    log_a, b, c = parameters
    return np.log(np.exp(log_a) * x**-b + c) - np.log(y)


def _slope(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """Return the derivatives [n, 3] of the fitted log y by log a, b and c."""
    power = a * x**-b
    return np.stack([power, -power * np.log(x), np.ones_like(x)], axis=1) / (power + c)[:, None]
