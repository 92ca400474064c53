"""The hierarchical roofline: what a level's bandwidth and a peak allow at an intensity."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Literal

from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile, Measurement, Roof

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Ceiling:
    """One roof of the figure: GB/s of a memory level or link, GFLOP/s (GOP/s for integers) of a peak.

    A `gemm` is what a library reaches of a peak; a `cap` was set by a person. `device`: where what is brought is computed.
    """

    name: str
    kind: Literal["peak", "gemm", "memory", "link", "cap"]
    rate: float
    unit: str
    device: Device = "cpu"
    provenance: str = "measured here"

    @property
    def is_peak(self) -> bool:
        return self.kind in ("peak", "gemm")


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


def ceilings(profile: HardwareProfile, disk_limit_gb_per_s: float | None = None) -> tuple[Ceiling, ...]:
    """Every roof of the machine at the most CPU threads measured, peaks first, and the cap put on its disk.

    A roof is what a level was seen to do at its best (95th percentile); planners read the median instead.
    """
    peaks, memory = _at_most_threads(profile.peaks), _at_most_threads(profile.memory)
    found = [
        Ceiling(
            _spoken(r.device, r.name.replace("_", " ")),
            "gemm" if r.name.endswith("_gemm") else "peak",
            _best(r.rate),
            r.rate.unit,
            r.device,
            _provenance(r.rate.provenance),
        )
        for r in peaks
    ]
    # A level is named by its reads where they were measured: that is what weights and keys do to it.
    levels: dict[tuple[Device, str], Roof] = {}
    for r in sorted(memory, key=lambda r: (r.name.endswith("_read"), _best(r.rate))):
        level = r.name.split("_")[0]
        levels[r.device, level if level == "memory" else level.upper()] = r
    found += [
        Ceiling(_spoken(device, level), "memory", _best(r.rate), "GB/s", device, _provenance(r.rate.provenance))
        for (device, level), r in sorted(levels.items(), key=lambda item: -_best(item[1].rate))
    ]
    feeds: Device = "gpu" if any(r.device == "gpu" for r in peaks) else "cpu"
    for link in profile.links:
        if (link.direction, link.host_memory, link.beside) == ("h2d", "pinned", "nothing"):
            found.append(Ceiling("PCIe", "link", link.gb_per_s, "GB/s", feeds, _provenance(link.provenance)))
    if profile.disk:
        rate = profile.disk.read_gb_per_s
        found.append(Ceiling("disk", "link", _best(rate), "GB/s", feeds, _provenance(rate.provenance)))
    if profile.disk and disk_limit_gb_per_s:
        found.append(Ceiling("disk cap", "cap", disk_limit_gb_per_s, "GB/s", feeds, "given"))
    return tuple(c for c in found if c.rate > 0)


def summit(roofs: Iterable[Ceiling], device: Device) -> Ceiling | None:
    """The peak a slope of `device` ends at: bf16, the type of weights, where its instruction was measured; else the highest.

    A library's rate counts only then: a GPU's bf16 is known by nothing else.
    """
    peaks = [c for c in roofs if c.is_peak and c.unit == "GFLOP/s"]
    own = [c for c in peaks if c.device == device] or peaks
    bf16 = [c for c in own if c.kind == "peak" and "bf16" in c.name]
    return max(bf16 or own, key=lambda c: c.rate, default=None)


def frame(roofs: Iterable[Ceiling]) -> tuple[float, float, float, float]:
    """Whole decades of intensity (FLOP/byte) and rate (GFLOP/s): x low, x high, y low, y high.

    The machine's roofs alone decide, so that two of its runs can be laid side by side.
    """
    roofs = [c for c in roofs if c.kind != "cap"]
    slopes = [c.rate for c in roofs if not c.is_peak]
    highest = max((c.rate for c in roofs if c.is_peak), default=10.0 * max(slopes, default=1.0))
    ridges = [ridge(c.rate, top.rate) for c in roofs if not c.is_peak and (top := summit(roofs, c.device))] or [1.0]
    x_low, x_high = min(1.0, min(ridges)) / 3, 10 * max(ridges)
    y_low, y_high = min(slopes, default=highest / 1e3) / 3, 2 * highest
    return _decade(floor, x_low), _decade(ceil, x_high), _decade(floor, y_low), _decade(ceil, y_high)


def _decade(rounded: Callable[[float], int], value: float) -> float:
    return 10.0 ** rounded(log10(value))


def _at_most_threads(roofs: Sequence[Roof]) -> list[Roof]:
    most = max((r.n_threads for r in roofs if r.device == "cpu"), default=0)
    return [r for r in roofs if r.device == "gpu" or r.n_threads == most]


def _best(rate: Measurement) -> float:
    return rate.value if rate.statistic == "max" else rate.percentile(95)


def _spoken(device: Device, name: str) -> str:
    """The GPU's name for it says so."""
    return name if device == "cpu" or name.lower().startswith("gpu") else f"GPU {name}"


def _provenance(word: str) -> str:
    return "measured here" if word == "measured" else word
