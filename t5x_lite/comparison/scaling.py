# SPDX-License-Identifier: Apache-2.0
"""Scaling laws: losses against cost, L = E + A / N^a, with bootstrap intervals.

n sizes    r resamples    g exponents that are tried
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_lite.comparison.example_losses import ExampleLosses

# Exponents that are tried; the best is refined between its neighbors.
EXPONENTS = np.geomspace(0.02, 4.0, 160)
REFINEMENTS = 3
RESAMPLES = 1000
LEAST_SIZES = 4  # three numbers are fitted: fewer sizes leave nothing to judge the fit by


class PowerLaw(NamedTuple):
    """L(N) = floor + factor / (N / unit)^exponent, for each of r resamples.

    Attributes:
      floor: [r] E, the loss of an infinite N.
      factor: [r] A, the rest of the loss at N = unit.
      exponent: [r] a.
      unit: cost that others are divided by, for numbers of a common size.
    """

    floor: np.ndarray
    factor: np.ndarray
    exponent: np.ndarray
    unit: float

    def losses_at(self, cost: float) -> np.ndarray:
        """Losses [r] at a cost."""
        return self.floor + self.factor * (cost / self.unit) ** -self.exponent


def fit_law(costs: Sequence[float], losses: np.ndarray) -> PowerLaw:
    """Fits the law to losses by least squares of their relative errors.

    For each exponent E and A, both at least zero, follow in closed form; the best of a grid of
    exponents is refined. Nothing is drawn and nothing can fail to converge.

    Args:
      costs: [n] N of each size, positive.
      losses: [r n] a loss for each resample and size, positive.
    """
    log_costs, count = np.log(np.array(costs, float)), len(losses)
    unit = float(np.exp(log_costs.mean()))
    log_costs -= log_costs.mean()
    grid = np.broadcast_to(EXPONENTS, (count, len(EXPONENTS)))
    for _ in range(REFINEMENTS + 1):
        floor, factor, errors = solve_linear(log_costs, losses, grid)
        best = errors.argmin(axis=1)
        rows = np.arange(count)
        law = PowerLaw(floor[rows, best], factor[rows, best], grid[rows, best], unit)
        low = grid[rows, np.maximum(best - 1, 0)]
        high = grid[rows, np.minimum(best + 1, grid.shape[1] - 1)]
        grid = np.geomspace(low, high, 21, axis=1)
    return law


def solve_linear(
    log_costs: np.ndarray, losses: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E and A of the smallest sum of squared relative errors, for exponents that are tried.

    Args:
      log_costs: [n] logarithms of costs.
      losses: [r n].
      exponents: [r g].

    Returns:
      E, A and the sum of squares, each [r g].
    """
    powers = np.exp(-exponents[:, :, None] * log_costs)
    weights = 1 / losses[:, None, :]  # errors are (E + A * power) / loss - 1
    x, y = np.broadcast_to(weights, powers.shape), powers * weights
    xx, xy, yy = (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)
    x1, y1 = x.sum(-1), y.sum(-1)
    determinant = np.maximum(xx * yy - xy * xy, 1e-300)
    floor = (x1 * yy - y1 * xy) / determinant
    factor = (y1 * xx - x1 * xy) / determinant
    # Where one of both would be negative it is zero, and the other is the best alone.
    factor = np.where(floor < 0, y1 / yy, np.where(factor < 0, 0, factor))
    floor = np.where(floor < 0, 0, np.where(factor == 0, x1 / xx, floor))
    errors = (floor[..., None] * x + factor[..., None] * y - 1) ** 2
    return floor, factor, errors.sum(-1)


def resample_losses(
    measured: Sequence[Sequence[ExampleLosses]], draw: np.random.Generator, count: int
) -> np.ndarray:
    """Losses [r n] of sizes: the measured ones, then bootstrap resamples of seeds and examples.

    A resample has the same examples in every size, since all were measured on these; seeds are
    drawn in each size anew, one fewer than there are, so that their variance is not too small
    (Rao and Wu, 1988).

    Args:
      measured: losses by example of each size and seed.
      draw: random generator.
      count: number of resamples besides the measured losses.
    """
    nats = [np.array([run.nats for run in runs]) for runs in measured]
    tokens = np.array(measured[0][0].tokens, float)
    size = len(tokens)
    # Means over seeds of the losses of each run, as the report has them.
    results = [[float((each.sum(1) / tokens.sum()).mean()) for each in nats]]
    for _ in range(count):
        times = np.bincount(draw.integers(size, size=size), minlength=size).astype(float)
        total = times @ tokens
        row = []
        for each in nats:
            seeds = draw.integers(len(each), size=max(len(each) - 1, 1))
            row.append(float((each[seeds] @ times).mean() / total))
        results.append(row)
    return np.array(results)


class Interval(NamedTuple):
    """A number with its 95 % bootstrap interval.

    Attributes:
      value: the number.
      low: lower end.
      high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def bootstrap_interval(values: np.ndarray) -> Interval:
    """Interval of a number whose first value is the measured one, the rest resamples."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))
