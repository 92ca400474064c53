"""The hierarchical roofline: what a level's bandwidth and a peak allow at an intensity."""

import numpy as np

from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile


def attainable(intensity: float, gb_per_s: float, peak_gflop_per_s: float) -> float:
    """GFLOP/s at `intensity` FLOP per byte (Williams et al. 2009)."""
    return min(peak_gflop_per_s, intensity * gb_per_s)


def ridge(gb_per_s: float, peak_gflop_per_s: float) -> float:
    """FLOP per byte from which on compute is the limit."""
    return peak_gflop_per_s / gb_per_s


def expert_flops(spec: ModelSpec) -> float:
    """Of one expert for one token."""
    return 2.0 * spec.expert_params


def attention_flops(spec: ModelSpec, rows: float, context: float) -> float:
    """Of one layer's attention for `rows` tokens over `context` keys."""
    return 4.0 * rows * context * spec.n_heads * spec.head_dim


def roofs(profile: HardwareProfile) -> tuple[dict[str, float], dict[str, float]]:
    """Peaks in GFLOP/s and bandwidths in GB/s at the most threads measured; the disk link among them.

    A roof is what a level was seen to do at its best (95th percentile); planners read the median instead.
    """
    most = max((r.n_threads for r in profile.peaks), default=1)
    peaks = {r.name: r.rate.value for r in profile.peaks if r.n_threads == most}
    memory = {r.name: r.rate for r in profile.memory if r.n_threads == most and r.name.endswith("_read")}
    if profile.disk:
        memory["disk"] = profile.disk.read_gb_per_s
    return peaks, {
        name: rate.value if rate.statistic == "max" else float(np.percentile(rate.samples, 95))
        for name, rate in memory.items()
    }
