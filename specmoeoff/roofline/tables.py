"""A profile as pandas tables: every raw sample, and every number with its statistics."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from specmoeoff.files import explain_os_errors, write_atomic
from specmoeoff.roofline.timing import modes
from specmoeoff.specs.profile import HardwareProfile, LinkCurve, Measurement, OperatorTable

if TYPE_CHECKING:
    import pandas as pd


class Measured(NamedTuple):
    """A measurement and of what; n_threads is None where there is none to tell."""

    what: str
    device: str
    n_threads: int | None
    rate: Measurement


def measured(profile: HardwareProfile) -> Iterator[Measured]:
    """Everything in a profile that has samples."""
    for roof in (*profile.peaks, *profile.memory):
        yield Measured(roof.name, roof.device, roof.n_threads, roof.rate)
    for level, latency in profile.latency_s.items():
        yield Measured(f"{level}_latency", "cpu", 1, latency)
    if disk := profile.disk:
        yield Measured("disk_read", "disk", disk.n_readers, disk.read_gb_per_s)
        yield Measured("disk_latency", "disk", 1, disk.latency_s)
        for point in disk.sweep:
            yield Measured(f"disk_read_{point.chunk_bytes}_bytes", "disk", point.n_readers, point.gb_per_s)
    for curve in profile.links:
        for copy in curve.points:
            name = f"{_name(curve)}, {copy.n_bytes} bytes"
            yield Measured(f"{name} in a row", "link", None, copy.device_s)
            yield Measured(f"{name} until the call returns", "link", None, copy.api_s)
            yield Measured(f"{name} waited for", "link", None, copy.end_to_end_s)
    for table in profile.operators:
        for at in table.beside:
            name = f"{table.operator}_of_{at.size:g}_beside_{at.lane}_{table.shape}"
            yield Measured(name, "cpu", table.n_threads, at.ratio)


def samples_table(profile: HardwareProfile) -> "pd.DataFrame":
    """One row a raw sample: what, device, n_threads, unit, index (in the order taken), value."""
    import pandas as pd

    rows = [
        (m.what, m.device, m.n_threads, m.rate.unit, index, value)
        for m in measured(profile)
        for index, value in enumerate(m.rate.samples)
    ]
    return _typed(pd.DataFrame(rows, columns=["what", "device", "n_threads", "unit", "index", "value"]))


def results_table(profile: HardwareProfile) -> "pd.DataFrame":
    """One row a number: what, device, n_threads, value, unit, statistic, max, p95, median, p10, variation, n, provenance,
    modes ("32; 56" for two), and of fits low and high, their 95 % interval. What a number does not have is empty:
    operators keep no samples."""
    import pandas as pd

    rows = [_statistics(m) for m in measured(profile)]
    rows += [row for table in profile.operators for row in _operator(table)]
    rows += [row for curve in profile.links for row in _link(curve)]
    columns = ["what", "device", "n_threads", "value", "unit", "statistic", "max", "p95", "median", "p10", "variation"]
    return _typed(pd.DataFrame(rows, columns=[*columns, "n", "provenance", "modes", "low", "high"]))


def write_csv(profile: HardwareProfile, folder: Path | str) -> list[Path]:
    """Write samples.csv and results.csv into a folder, each whole or not at all; BadInput if that fails."""
    with explain_os_errors(Path(folder)):
        Path(folder).mkdir(exist_ok=True)
    tables = {"samples.csv": samples_table(profile), "results.csv": results_table(profile)}
    for name, table in tables.items():
        write_atomic(Path(folder) / name, table.to_csv(index=False))
    return [Path(folder) / name for name in tables]


def _typed(table: "pd.DataFrame") -> "pd.DataFrame":
    whole = [name for name in ("n_threads", "n") if name in table]
    return table.astype(dict.fromkeys(whole, "Int64"))


def _statistics(m: Measured) -> dict[str, Any]:
    rate = m.rate
    return {
        "what": m.what,
        "device": m.device,
        "n_threads": m.n_threads,
        "value": rate.value,
        "unit": rate.unit,
        "statistic": rate.statistic,
        "max": max(rate.samples),
        "p95": rate.percentile(95),
        "median": rate.percentile(50),
        "p10": rate.percentile(10),
        "variation": rate.variation,
        "n": len(rate.samples),
        "provenance": rate.provenance,
        "modes": "; ".join(f"{speed:.6g}" for speed in modes(rate.samples)),
    }


def _operator(table: OperatorTable) -> Iterator[dict[str, Any]]:
    points = zip(product(*table.grid), table.seconds, table.p95_s, table.p10_s, strict=True)
    for sizes, median, p95, p10 in points:
        at = ", ".join(f"{axis}={size:g}" for axis, size in zip(table.axes, sizes, strict=True))
        numbers = {"value": median, "median": median, "p95": p95, "p10": p10, "n": table.n_samples}
        yield _row(f"{table.operator} of {table.shape}, {at}", "cpu", table, n_threads=table.n_threads, **numbers)


def _link(curve: LinkCurve) -> Iterator[dict[str, Any]]:
    for what, value, unit, interval in (
        ("fit", curve.gb_per_s, "GB/s", curve.interval_gb_per_s),
        ("fitted latency", curve.latency_s, "s", curve.latency_interval_s),
        ("half-rate size", curve.n_half_bytes, "bytes", None),
    ):
        if value is not None:
            ends = dict(zip(("low", "high"), interval or (), strict=False))
            yield _row(f"{_name(curve)}, {what}", "link", curve, value=value, unit=unit, statistic="fit", **ends)
    if lanes := curve.pcie_gb_per_s:
        yield _row(f"{_name(curve)}, PCIe lanes", "link", curve, value=lanes, unit="GB/s", statistic="max")


def _name(curve: LinkCurve) -> str:
    return f"{curve.direction} {curve.host_memory} beside {curve.beside}"


def _row(what: str, device: str, of: OperatorTable | LinkCurve, **more: Any) -> dict[str, Any]:
    common = {"what": what, "device": device, "unit": "s", "statistic": "median", "provenance": of.provenance}
    return common | more
