"""Power laws, as of a loss in the number of parameters: y = a x^-b + c."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cap_pretrain.errors import UserError

# Of the bands: how often, of laws fitted to data with noise, they hold what is true.
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = a x^-b + c, fitted by least squares of log y.

    Attributes:
      a, b, c: as above; c, what is irreducible, is 0 if it was not fitted.
      covariance: of the fitted ones of (log a, b, c); [2, 2] or [3, 3].
      spread: how many standard errors the band is wide to each side (Student's t); infinite if
        there are no more points than parameters.
      points: how many it was fitted to.
    """

    a: float
    b: float
    c: float
    covariance: np.ndarray
    spread: float
    points: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The fitted y at x."""
        return self.a * np.asarray(x, np.float64) ** -self.b + self.c

    @property
    def b_band(self) -> tuple[float, float]:
        """The confidence band of b."""
        half = self.spread * np.sqrt(self.covariance[1, 1]) if np.isfinite(self.spread) else np.inf
        return self.b - half, self.b + half

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The confidence band of the curve at x: lower and upper y."""
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
    """Of points (x, y), those that have less y than all others of as little x, or less."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def fit(x: np.ndarray, y: np.ndarray, *, offset: bool = False) -> PowerLaw:
    """Fits a power law.

    The band comes from the covariance of the least squares (linearised, if there is an offset), the
    scatter of log y around the law being the noise.

    Args:
      x, y: positive, [n].
      offset: whether c is fitted, too, between 0 and the least y.

    Raises:
      UserError: too few points, or some are not positive.
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
        raise UserError("a power law is of positive numbers; these are not.")

    def line(c: float) -> tuple[np.ndarray, float]:
        """(log a, b) for a given c, and the squared error of log y."""
        design = np.stack([np.ones_like(x), -np.log(x)], axis=1)
        log_a, b = np.linalg.lstsq(design, np.log(y - c), rcond=None)[0]
        return np.array([log_a, b]), np.sum(_residual((log_a, b, c), x, y) ** 2)

    if offset:
        # Where to begin: nearer and nearer to the least y, as the best c may be anywhere.
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
    log_a, b, c = parameters
    return np.log(np.exp(log_a) * x**-b + c) - np.log(y)


def _slope(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """Derivatives [n, 3] of the fitted log y by log a, b and c."""
    power = a * x**-b
    return np.stack([power, -power * np.log(x), np.ones_like(x)], axis=1) / (power + c)[:, None]
