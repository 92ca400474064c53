"""From profile, model and workload to a plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf

import numpy as np

from specmoeoff import __version__
from specmoeoff.errors import AnswerIsNo, BadInput, SpecMoEOffError
from specmoeoff.estimate.costs import Prices
from specmoeoff.estimate.experts import probability_used
from specmoeoff.estimate.memory import expert_stride, in_mib, plan_memory
from specmoeoff.estimate.predict import forecast, tokens_per_round, window_shape
from specmoeoff.estimate.rates import Scale
from specmoeoff.estimate.tables import OutOfRange
from specmoeoff.files import sha256_text
from specmoeoff.pipeline import DEMAND_RESERVE_SLOTS, window_graph
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import (
    CurvePoint,
    DrafterName,
    LengthAt,
    MeasuredTrial,
    Outlook,
    PlainPlan,
    Plan,
    PlanDecode,
    PlanExperts,
    PlanInputs,
    PlanLimits,
    PlanMemory,
    PlanModel,
    PlanThreads,
    Prediction,
)
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.measure import Measure, Trials, best_by_optuna
from specmoeoff.tuner.search import SearchName, exhaustive, lengths_once, optuna_search
from specmoeoff.tuner.space import Choice, make_space, place

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
    drafter: DrafterName = "model"  # what `draft` is
    fast_memory_bytes: int | None = None
    batch: int | None = None
    context_tokens: int | None = None
    kv_tokens: int | None = None
    prefill_chunk_tokens: int = 256
    disk_limit_gb_per_s: float | None = None
    search: SearchName = "exhaustive"
    trials: int = 200
    seed: int = 0
    storage: str | None = None
    command: str = ""
    scales: Mapping[str, Scale] = field(default_factory=dict)  # of a GPU's nodes, from a validation
    measure_top: int = 0
    measure: Measure | None = field(default=None, compare=False)
    progress: Callable[[float], None] = field(default=lambda share: None, compare=False)

    def inputs(self, n_evaluated: int) -> PlanInputs:
        """What a plan tells of where it came from."""
        return PlanInputs(
            profile_name=self.profile.name,
            machine_fingerprint=self.profile.machine.fingerprint,
            workload_name=self.workload.name,
            profile_sha256=sha256_text(self.profile.text()),
            workload_sha256=sha256_text(self.workload.text()),
            search=self.search,
            seed=self.seed,
            n_evaluated=n_evaluated,
            tool_version=__version__,
            command=self.command,
        )


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
        measured = r.workload.draft_fingerprint
        if r.draft and r.drafter == "model" and measured not in (None, r.draft.fingerprint):
            raise BadInput(
                f"workload {r.workload.name} tells how much of another draft than {r.draft.name} is accepted; run "
                f"`specmoeoff workload --model {r.model_source} --drafter model:{r.draft_source}`."
            )
        if r.workload.popularity is None:
            raise BadInput(
                f"workload {r.workload.name}: no popularity; run `specmoeoff workload --model {r.model_source}`."
            )
        shape = (len(r.workload.popularity), len(r.workload.popularity[0]))
        if shape != (spec.n_layers, spec.n_experts):
            raise BadInput(
                f"workload {r.workload.name}: popularity of {shape[0]} layers x {shape[1]} experts, but {spec.name} has "
                f"{spec.n_layers} x {spec.n_experts}; run `specmoeoff workload --model {r.model_source}`."
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
        context = r.context_tokens or min(r.workload.longest_request_tokens, spec.max_positions)
        if not 0 < context <= spec.max_positions:
            raise BadInput(f"--context {context}: this model has 1 to {spec.max_positions} positions.")
        self.context_tokens = min(-(-context // PAGE) * PAGE, spec.max_positions)
        if r.kv_tokens is not None and r.kv_tokens < self.context_tokens:
            raise BadInput(
                f"--kv-tokens {r.kv_tokens}: one request may have {self.context_tokens}; give at least those."
            )
        self.mean_context = int(r.workload.middle_context_tokens)
        self.host_needs: set[int] = set()
        self.out_of_range: OutOfRange | None = None
        self.n_evaluated = 0
        self._floors: dict[tuple[object, ...], tuple[float, float]] = {}
        self._predictions: dict[tuple[object, ...], Prediction] = {}
        self._reads: dict[tuple[object, ...], float] = {}
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
            batch=choice.batch,
            micro_batches=choice.micro_batches,
            context_tokens=self.context_tokens,
            prefill_chunk_tokens=r.prefill_chunk_tokens,
            kv_tokens=r.kv_tokens,
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

    def fits(self, choice: Choice) -> bool:
        """Whether host memory is enough."""
        need = sum(self.memory(choice).host.values())
        self.host_needs.add(need)
        return need <= self.request.host_memory_bytes

    @property
    def problem(self) -> tuple[object, ...]:
        """What the prices depend on."""
        r = self.request
        files = (r.profile.text(), r.workload.text(), r.model.fingerprint, r.draft.fingerprint if r.draft else "")
        limits = (self.fast_bytes, r.host_memory_bytes, self.context_tokens, r.kv_tokens, r.disk_limit_gb_per_s)
        return (*files, *limits, r.model.packed_format)

    def price(self, choice: Choice) -> Prediction | None:
        """What is predicted of a choice, None where it does not fit or its sizes were not measured."""
        if not self.fits(choice):
            return None
        self.n_evaluated += 1
        try:
            return self.part(choice).predicted
        except OutOfRange as error:
            self.out_of_range = error
            return None

    def bound(self, choice: Choice) -> float:
        """Tokens per second that no schedule exceeds: the compute lane without a wait; the disk without a wait, reading
        nothing that is not used; and while drafting, when no slot is given back, the disk fills the slots at most."""
        draft_s, compute_s = self._compute_floor(choice)
        n_read = self._least_read(choice)
        load_s = self._stride / (self.prices(choice.n_threads).disk_gb_per_s * 1e9)
        window_s = max(compute_s, n_read * load_s, draft_s + (n_read - choice.stream_slots) * load_s)
        return choice.batch * tokens_per_round(self.request.workload, self.decode(choice)) / window_s

    def _compute_floor(self, choice: Choice) -> tuple[float, float]:
        key = (choice.drafter, choice.draft_length, choice.batch, choice.n_threads)
        if key not in self._floors:
            spec = self.request.model
            everything = PlanExperts.all_resident(spec)
            alone = self.decode(replace(choice, micro_batches=1))
            shape = window_shape(spec, self.request.workload, alone, everything, [self.mean_context] * choice.batch)
            try:
                self._floors[key] = self.prices(choice.n_threads).compute_floor(window_graph(shape, 0))
            except OutOfRange as error:
                self.out_of_range, self._floors[key] = error, (inf, inf)
        return self._floors[key]

    def _least_read(self, choice: Choice) -> float:
        """Experts that are used and not resident, on average."""
        key = (choice.draft_length, choice.batch, choice.stream_slots)
        if key not in self._reads:
            workload = self.request.workload
            popularity = np.asarray(workload.popularity)
            used = probability_used(popularity, choice.batch, choice.draft_length + 1, workload.union_exponent)
            resident = place(self.request.model, workload, choice, self.n_slots).resident
            self._reads[key] = float(used.sum() - sum(used[i, list(held)].sum() for i, held in enumerate(resident)))
        return self._reads[key]

    def part(self, choice: Choice) -> PlainPlan:
        """Everything of a plan that depends on the choice."""
        r = self.request
        decode, experts = self.decode(choice), place(r.model, r.workload, choice, self.n_slots)
        key = (decode, experts, choice.n_threads)  # several thresholds can mean the same placement
        if key not in self._predictions:
            contexts = [self.mean_context] * choice.batch
            prices = self.prices(choice.n_threads)
            self._predictions[key] = forecast(r.model, r.workload, decode, experts, prices, contexts).prediction
        disk = r.profile.disk
        threads = PlanThreads(
            compute=choice.n_threads,
            disk_readers=disk.n_readers if disk else 1,
            disk_chunk_bytes=disk.chunk_bytes if disk else 1 << 20,
        )
        return PlainPlan(
            decode=decode,
            experts=experts,
            threads=threads,
            memory=self.memory(choice),
            predicted=self._predictions[key],
        )

    def plan(
        self, choice: Choice, plain: Choice, ranked: list[Choice], measured: tuple[MeasuredTrial, ...] = ()
    ) -> Plan:
        """The whole plan."""
        r = self.request
        same_batch = [c for c in ranked if c.batch == choice.batch]
        curve = [
            CurvePoint(draft_length=c.draft_length, drafter=c.drafter, prediction=self.part(c).predicted)
            for c in sorted(lengths_once(same_batch), key=lambda c: c.draft_length)
        ]
        draft = None
        if r.draft is not None and choice.drafter == r.drafter:
            draft = _plan_model(r.draft_source or "", r.draft)
        return Plan(
            model=_plan_model(r.model_source, r.model),
            draft=draft,
            **dict(self.part(choice)),
            limits=PlanLimits(
                fast_memory_bytes=self.fast_bytes,
                host_memory_bytes=r.host_memory_bytes,
                disk_limit_gb_per_s=r.disk_limit_gb_per_s,
            ),
            inputs=r.inputs(self.n_evaluated),
            plain=self.part(plain),
            curve=tuple(curve),
            measured=measured,
        )

    def draft_lengths(self, choice: Choice) -> tuple[LengthAt, ...]:
        """The best draft length over contexts and live requests, none longer than memory was planned for."""
        r, decode, experts = self.request, self.decode(choice), self.part(choice).experts
        drafts = [decode.model_copy(update={"drafter": "none", "draft_length": 0})]
        drafts += [decode.model_copy(update={"draft_length": k}) for k in range(1, choice.draft_length + 1)]
        table = []
        for context in (int(share * self.context_tokens) for share in (0.25, 0.5, 0.75, 1.0)):
            for live in dict.fromkeys(max(1, int(choice.batch * share)) for share in (0.125, 0.25, 0.5, 1.0)):
                prices = self.prices(choice.n_threads)
                try:
                    found = [
                        forecast(r.model, r.workload, d, experts, prices, [context] * live).prediction.tokens_per_s
                        for d in drafts
                    ]
                except OutOfRange:  # the longest contexts; the runtime takes the nearest that is here
                    continue
                k = int(np.argmax(found))
                table.append(LengthAt(context_tokens=context, live=live, draft_length=k, tokens_per_s=found[k]))
        return tuple(table)

    def with_outlook(self, plan: Plan, choice: Choice) -> Plan:
        """The plan with what surrounds its choice."""
        r, drafter = self.request, choice.drafter
        assumptions = [
            f"profile {r.profile.name}: {r.profile.kind}",
            f"workload {r.workload.name}: {r.workload.provenance}",
        ]
        if drafter != "none":
            assumptions.append(f"acceptance of {drafter}: {r.workload.acceptance[drafter].provenance}")
        lengths = self.draft_lengths(choice) if drafter != "none" else ()
        return plan.model_copy(update={"outlook": Outlook(draft_lengths=lengths, assumptions=tuple(assumptions))})

    def nothing_fits(self) -> SpecMoEOffError:
        """Why there is no plan, and the smallest change that would make one."""
        need, limit = min(self.host_needs, default=0), self.request.host_memory_bytes
        if need <= limit and self.out_of_range:
            return self.out_of_range
        return AnswerIsNo(
            f"host memory: even the smallest plan needs {need:,} bytes, {need - limit:,} more than the limit of {limit:,}; "
            f"the smallest change that fits is --host-memory {in_mib(need).replace(' ', '')}, or a smaller --batch or "
            "--context."
        )


def _plan_model(source: str, spec: ModelSpec) -> PlanModel:
    return PlanModel(
        source=source,
        name=spec.name,
        fingerprint=spec.fingerprint,
        precision=spec.precision,
        expert_format=spec.expert_format,
    )


def plans_for_gpu(request: TuneRequest) -> bool:
    """Where there is a GPU, unless the CPU's operators were measured at this model's shape: those the runtime can run."""
    measured = any(table.shape == request.model.shape_key for table in request.profile.operators)
    return request.profile.machine.gpu is not None and not measured


def tune(request: TuneRequest) -> Plan:
    """The best plan that fits, with its plain baseline. Raises AnswerIsNo where nothing fits."""
    if plans_for_gpu(request):
        from specmoeoff.tuner.gpu_tune import GpuTuner

        return GpuTuner(request).plan()
    tuner, r = Tuner(request), request
    space = make_space(r.profile, r.model, r.draft, r.workload, tuner.n_slots, r.batch, r.drafter)
    if r.search == "optuna":
        problem = sha256_text(repr((space, tuner.problem)))[:12]
        ranked = optuna_search(space, tuner.price, r.trials, r.seed, problem, r.storage, r.progress)
    else:
        ranked = exhaustive(space, tuner.price, tuner.bound, r.progress)
    if not ranked:
        raise tuner.nothing_fits()
    best = ranked[0]

    def plain_at(batch: int) -> Choice:
        plainly = replace(space, draft_lengths={"none": (0,)}, batches=(batch,))
        return exhaustive(plainly, tuner.price, tuner.bound)[0]

    # Plain decoding at the same batch is the baseline and always a candidate, whatever a sampler looked at.
    plain = plain_at(best.batch)
    ranked = [*dict.fromkeys([*ranked, plain])]
    if tuner.part(plain).predicted.tokens_per_s >= tuner.part(best).predicted.tokens_per_s:
        best = plain
    if r.measure is None or not r.measure_top:
        return tuner.with_outlook(tuner.plan(best, plain, ranked), best)
    trials: Trials[Choice] = Trials(lambda choice: tuner.plan(choice, plain, [choice, plain]), r.measure)
    if r.search == "optuna":
        problem = sha256_text(repr((space, tuner.problem, "measured")))[:12]
        starts = [plain, *islice(lengths_once(ranked), max(1, r.measure_top // 3))]
        study = (r.measure_top, r.seed, problem, r.storage, r.progress)
        best = best_by_optuna(trials, space, tuner.price, starts, *study)
    else:
        best = trials.best([*islice(lengths_once(ranked), r.measure_top), plain])
    if best.batch != plain.batch:
        plain = plain_at(best.batch)
    plan = tuner.plan(best, plain, [*dict.fromkeys([*ranked, best, plain])], trials.told)
    return tuner.with_outlook(plan, best)
