"""Fits of measured times, by relative residuals: a small transfer counts as much as a large one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from specmoeoff.estimate.tables import OutOfRange
from specmoeoff.specs.profile import OperatorTable

TABLE_ERROR = 0.10
NOISE = 0.02  # relative residuals far beyond this count by their size, not its square


class TransferFit(NamedTuple):
    """t = latency_s + bytes / bytes_per_s; `fit_error` is the largest relative residual."""

    latency_s: float
    bytes_per_s: float
    fit_error: float

    @property
    def n_half_bytes(self) -> float:
        """The size that moves at half the rate."""
        return self.latency_s * self.bytes_per_s

    @property
    def use_table(self) -> bool:
        """Whether the line misses so far that the measured points are to be interpolated instead."""
        return self.fit_error > TABLE_ERROR


def fit_transfer(sizes: Sequence[float], seconds: Sequence[float]) -> TransferFit:
    """The line through (bytes, seconds), both above 0, that has a latency of at least 0.

    Relative weights (w = 1 / t), since plain least squares misses the latency by its double and more; soft L1, since
    disturbances only ever lengthen a transfer (reference/measuring.md, section 3).
    """
    from scipy.optimize import least_squares  # here: the runtime reads this module's neighbours and should stay small

    n, t = np.asarray(sizes, float), np.asarray(seconds, float)
    scale = np.array([t.min(), t.max() / n.max()])  # both unknowns near 1
    design = np.stack([np.ones_like(n), n], axis=1) * scale / t[:, None]
    start = np.maximum(np.linalg.lstsq(design, np.ones_like(t), rcond=None)[0], 1e-6)
    found = least_squares(
        lambda x: design @ x - 1.0, start, lambda x: design, bounds=([0, 1e-12], np.inf), loss="soft_l1", f_scale=NOISE
    )
    latency, per_byte = found.x * scale
    error = np.max(np.abs(design @ found.x - 1.0))
    return TransferFit(float(latency), float(1.0 / per_byte), float(error))


def transfer_intervals(
    fit: TransferFit, sizes: Sequence[float], seconds: Sequence[float]
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """95 % intervals of `fit_transfer`'s latency (s) and rate (bytes/s); None below three sizes or where any rate would do.

    From the scatter about the line: the covariance of an M-estimate (Huber, Robust Statistics, 1981, eq. 7.6.5) with
    Student's t of n - 2. A bootstrap would need more samples a size than there is time for.
    """
    from scipy.special import stdtrit

    if len(sizes) < 3:
        return None
    n, t = np.asarray(sizes, float), np.asarray(seconds, float)
    unknowns = np.array([max(fit.latency_s, t.min() * 1e-6), 1 / fit.bytes_per_s])
    design = np.stack([np.ones_like(n), n], axis=1) * unknowns / t[:, None]
    scaled = ((fit.latency_s + n / fit.bytes_per_s) / t - 1.0) / NOISE
    influence, slope = scaled / np.sqrt(1 + scaled**2), np.mean((1 + scaled**2) ** -1.5)
    variance = NOISE**2 * np.sum(influence**2) / (len(n) - 2) / slope**2
    spread = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    latency, per_byte = (unknowns * float(stdtrit(len(n) - 2, 0.975)) * spread).tolist()
    if per_byte * fit.bytes_per_s >= 1:
        return None
    rates = (1 / (1 / fit.bytes_per_s + per_byte), 1 / (1 / fit.bytes_per_s - per_byte))
    return (max(fit.latency_s - latency, 0.0), fit.latency_s + latency), rates


def never_falling(seconds: Sequence[float]) -> tuple[float, ...]:
    """The nearest times, by relative residuals, of which none is less than one before it: more rows never take less, so where
    they seem to, some of the samples were disturbed (isotonic regression: Barlow et al., Statistical Inference under Order
    Restrictions, 1972)."""
    from scipy.optimize import isotonic_regression

    return tuple(np.exp(isotonic_regression(np.log(seconds)).x).tolist())


def leave_one_out_error(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Median relative error of predicting each inner point linearly from its neighbours; None below three points."""
    if len(sizes) < 3:
        return None
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    predicted = y[:-2] + share * (y[2:] - y[:-2])
    return float(np.median(np.abs(predicted / np.maximum(y[1:-1], 1e-12) - 1.0)))


@dataclass(frozen=True)
class OperatorFit:
    """t = overhead_s + max(bytes / bytes_per_s, flops / flops_per_s), within the sizes that were measured.

    `loo_error` is the median relative error of an inner point that was left out of the fit.
    """

    table: OperatorTable
    overhead_s: float
    bytes_per_s: float
    flops_per_s: float
    fit_error: float
    loo_error: float

    def __call__(self, rows: float) -> float:
        """Seconds at `rows`; OutOfRange beyond the measured ones."""
        grid = self.table.grid[0]
        if not grid[0] <= rows <= grid[-1]:
            raise OutOfRange(
                f"operator {self.table.operator}: {rows:g} {self.table.axes[0]} are outside the fitted {grid[0]:g} to "
                f"{grid[-1]:g}; measure it there."
            )
        moved, worked = (float(np.interp(rows, grid, values)) for values in (self.table.bytes, self.table.flops))
        return self.overhead_s + max(moved / self.bytes_per_s, worked / self.flops_per_s)


def fit_operator(table: OperatorTable) -> OperatorFit:
    """The roofline with an overhead through a table over one axis, of four points or more."""
    from scipy.optimize import least_squares

    moved, worked, t = (np.asarray(values, float) for values in (table.bytes, table.flops, table.seconds))
    # As logarithms of seconds at the largest size: all above 0 and of like size.
    largest = np.array([1.0, moved.max(), worked.max()])
    start = np.log([t.min() / 10, (t * moved.max() / moved).min(), (t * worked.max() / worked).min()])

    def predict(x: np.ndarray) -> np.ndarray:
        overhead, per_byte, per_flop = np.exp(x) / largest
        return overhead + np.maximum(moved * per_byte, worked * per_flop)

    def solve(keep: np.ndarray) -> np.ndarray:
        residuals = lambda x: (predict(x) / t - 1.0)[keep]  # noqa: E731
        return least_squares(residuals, start, loss="soft_l1", f_scale=NOISE).x

    every = np.arange(len(t))
    x = solve(every)
    missed = [abs(predict(solve(every != i))[i] / t[i] - 1.0) for i in every[1:-1]]
    overhead, per_byte, per_flop = (np.exp(x) / largest).tolist()
    error = float(np.max(np.abs(predict(x) / t - 1.0)))
    return OperatorFit(table, overhead, 1 / per_byte, 1 / per_flop, error, float(np.median(missed)))
