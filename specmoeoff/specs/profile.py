"""What was measured of a machine. Rates in GB/s (1e9) and GFLOP/s; every number keeps its samples."""

from math import prod
from statistics import fmean, pstdev
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from specmoeoff.specs.base import FileSpec, Spec

Provenance = Literal["measured", "fitted", "datasheet", "published"]
# By generation: 2.5 and 5 GT/s in 8b/10b, then 8, 16 and 32 GT/s in 128b/130b.
PCIE_LANE_GB_PER_S = {1: 0.25, 2: 0.5} | {generation: 2**generation / 8.125 for generation in (3, 4, 5)}


class Measurement(Spec):
    """Samples of one quantity; `value` is the statistic planners use (named in `statistic`)."""

    value: Annotated[float, Field(ge=0)]
    unit: str
    statistic: str
    samples: Annotated[tuple[float, ...], Field(min_length=1)]
    provenance: Provenance = "measured"
    note: str = ""

    def percentile(self, q: float) -> float:
        """Of the samples, q in 0..100, linear between neighbours."""
        ordered = sorted(self.samples)
        at = q / 100 * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def variation(self) -> float:
        """Standard deviation of the samples over their mean."""
        mean = fmean(self.samples)
        return pstdev(self.samples) / mean if mean else 0.0


class Roof(Spec):
    """One ceiling: a memory level's bandwidth (GB/s) or an arithmetic peak (GFLOP/s, GOP/s for integers).

    n_threads is 0 for a GPU. working_set_bytes: what all threads together went over.
    """

    name: str
    n_threads: int
    rate: Measurement
    device: Literal["cpu", "gpu"] = "cpu"
    working_set_bytes: int | None = None


def _positive(rate: Measurement) -> Measurement:
    if rate.value <= 0:
        raise ValueError("a rate must be above 0")
    return rate


class DiskLink(Spec):
    """Reads with O_DIRECT: seconds = latency_s + bytes / bandwidth, at the stated depth of parallel reads."""

    read_gb_per_s: Annotated[Measurement, AfterValidator(_positive)]
    latency_s: Measurement
    chunk_bytes: int
    n_readers: int
    modes_gb_per_s: tuple[float, ...]
    limit_gb_per_s: float | None = None
    fit_error: float
    sweep: tuple["DiskPoint", ...] = ()


class DiskPoint(Spec):
    """Read rate at one request size and number of readers."""

    chunk_bytes: int
    n_readers: int
    gb_per_s: Measurement


class LinkCurve(Spec):
    """Copies between host and GPU memory: seconds = latency_s + bytes / bandwidth, fitted to `device_s` of pinned and to
    `end_to_end_s` of pageable memory; where the fit misses by more than a tenth, `points` are to be interpolated.

    Intervals are of 95 %. pcie_*: the link as it was during copies, for an idle one saves power at a lower generation.
    """

    direction: Literal["h2d", "d2h"]
    host_memory: Literal["pinned", "pageable"]
    beside: Literal["nothing", "other_direction", "dram_read"]
    points: tuple["LinkPoint", ...] = ()
    latency_s: float | None
    latency_interval_s: tuple[float, float] | None = None
    gb_per_s: float
    interval_gb_per_s: tuple[float, float] | None = None
    fit_error: float | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    provenance: Provenance = "measured"

    @property
    def n_half_bytes(self) -> float | None:
        """The size that moves at half the rate."""
        return None if self.latency_s is None else self.latency_s * self.gb_per_s * 1e9

    @property
    def pcie_gb_per_s(self) -> float | None:
        """What the lanes carry one way, packet headers included."""
        lane = PCIE_LANE_GB_PER_S.get(self.pcie_generation or 0)
        return lane * self.pcie_width if lane and self.pcie_width else None


class LinkPoint(Spec):
    """Seconds of one copy of n_bytes. `device_s`: of many in a row, by the GPU's clock; `api_s`: the host's, from the call
    until it returns; `end_to_end_s`: the host's, from the call until the copy is done."""

    n_bytes: int
    device_s: Measurement
    api_s: Measurement
    end_to_end_s: Measurement


class Quality(Spec):
    """What disturbed the measurement. `waited_share`: of the time of sampling, how long a thread waited for its CPU.
    `modes`: the speeds of roofs that flip between two. `notes`: one sentence each."""

    contended: bool = False
    pressure_percent: float | None = None
    steal_percent: float | None = None
    waited_share: float = 0.0
    clock_ghz: tuple[float, ...] = ()
    modes: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Slowdown(Spec):
    """How many times longer an operator of this size takes while another lane is busy at full speed."""

    lane: Literal["disk", "h2d"]
    size: float
    ratio: Measurement


class OperatorTable(Spec):
    """Seconds of one operator over a grid of sizes, measured at a model's shape. Arrays are row-major over `grid`.

    beside: by lane and size on the first axis, smallest first.
    """

    operator: str
    shape: str
    n_threads: int
    isa: str
    axes: tuple[str, ...]
    grid: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]
    p10_s: tuple[float, ...]
    p95_s: tuple[float, ...]
    flops: tuple[float, ...]
    bytes: tuple[float, ...]
    n_samples: int
    loo_error: float | None = None
    beside: tuple[Slowdown, ...] = ()
    provenance: Provenance = "measured"

    @model_validator(mode="after")
    def _one_value_a_point(self) -> Self:
        n = prod(map(len, self.grid))
        if len(self.axes) != len(self.grid) or any(len(v) != n for v in (self.seconds, self.flops, self.bytes)):
            raise ValueError(f"operator {self.operator}: {n} values over {len(self.axes)} axes are expected")
        return self


class Machine(Spec):
    """Who was measured. `fingerprint` is a hash of the fields that change performance."""

    cpu: str
    n_cores: int
    isa: str
    isas: tuple[str, ...]
    l3_bytes: int
    ram_bytes: int
    gpu: str | None
    system: str
    fingerprint: str


class HardwareProfile(FileSpec):
    """The whole of a machine, as `specmoeoff profile` writes it."""

    what: ClassVar[str] = "hardware profile"
    kind: Literal["measured", "datasheet"] = "measured"
    name: str
    machine: Machine
    created: str
    tool_version: str
    duration_s: float
    peaks: tuple[Roof, ...]
    memory: tuple[Roof, ...]
    latency_s: dict[str, Measurement] = Field(default_factory=dict)
    disk: DiskLink | None
    links: tuple[LinkCurve, ...] = ()
    operators: tuple[OperatorTable, ...]
    process_bytes: int
    waived: dict[str, str] = Field(default_factory=dict)
    quality: Quality = Quality()
    libraries: dict[str, str] = Field(default_factory=dict)

    def peak(self, name: str, n_threads: int) -> float | None:
        """GFLOP/s of an arithmetic peak, None where it was not measured."""
        return next((r.rate.value for r in self.peaks if (r.name, r.n_threads) == (name, n_threads)), None)

    def bandwidth(self, name: str, n_threads: int) -> float | None:
        """GB/s of a memory roof, None where it was not measured."""
        return next((r.rate.value for r in self.memory if (r.name, r.n_threads) == (name, n_threads)), None)
