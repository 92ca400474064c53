"""The one way to time and to summarise. NumPy only: the runtime uses it too."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from specmoeoff.specs.profile import Measurement

MODE_GAP, JOINT_GAP = 0.15, 0.04
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
    """Medians of the speeds a machine flips between: one, or two that `split` finds."""
    values = np.asarray(samples, float)
    at = split(values, MODE_GAP * float(np.median(values)))
    parts = [values] if at is None else [values[values < at], values[values >= at]]
    return tuple(float(np.median(part)) for part in parts)


def joint_modes(rates: np.ndarray) -> np.ndarray | None:
    """Which turns a machine was fast in: `rates[kind, turn]` to `fast[turn]`, or None where it had but one speed.

    What slows one kind of access slows its kin in the same turn: their mean tells apart what the noise of each hides.
    """
    scores = np.log(rates / np.median(rates, axis=1, keepdims=True)).mean(axis=0)
    at = split(scores, JOINT_GAP)
    return None if at is None else scores >= at


def split(values: np.ndarray, least_gap: float) -> float | None:
    """Where the best split into two lies, if it leaves a gap wider than both parts and `least_gap`.

    A part is its samples from the 10th to the 90th percentile: strays between two do not join them, and a tail of slow
    samples is wider than the gap above it.
    """
    values = np.sort(values)
    n, fewest = len(values), max(2, math.ceil(MODE_SHARE * len(values)))
    if n < 2 * fewest:
        return None
    at = np.arange(fewest, n - fewest + 1)
    between = np.cumsum(values - values.mean())[at - 1] ** 2 / (at * (n - at))  # variance that a split explains
    best = at[np.argmax(between)]
    (low_from, low_to), (high_from, high_to) = (np.percentile(part, (10, 90)) for part in np.split(values, [best]))
    if high_from - low_to > max(low_to - low_from, high_to - high_from, least_gap):
        return float(values[best])
    return None
