"""Two profiles or two run records, number by number: a ratio above 1 is always the better B."""

from dataclasses import dataclass
from itertools import product
from math import inf, log
from pathlib import Path
from statistics import median
from typing import Any

from specmoeoff.errors import BadInput
from specmoeoff.files import load_json, read_text
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord

RATES = ("GB/s", "GFLOP/s", "GOP/s", "tokens/s", "x")
Numbers = dict[str, tuple[float, str]]
Modes = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Row:
    """One number both files have. ratio: b / a of a rate, a / b of what is better small (seconds, bytes)."""

    name: str
    unit: str
    a: float
    b: float

    @property
    def is_rate(self) -> bool:
        return self.unit in RATES

    @property
    def ratio(self) -> float:
        better, worse = (self.b, self.a) if self.is_rate else (self.a, self.b)
        if better == worse:
            return 1.0
        return better / worse if worse else inf


def compare(a: Path, b: Path) -> list[Row]:
    """Every number the two files share, the worst ratio first. Raises BadInput where they cannot be compared."""
    first, second = _load(a), _load(b)
    if type(first) is not type(second):
        raise BadInput(f"{a} is a {first.what} and {b} a {second.what}; give two of a kind.")
    ours, theirs = _numbers(first), _numbers(second)
    if isinstance(first, HardwareProfile) and isinstance(second, HardwareProfile):
        _same_modes(ours, theirs, _speeds(first), _speeds(second))
    rows = [
        Row(name, unit, value, theirs[name][0])
        for name, (value, unit) in ours.items()
        if name in theirs and theirs[name][1] == unit
    ]
    if not rows:
        raise BadInput(f"{a} and {b} have no number in common.")
    return sorted(rows, key=lambda row: row.ratio)


def _same_modes(ours: Numbers, theirs: Numbers, our_speeds: Modes, their_speeds: Modes) -> None:
    """A machine that flips between two speeds is compared speed by speed: in place of each value, the two that are nearest."""
    for name in our_speeds.keys() & their_speeds.keys() & ours.keys() & theirs.keys():
        if len(our_speeds[name]) + len(their_speeds[name]) == 2:
            continue
        a, b = min(product(our_speeds[name], their_speeds[name]), key=lambda pair: abs(log(pair[0] / pair[1])))
        ours[name], theirs[name] = (a, ours[name][1]), (b, theirs[name][1])


def _speeds(profile: HardwareProfile) -> Modes:
    """The modes of every bandwidth: where it has but one, what a mode is of all samples, memory's upper quartile and the
    disk's median."""
    one = {
        f"{roof.name}, {roof.n_threads} threads": (roof.rate.percentile(75) if roof.rate.samples else roof.rate.value,)
        for roof in profile.memory
        if roof.device == "cpu"
    }
    if profile.disk:
        rate = profile.disk.read_gb_per_s
        one["disk"] = (rate.percentile(50) if rate.samples else rate.value,)
    return one | dict(profile.quality.modes)


def _load(path: Path) -> HardwareProfile | RunRecord:
    text = read_text(path, "profile or run record")
    try:
        data: Any = load_json(text)
    except ValueError as error:
        raise BadInput(f"{path}: not a profile or run record: {error}.") from None
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind in ("run", "validate"):
        return RunRecord.parse(text, path)
    if kind in ("measured", "datasheet") and "peaks" in data:
        return HardwareProfile.parse(text, path)
    raise BadInput(f"{path}: neither a hardware profile nor a run record; `profile`, `run` and `validate` write them.")


def _numbers(spec: HardwareProfile | RunRecord) -> Numbers:
    return _of_profile(spec) if isinstance(spec, HardwareProfile) else _of_record(spec)


def _of_profile(profile: HardwareProfile) -> Numbers:
    found: Numbers = {}
    for roof in (*profile.peaks, *profile.memory):
        where = f"{roof.n_threads} threads" if roof.device == "cpu" else "GPU"
        found[f"{roof.name}, {where}"] = (roof.rate.value, roof.rate.unit)
    for level, latency in profile.latency_s.items():
        found[f"{level} latency"] = (latency.value, latency.unit)
    if profile.disk:
        found["disk"] = (profile.disk.read_gb_per_s.value, "GB/s")
        found["disk latency"] = (profile.disk.latency_s.value, "s")
    for link in profile.links:
        name = f"{link.direction}, {link.host_memory}, beside {link.beside.replace('_', ' ')}"
        found[name] = (link.gb_per_s, "GB/s")
        if link.latency_s is not None:
            found[f"{name}: latency"] = (link.latency_s, "s")
        if link.pcie_gb_per_s:
            found["PCIe lanes"] = (link.pcie_gb_per_s, "GB/s")
    found["process before any model"] = (profile.process_bytes, "bytes")
    for table in profile.operators:
        for at, seconds in zip(product(*table.grid), table.seconds, strict=True):
            sizes = ", ".join(f"{axis} {value:g}" for axis, value in zip(table.axes, at, strict=True))
            found[f"{table.operator} of {table.shape}, {table.n_threads} threads, {sizes}"] = (seconds, "s")
        for slowed in table.beside:
            sizes = f"{table.axes[0]} {slowed.size:g}, beside {slowed.lane}"
            found[f"{table.operator} of {table.shape}, {table.n_threads} threads, {sizes}"] = (
                slowed.ratio.value,
                "times slower",
            )
    return found


def _of_record(record: RunRecord) -> Numbers:
    found: Numbers = {"all": (record.n_tokens / record.duration_s, "tokens/s")} if record.duration_s else {}
    for label in dict.fromkeys(w.label for w in record.windows):
        windows = [w for w in record.windows if w.label == label and w.duration_s]
        if windows:
            found[f"windows, {label}"] = (median(w.tokens / w.duration_s for w in windows), "tokens/s")
            found[f"window, {label}"] = (median(w.duration_s for w in windows), "s")
    for point in record.sweep:
        found[f"draft length {point.draft_length}"] = (point.tokens_per_s, "tokens/s")
    for s in record.speed_ups:
        found[f"plain, {s.label}"] = (median(p.plain_tokens_per_s for p in s.pairs), "tokens/s")
        found[f"tuned, {s.label}"] = (median(p.tuned_tokens_per_s for p in s.pairs), "tokens/s")
        found[f"speed-up, {s.label}"] = (s.median, "x")
    for c in record.comparisons:
        found[f"measured, {c.name}"] = (c.measured, c.unit)
    found["peak RSS"] = (record.rss_peak_bytes, "bytes")
    found["read from disk"] = (record.disk_bytes_read, "bytes")
    return found
