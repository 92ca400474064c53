"""What really happened: windows as they ran, and what `validate` concluded from them."""

from typing import ClassVar, Literal

from specmoeoff.specs.base import FileSpec, Spec


class Window(Spec):
    """One window of decoding as it ran. `rows`: tokens through the target. phases_s by node kind: on the compute lane, or
    of all lanes of a machine with a GPU; `wait` is the rest of the busiest lane's window."""

    label: str
    start_s: float
    duration_s: float
    draft_length: int
    live: int
    prefill_rows: int
    rows: int
    tokens: int
    mean_context: float
    disk_bytes: int
    busy_s: dict[str, float]
    phases_s: dict[str, float]
    experts_used: float
    predicted_s: float | None = None


class Comparison(Spec):
    """One quantity, predicted and measured, with where the prediction comes from."""

    name: str
    predicted: float
    measured: float
    unit: str
    provenance: str
    limit: float | None = None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1.0 if self.measured else float("inf")


class Pair(Spec):
    """Plain and tuned blocks run one after the other."""

    plain_tokens_per_s: float
    tuned_tokens_per_s: float
    plain_disk_gb_per_s: float
    tuned_disk_gb_per_s: float


class SpeedUp(Spec):
    """Median of paired ratios with its interval (95 % unless `confidence` says more), and the limit of the same run's bytes and FLOPs."""

    label: str
    disk_limit_gb_per_s: float | None
    pairs: tuple[Pair, ...]
    median: float
    low: float
    high: float
    confidence: float
    limit: float
    limit_reason: str


class Check(Spec):
    """One question of `validate` with its answer; `cause` is a sentence when the answer is no."""

    name: str
    passed: bool
    detail: str
    cause: str = ""


class Slice(Spec):
    """The machine's speed of a moment: disk uncapped; operator times over the profile's, of the target for few rows (memory)
    and many (arithmetic), and of a draft model."""

    disk_gb_per_s: float
    memory_scale: float
    compute_scale: float
    draft_scale: float | None = None


class SweepPoint(Spec):
    """Measured throughput at one draft length."""

    draft_length: int
    tokens_per_s: float
    window_s: float
    tokens_per_round: float
    phases_s: dict[str, float]


class TimelineEvent(Spec):
    """One node of one window, for the report's timeline."""

    name: str
    kind: str
    lane: str
    layer: int
    start_s: float
    end_s: float


class NodeTime(Spec):
    """Mean seconds of a kind of node on a machine with a GPU, as the stored profile prices it and as measured."""

    kind: str
    draft_length: int
    predicted_s: float
    measured_s: float


class RunRecord(FileSpec):
    """As `run --record` and `validate -o` write it."""

    what: ClassVar[str] = "run record"
    kind: Literal["run", "validate"]
    created: str
    tool_version: str
    plan_sha256: str
    model_name: str
    machine_fingerprint: str
    n_requests: int
    n_tokens: int
    duration_s: float
    disk_bytes_planned: int
    disk_bytes_read: int
    rss_planned_bytes: int
    rss_peak_bytes: int
    lossless: bool | None = None
    windows: tuple[Window, ...]
    checks: tuple[Check, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    speed_ups: tuple[SpeedUp, ...] = ()
    recalibration: tuple[Slice, ...] = ()
    sweep: tuple[SweepPoint, ...] = ()
    nodes: tuple[NodeTime, ...] = ()
    timeline_measured: tuple[TimelineEvent, ...] = ()
    timeline_predicted: tuple[TimelineEvent, ...] = ()
