"""From profile, model and workload to a plan."""

from collections.abc import Callable
from dataclasses import dataclass, field

from specmoeoff import __version__
from specmoeoff.errors import AnswerIsNo, BadInput
from specmoeoff.estimate.costs import Prices
from specmoeoff.estimate.memory import expert_stride, in_mib, plan_memory
from specmoeoff.estimate.predict import forecast
from specmoeoff.files import sha256_text
from specmoeoff.pipeline import DEMAND_RESERVE_SLOTS
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import (
    CurvePoint,
    PlainPlan,
    Plan,
    PlanDecode,
    PlanInputs,
    PlanLimits,
    PlanMemory,
    PlanModel,
    PlanThreads,
)
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.search import SearchName, exhaustive, optuna_search
from specmoeoff.tuner.space import Choice, Space, make_space, place

FAST_SHARE = 0.25
PAGE = 64


@dataclass(frozen=True)
class TuneRequest:
    """What is asked for. None means: chosen here."""

    profile: HardwareProfile
    model: ModelSpec
    workload: Workload
    model_source: str
    host_memory_bytes: int
    draft: ModelSpec | None = None
    draft_source: str | None = None
    fast_memory_bytes: int | None = None
    batch: int = 16
    context_tokens: int | None = None
    prefill_chunk_tokens: int = 256
    disk_limit_gb_per_s: float | None = None
    search: SearchName = "exhaustive"
    trials: int = 200
    seed: int = 0
    storage: str | None = None
    command: str = ""
    measure_top: int = 0
    measure: Callable[[Plan], float] | None = field(default=None, compare=False)
    progress: Callable[[float], None] = field(default=lambda share: None, compare=False)


class Tuner:
    """Evaluates choices and turns them into plans."""

    def __init__(self, request: TuneRequest) -> None:
        self.request = request
        r, spec = request, request.model
        if r.workload.model_fingerprint != spec.fingerprint:
            raise BadInput(
                f"workload {r.workload.name} was measured on model {r.workload.model_name}, not on {spec.name}; "
                f"run `specmoeoff workload --model {r.model_source}`."
            )
        self._stride = expert_stride(spec)
        quarter = int(spec.n_all_experts * FAST_SHARE) * self._stride
        self.fast_bytes = quarter if r.fast_memory_bytes is None else r.fast_memory_bytes
        self.n_slots = min(self.fast_bytes // self._stride, spec.n_all_experts)
        fewest = DEMAND_RESERVE_SLOTS + 1
        if self.n_slots < fewest:
            need = fewest * self._stride
            raise AnswerIsNo(
                f"fast memory: {in_mib(self.fast_bytes)} lack {need - self.fast_bytes:,} bytes for {fewest} experts of "
                f"{self._stride:,} bytes; the smallest change that fits is --fast-memory {in_mib(need).replace(' ', '')}."
            )
        longest = r.workload.prompt_tokens.max + r.workload.output_tokens.max
        context = r.context_tokens or longest
        self.context_tokens = min(-(-context // PAGE) * PAGE, spec.max_positions)
        self.contexts = [int(r.workload.prompt_tokens.mean + r.workload.output_tokens.mean / 2)] * r.batch
        self.n_evaluated = 0
        self._prices: dict[int, Prices] = {}

    def prices(self, n_threads: int) -> Prices:
        """Prices at a thread count, made once."""
        r = self.request
        if n_threads not in self._prices:
            self._prices[n_threads] = Prices(r.profile, r.model, r.draft, n_threads, r.disk_limit_gb_per_s)
        return self._prices[n_threads]

    def decode(self, choice: Choice) -> PlanDecode:
        """The decode part of a plan."""
        r = self.request
        return PlanDecode(
            drafter=choice.drafter,
            draft_length=choice.draft_length,
            batch=r.batch,
            micro_batches=choice.micro_batches,
            context_tokens=self.context_tokens,
            prefill_chunk_tokens=r.prefill_chunk_tokens,
        )

    def memory(self, choice: Choice) -> PlanMemory:
        """Bytes by tier of a choice."""
        r = self.request
        n_resident = self.n_slots - choice.stream_slots
        return plan_memory(
            r.model,
            r.draft,
            self.decode(choice),
            n_resident,
            choice.stream_slots,
            choice.n_threads,
            r.profile.process_bytes,
        )

    def objective(self, choice: Choice) -> float | None:
        """Predicted tokens per second, None where host memory is too small."""
        self.n_evaluated += 1
        if sum(self.memory(choice).host.values()) > self.request.host_memory_bytes:
            return None
        return self.part(choice).predicted.tokens_per_s

    def part(self, choice: Choice) -> PlainPlan:
        """Everything of a plan that depends on the choice."""
        r = self.request
        decode, experts = self.decode(choice), place(r.model, r.workload, choice, self.n_slots, r.batch)
        prediction = forecast(
            r.model, r.workload, decode, experts, self.prices(choice.n_threads), self.contexts
        ).prediction
        disk = r.profile.disk
        threads = PlanThreads(
            compute=choice.n_threads,
            disk_readers=disk.n_readers if disk else 1,
            disk_chunk_bytes=disk.chunk_bytes if disk else 1 << 20,
        )
        return PlainPlan(
            decode=decode, experts=experts, threads=threads, memory=self.memory(choice), predicted=prediction
        )

    def plan(self, choice: Choice, plain: Choice, ranked: list[Choice]) -> Plan:
        """The whole plan."""
        r = self.request
        best_by_length: dict[int, Choice] = {}
        for c in ranked:
            best_by_length.setdefault(c.draft_length, c)
        curve = [
            CurvePoint(draft_length=k, drafter=c.drafter, prediction=self.part(c).predicted)
            for k, c in sorted(best_by_length.items())
        ]
        drafts_with_model = choice.drafter == "model" and r.draft is not None
        draft = None
        if drafts_with_model:
            draft = PlanModel(source=r.draft_source or "", name=r.draft.name, fingerprint=r.draft.fingerprint)  # type: ignore[union-attr]
        return Plan(
            model=PlanModel(source=r.model_source, name=r.model.name, fingerprint=r.model.fingerprint),
            draft=draft,
            **dict(self.part(choice)),
            limits=PlanLimits(
                fast_memory_bytes=self.fast_bytes,
                host_memory_bytes=r.host_memory_bytes,
                disk_limit_gb_per_s=r.disk_limit_gb_per_s,
            ),
            inputs=PlanInputs(
                profile_name=r.profile.name,
                machine_fingerprint=r.profile.machine.fingerprint,
                workload_name=r.workload.name,
                profile_sha256=sha256_text(r.profile.text()),
                workload_sha256=sha256_text(r.workload.text()),
                search=r.search,
                seed=r.seed,
                n_evaluated=self.n_evaluated,
                tool_version=__version__,
                command=r.command,
            ),
            plain=self.part(plain),
            curve=tuple(curve),
        )

    def too_small(self, space: Space) -> AnswerIsNo:
        """Why nothing fits host memory, and the smallest change that would."""
        smallest = min(space.choices(), key=lambda c: sum(self.memory(c).host.values()))
        need = sum(self.memory(smallest).host.values())
        limit = self.request.host_memory_bytes
        largest = max(self.memory(smallest).host.items(), key=lambda item: item[1])
        return AnswerIsNo(
            f"host memory: even the smallest plan needs {need:,} bytes, {need - limit:,} more than the limit of {limit:,} "
            f"(most of it {largest[0]}: {largest[1]:,}); the smallest change that fits is "
            f"--host-memory {in_mib(need).replace(' ', '')}, or a smaller --batch or --context."
        )


def tune(request: TuneRequest) -> Plan:
    """The best plan that fits, with its plain baseline. Raises AnswerIsNo where nothing fits."""
    tuner = Tuner(request)
    r = request
    space = make_space(r.profile, r.model, r.draft, r.workload, tuner.n_slots, r.batch)
    if r.search == "optuna":
        ranked = optuna_search(space, tuner.objective, r.trials, r.seed, r.storage, r.progress)
        # Plain decoding is always a candidate, whatever the sampler looked at.
        plain_space = Space(
            {"none": (0,)}, space.micro_batches, space.stream_slots, space.prefetch_thresholds, space.n_threads
        )
        ranked = sorted(
            [*ranked, *exhaustive(plain_space, tuner.objective)], key=lambda c: -(tuner.objective(c) or 0.0)
        )
    else:
        ranked = exhaustive(space, tuner.objective, r.progress)
    if not ranked:
        raise tuner.too_small(space)
    plain = next(c for c in ranked if c.draft_length == 0)
    best = ranked[0]
    if r.measure is not None and r.measure_top:
        best = _measured_best(tuner, ranked, plain, r.measure, r.measure_top)
    return tuner.plan(best, plain, ranked)


def _measured_best(
    tuner: Tuner, ranked: list[Choice], plain: Choice, measure: Callable[[Plan], float], n: int
) -> Choice:
    """The best by measurement of the top n, each of another draft length, and plain decoding."""
    diverse: dict[int, Choice] = {}
    for choice in ranked:
        diverse.setdefault(choice.draft_length, choice)
    candidates = [*dict.fromkeys([*list(diverse.values())[:n], plain])]
    return max(candidates, key=lambda c: measure(tuner.plan(c, plain, ranked)))
