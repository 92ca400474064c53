"""A finished plan: everything the runtime needs, and what the tuner predicted of it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from specmoeoff.specs.base import FileSpec, Spec

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
DrafterName = Literal["none", "ngram", "model"]


class PlanModel(Spec):
    """`source` is what the person named: `demo` or a folder."""

    source: str
    name: str
    fingerprint: str


class PlanDecode(Spec):
    """k drafted, k+1 verified, 1..k+1 emitted. k = 0 is plain decoding."""

    drafter: DrafterName
    draft_length: NotNegative
    batch: Positive
    micro_batches: Positive
    context_tokens: Positive
    prefill_chunk_tokens: Positive


class PlanExperts(Spec):
    """resident[layer], prefetch[layer]: expert numbers; the rest is read when the router asks. prefetch is in reading order."""

    resident: tuple[tuple[int, ...], ...]
    prefetch: tuple[tuple[int, ...], ...]
    stream_slots: NotNegative

    @property
    def n_resident(self) -> int:
        return sum(len(layer) for layer in self.resident)


class PlanThreads(Spec):
    compute: Positive
    disk_readers: Positive
    disk_chunk_bytes: Positive


class PlanLimits(Spec):
    fast_memory_bytes: int
    host_memory_bytes: int
    disk_limit_gb_per_s: Annotated[float, Field(gt=0)] | None = None


class PlanMemory(Spec):
    """Bytes by tier and purpose; the process's peak RSS is predicted as the sum of both."""

    fast: dict[str, NotNegative]
    host: dict[str, NotNegative]
    disk: dict[str, NotNegative]

    @property
    def rss_bytes(self) -> int:
        return sum(self.fast.values()) + sum(self.host.values())


class Prediction(Spec):
    """Of the steady state at the workload's middle context. busy_s by lane, phases_s by node kind."""

    window_s: float
    tokens_per_round: float
    tokens_per_s: float
    busy_s: dict[str, float]
    phases_s: dict[str, float]
    disk_bytes: float
    bound: str
    context_tokens: int


class CurvePoint(Spec):
    """The best plan of one draft length, for the report's curves."""

    draft_length: int
    drafter: DrafterName
    prediction: Prediction


class PlanInputs(Spec):
    """Hashes of what the plan was made from, and how."""

    profile_name: str
    machine_fingerprint: str
    workload_name: str
    profile_sha256: str
    workload_sha256: str
    search: str
    seed: int
    n_evaluated: int
    tool_version: str
    command: str


class Plan(FileSpec):
    """As `specmoeoff tune` writes it. `plain` is the best plan with k = 0 under the same limits: the baseline."""

    what: ClassVar[str] = "plan"
    model: PlanModel
    draft: PlanModel | None = None
    decode: PlanDecode
    experts: PlanExperts
    threads: PlanThreads
    limits: PlanLimits
    memory: PlanMemory
    predicted: Prediction
    inputs: PlanInputs
    plain: "PlainPlan"
    curve: tuple[CurvePoint, ...] = ()


class PlainPlan(Spec):
    """Plain decoding, itself tuned, under the plan's limits."""

    decode: PlanDecode
    experts: PlanExperts
    threads: PlanThreads
    memory: PlanMemory
    predicted: Prediction


Plan.model_rebuild()
