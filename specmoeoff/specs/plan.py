"""A finished plan: everything the runtime needs, and what the tuner predicted of it."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from specmoeoff.precision import ExpertFormat, Precision
from specmoeoff.specs.base import FileSpec, Spec
from specmoeoff.specs.model import ModelSpec

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[int, Field(ge=0)]
DrafterName = Literal["none", "ngram", "model", "eagle"]


class PlanModel(Spec):
    """`source` is what the person named: `demo`, a folder or a file. A draft has the target's precision."""

    source: str
    name: str
    fingerprint: str
    precision: Precision = "bf16"
    expert_format: ExpertFormat = "bf16"


class PlanDecode(Spec):
    """k drafted, k+1 verified, 1..k+1 emitted. k = 0 is plain decoding.

    kv_tokens: tokens the KV cache holds, of all requests together; None: `batch` whole contexts. With fewer the youngest
    request is set aside when it is full, and computed anew later.
    """

    drafter: DrafterName
    draft_length: NotNegative
    batch: Positive
    micro_batches: Positive
    context_tokens: Positive
    prefill_chunk_tokens: Positive
    kv_tokens: Positive | None = None


class PlanExperts(Spec):
    """resident[layer], prefetch[layer]: expert numbers; the rest is read when the router asks. prefetch is in reading order.
    on_host[layer]: computed by the CPU where they lie, never read."""

    resident: tuple[tuple[int, ...], ...]
    prefetch: tuple[tuple[int, ...], ...]
    stream_slots: NotNegative
    on_host: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def all_resident(cls, spec: ModelSpec) -> Self:
        """Nothing is ever read."""
        resident = tuple(tuple(range(spec.n_experts_of(layer))) for layer in range(spec.n_layers))
        return cls(resident=resident, prefetch=((),) * spec.n_layers, stream_slots=0)

    @property
    def n_resident(self) -> int:
        return sum(len(layer) for layer in self.resident)


class PlanGpu(Spec):
    """What only a machine with a GPU has to choose: shares of the live requests whose KV cache, and whose draft KV cache, lie in GPU
    memory, where their attention is computed too; the others' is computed by the CPU."""

    kv_share: Share
    draft_kv_share: Share


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
    h2d_bytes: float = 0.0
    bound: str
    context_tokens: int


class CurvePoint(Spec):
    """The best plan of one draft length, for the report's curves."""

    draft_length: int
    drafter: DrafterName
    prediction: Prediction


class LengthAt(Spec):
    """The best draft length at a context and a number of live requests, all else as planned."""

    context_tokens: int
    live: int
    draft_length: int
    tokens_per_s: float


class ParetoPoint(Spec):
    """No other choice has both more tokens a second and less time between a request's tokens."""

    tokens_per_s: float
    s_per_token: float
    batch: int
    draft_length: int


class Outlook(Spec):
    """Around the chosen point. flat_axes: what was not searched, and why. assumptions: numbers nobody measured here."""

    draft_lengths: tuple[LengthAt, ...] = ()
    pareto: tuple[ParetoPoint, ...] = ()
    flat_axes: dict[str, str] = Field(default_factory=dict)
    assumptions: tuple[str, ...] = ()


class MeasuredTrial(Spec):
    """A choice that was run while tuning; without rates where it failed, or was not run to the end, for the reason given."""

    drafter: DrafterName
    draft_length: int
    batch: int
    predicted_tokens_per_s: float
    tokens_per_s: tuple[float, ...]
    failure: str = ""


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
    gpu: PlanGpu | None = None
    outlook: Outlook | None = None
    measured: tuple[MeasuredTrial, ...] = ()

    @property
    def tuned(self) -> "PlainPlan":
        """The tuned settings in the shape of the plain ones."""
        names = ("decode", "experts", "threads", "memory", "predicted", "gpu")
        return PlainPlan(**{name: getattr(self, name) for name in names})


class PlainPlan(Spec):
    """Plain decoding, itself tuned, under the plan's limits."""

    decode: PlanDecode
    experts: PlanExperts
    threads: PlanThreads
    memory: PlanMemory
    predicted: Prediction
    gpu: PlanGpu | None = None


Plan.model_rebuild()
