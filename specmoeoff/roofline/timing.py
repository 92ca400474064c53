"""The one way to time and to summarise. NumPy only: the runtime uses it too."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from specmoeoff.specs.profile import Measurement

MODE_GAP = 0.15
MODE_SHARE = 0.125


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
    """Keep all samples; `statistic` (min, p25, median, p75, p95, max) is what planners read."""
    values = np.asarray(samples, float)
    value = np.percentile(values, {"min": 0, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}[statistic])
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
    """Medians of the speeds a machine flips between: one, or two where the best split leaves a gap wider than both.

    A mode is its samples from the 10th to the 90th percentile: strays between two modes do not join them, and a tail of
    slow samples is wider than the gap above it.
    """
    values = np.sort(np.asarray(samples, float))
    n, fewest = len(values), max(2, math.ceil(MODE_SHARE * len(values)))
    if n < 2 * fewest:
        return (float(np.median(values)),)
    at = np.arange(fewest, n - fewest + 1)
    between = np.cumsum(values - values.mean())[at - 1] ** 2 / (at * (n - at))  # variance that a split explains
    slow, fast = np.split(values, [at[np.argmax(between)]])
    (slow_from, slow_to), (fast_from, fast_to) = np.percentile(slow, (10, 90)), np.percentile(fast, (10, 90))
    if fast_from - slow_to > max(slow_to - slow_from, fast_to - fast_from, MODE_GAP * slow_to):
        return float(np.median(slow)), float(np.median(fast))
    return (float(np.median(values)),)
