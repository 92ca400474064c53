"""Fits of measured times."""

from collections.abc import Sequence

import numpy as np


def fit_transfer(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """t = latency + bytes / bandwidth with relative weights (w = 1 / t), so that small transfers count.

    Returns (latency_s, bytes_per_s, largest relative error).
    """
    n, t = np.asarray(sizes, float), np.asarray(seconds, float)
    design = np.stack([np.ones_like(n), n], axis=1) / t[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(design, np.ones_like(t), rcond=None)
    predicted = latency + per_byte * n
    return float(max(latency, 0.0)), float(1.0 / per_byte), float(np.max(np.abs(predicted / t - 1.0)))


def leave_one_out_error(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Median relative error of predicting each inner point linearly from its neighbours; None below three points."""
    if len(sizes) < 3:
        return None
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    share = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    predicted = y[:-2] + share * (y[2:] - y[:-2])
    return float(np.median(np.abs(predicted / np.maximum(y[1:-1], 1e-12) - 1.0)))
