"""The one way to time and to summarise. NumPy only: the runtime uses it too."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from specmoeoff.specs.profile import Measurement

MODE_GAP = 0.15
MODE_SHARE = 0.2


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def sample(work: Callable[[], object], budget_s: float, min_samples: int = 5) -> list[float]:
    """Seconds of repeated calls after one warm-up, for about `budget_s`."""
    work()
    samples: list[float] = []
    end = time.perf_counter() + budget_s
    while len(samples) < min_samples or time.perf_counter() < end:
        samples.append(seconds_of(work))
    return samples


def measurement(samples: Sequence[float], unit: str, statistic: str = "median", note: str = "") -> Measurement:
    """Keep all samples; `statistic` (median, max, p95) is what planners read."""
    values = np.asarray(samples, float)
    value = {"median": np.median(values), "max": values.max(), "p95": np.percentile(values, 95)}[statistic]
    kept = tuple(float(f"{s:.6g}") for s in samples)
    return Measurement(value=float(value), unit=unit, statistic=statistic, samples=kept, note=note)


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float, float]:
    """Median of paired ratios, and the distribution-free interval of the median by order statistics.

    Returns (median, low, high, confidence): the narrowest interval of at least 95 % confidence, or all the samples with
    the confidence they have. Of n independent samples the i-th smallest and i-th largest enclose the median with
    probability 1 - 2 * P(Binomial(n, 1/2) < i): six pairs give 96.9 % from the smallest to the largest.
    """
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    n = len(ratios)
    below = [sum(math.comb(n, j) for j in range(i)) / 2**n for i in range(n // 2 + 2)]
    depth = max((i for i in range(1, n // 2 + 1) if 1 - 2 * below[i] >= 0.95), default=1)
    return float(np.median(ratios)), ratios[depth - 1], ratios[n - depth], 1 - 2 * below[depth]


def modes(samples: Sequence[float]) -> tuple[float, ...]:
    """Medians of the speeds a machine flips between: one, or two where a wide gap splits the samples."""
    values = np.sort(np.asarray(samples, float))
    if len(values) >= 5:
        gaps = values[1:] / values[:-1]
        at = int(np.argmax(gaps)) + 1
        if gaps[at - 1] > 1 + MODE_GAP and min(at, len(values) - at) >= MODE_SHARE * len(values):
            return float(np.median(values[:at])), float(np.median(values[at:]))
    return (float(np.median(values)),)
