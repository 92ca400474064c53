"""From profile, model and workload to a plan for a machine with a GPU."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import ceil
from typing import NamedTuple

import numpy as np

from specmoeoff.errors import AnswerIsNo, BadInput
from specmoeoff.estimate.gpu_choices import Choices, make_problem
from specmoeoff.estimate.gpu_memory import BUFFERED_LAYERS, tiers, total
from specmoeoff.estimate.gpu_window import GpuEstimator
from specmoeoff.estimate.memory import in_mib
from specmoeoff.estimate.rates import ASSUMPTIONS, rates_of
from specmoeoff.files import sha256_text
from specmoeoff.specs.plan import (
    CurvePoint,
    DrafterName,
    LengthAt,
    MeasuredTrial,
    Outlook,
    ParetoPoint,
    PlainPlan,
    Plan,
    PlanDecode,
    PlanExperts,
    PlanGpu,
    PlanLimits,
    PlanMemory,
    PlanModel,
    PlanThreads,
    Prediction,
)
from specmoeoff.tuner.gpu_space import LONGEST_DRAFT, GpuSpace
from specmoeoff.tuner.measure import Trials
from specmoeoff.tuner.search import TIE, optuna_trials
from specmoeoff.tuner.tune import TuneRequest

FEEDING_CORES = 1  # for who enqueues the GPU's work: where it waits for a core, all lanes do
FLAT_SHARE = 0.999  # of the experts used in a window: from there on it no longer matters which are resident
FLAT = {
    "residents": "searched in quarters of what fits; every choice is also tried with all that fast memory has left for them",
    "threads": "not searched: the CPU's kernels take turns on their lane, each with all cores but the one that feeds the GPU",
}


class Candidate(NamedTuple):
    """A choice to be run. `choice`: its fields, by name."""

    drafter: DrafterName
    draft_length: int
    batch: int
    choice: tuple[tuple[str, float], ...]

    @property
    def one(self) -> Choices:
        """As arrays of one."""
        return Choices(**{name: np.array([value]) for name, value in self.choice})


@dataclass(frozen=True)
class Priced:
    """Choices that fit, with their predicted throughput."""

    choices: Choices
    tokens_per_s: np.ndarray


def price_points(space: GpuSpace, estimator: GpuEstimator, points: np.ndarray) -> Priced:
    """All of (n, n_axes) points that fit."""
    choices = space.choices(points)
    choices = choices.take(np.flatnonzero(choices.batch > 0))
    return Priced(choices, estimator.tokens_per_s(choices) if len(choices) else np.empty(0))


class GpuTuner:
    """One request's space and prices, and the plan made of a choice."""

    def __init__(self, request: TuneRequest) -> None:
        r = self.request = request
        if r.fast_memory_bytes is None:
            raise BadInput("--fast-memory is needed: the memory of the GPU that may be used, for example 24GiB.")
        if r.context_tokens and r.context_tokens > r.model.max_positions:
            raise BadInput(f"--context {r.context_tokens}: this model has 1 to {r.model.max_positions} positions.")
        self.limits = {"fast": r.fast_memory_bytes, "host": r.host_memory_bytes}
        self.problem = make_problem(r.model, r.workload, r.context_tokens, LONGEST_DRAFT, r.draft, r.drafter)
        self.space = GpuSpace(self.problem, self.limits, r.batch)
        self.estimator = GpuEstimator(self.problem, replace(rates_of(r.profile), scales=r.scales))

    @cached_property
    def everything(self) -> Priced:
        """The whole space."""
        return price_points(self.space, self.estimator, self.space.points())

    def by_optuna(self) -> Priced:
        """What Optuna looks at, and all of plain decoding."""
        r, names = self.request, list(self.space.axes)

        def value(index: dict[str, int]) -> float | None:
            priced = price_points(self.space, self.estimator, np.array([[index[name] for name in names]]))
            return float(priced.tokens_per_s[0]) if len(priced.choices) else None

        files = (r.profile.text(), r.workload.text(), r.model.fingerprint, self.limits, r.context_tokens, r.batch)
        starts = [self.space.plain(), self.space.closed_form()]
        problem = sha256_text(repr((self.space.axes, files)))[:12]
        tried = optuna_trials(self.space.axes, value, starts, r.trials, r.seed, problem, r.storage, r.progress)
        points = {tuple(index[name] for name in names) for index, _ in tried}
        plain = self.space.points()
        points |= {tuple(map(int, point)) for point in plain[plain[:, 0] == 0]}
        return price_points(self.space, self.estimator, np.array(sorted(points)))

    def with_filled(self, priced: Priced) -> Priced:
        """Also each choice with what it leaves of fast memory given to residents: not an axis, for the batch at which the last
        expert just fits is a needle that no sampler finds."""
        filled = self.space.filled(priced.choices)
        filled = filled.take(np.flatnonzero(filled.resident > priced.choices.resident))
        found = [priced.tokens_per_s, self.estimator.tokens_per_s(filled)] if len(filled) else [priced.tokens_per_s]
        return Priced(priced.choices.joined(filled), np.concatenate(found))

    def best(self, priced: Priced, only: np.ndarray | None = None) -> Choices:
        """The choice that drafts least among those that tie with the best (TIE)."""
        tokens_per_s = priced.tokens_per_s if only is None else np.where(only, priced.tokens_per_s, 0.0)
        lengths = self.problem.of_draft(priced.choices, "length")
        ties = np.flatnonzero(tokens_per_s >= TIE * tokens_per_s.max())
        first = np.lexsort((-tokens_per_s[ties], lengths[ties]))[:1]
        return priced.choices.take(ties[first])

    def part(self, one: Choices) -> PlainPlan:
        """Everything of a plan that depends on the choice."""
        r, spec = self.request, self.problem.spec
        draft = self.problem.drafts[int(one.draft[0])]
        resident, on_host, on_demand = int(one.resident[0]), int(one.on_host[0]), bool(one.on_demand[0])
        streamed = spec.n_experts - resident - on_host
        if r.workload.popularity is None:
            order = np.tile(np.arange(spec.n_experts), (spec.n_expert_layers, 1))
        else:
            order = np.argsort(-np.asarray(r.workload.popularity)[spec.n_dense_layers :], axis=1, kind="stable")

        def layers(first: int, last: int) -> tuple[tuple[int, ...], ...]:
            return ((),) * spec.n_dense_layers + tuple(tuple(sorted(map(int, row[first:last]))) for row in order)

        memory = {
            tier: {purpose: ceil(b[0]) for purpose, b in purposes.items() if b[0]}
            for tier, purposes in tiers(self.problem, one).items()
        }
        disk = r.profile.disk
        return PlainPlan(
            decode=PlanDecode(
                drafter=draft.drafter,
                draft_length=draft.length,
                batch=int(one.batch[0]),
                micro_batches=int(one.micro_batches[0]),
                context_tokens=ceil(self.problem.request_tokens),
                prefill_chunk_tokens=r.prefill_chunk_tokens,
            ),
            experts=PlanExperts(
                resident=layers(0, resident),
                prefetch=layers(0, 0) if on_demand else layers(resident, resident + streamed),
                stream_slots=streamed * (1 if on_demand else BUFFERED_LAYERS),
                on_host=layers(resident + streamed, spec.n_experts),
            ),
            threads=PlanThreads(
                compute=max(1, r.profile.machine.n_cores - FEEDING_CORES),
                disk_readers=disk.n_readers if disk else 1,
                disk_chunk_bytes=disk.chunk_bytes if disk else 1 << 20,
            ),
            memory=PlanMemory(**memory, disk={}),
            predicted=self.predict(one),
            gpu=PlanGpu(kv_share=float(one.kv_share[0]), draft_kv_share=float(one.draft_kv_share[0])),
        )

    def predict(self, one: Choices) -> Prediction:
        """Of the steady state at the workload's middle context."""
        draft, window_s = self.problem.drafts[int(one.draft[0])], float(self.estimator.window_s(one)[0])
        busy_s, phases_s = self.estimator.breakdown(one)
        spec = self.problem.spec
        return Prediction(
            window_s=window_s,
            tokens_per_round=draft.tokens_per_round,
            tokens_per_s=float(one.batch[0]) * draft.tokens_per_round / window_s,
            busy_s=busy_s,
            phases_s=phases_s,
            disk_bytes=0.0,
            h2d_bytes=float(self.estimator.loaded(one)[0]) * spec.expert_bytes * spec.n_expert_layers,
            bound=max(busy_s, key=lambda lane: busy_s[lane]),
            context_tokens=int(self.problem.context_tokens),
        )

    def outlook(self, best: Choices, priced: Priced) -> Outlook:
        """What surrounds the chosen point."""
        r = self.request
        used = float(
            self.estimator.used(best.batch, self.lengths(best) + 1.0, *(np.array([n]) for n in (0, r.model.n_experts)))[
                0
            ]
        )
        flat = dict(FLAT)
        if used >= FLAT_SHARE * r.model.n_experts:
            flat["which experts are resident"] = (
                f"not searched: a window uses {used / r.model.n_experts:.1%} of the experts, so only how many matters"
            )
        assumptions = [r.workload.provenance, "a request's KV is reserved for the mean length"]
        drafter = self.problem.drafts[int(best.draft[0])].drafter
        if drafter != "none":
            assumptions.append(f"acceptance of {drafter}: {r.workload.acceptance[drafter].provenance}")
        if drafter == "eagle" and r.draft is None:
            assumptions.append("the EAGLE head is sized like the published one of Mixtral-8x7B")
        if r.profile.kind == "datasheet":
            assumptions += [f"{name} {stated.value:g}: {stated.source}" for name, stated in ASSUMPTIONS.items()]
        return Outlook(
            draft_lengths=self._length_table(best),
            pareto=self._pareto(priced),
            flat_axes=flat,
            assumptions=tuple(assumptions),
        )

    def lengths(self, choices: Choices) -> np.ndarray:
        """Draft lengths."""
        return self.problem.of_draft(choices, "length")

    def _length_table(self, best: Choices) -> tuple[LengthAt, ...]:
        """Over shares of the reserved context and of the planned requests, among lengths whose rows memory was planned for."""
        batch, rows = float(best.batch[0]), float(best.batch[0] * (self.lengths(best)[0] + 1))
        table = []
        for context in (0.25, 0.5, 0.75, 1.0):
            for live in dict.fromkeys(max(1, int(batch * share)) for share in (0.125, 0.25, 0.5, 1.0)):
                drafts = np.array([i for i, d in enumerate(self.problem.drafts) if live * (d.length + 1) <= rows])
                some = best.take(np.zeros(len(drafts), dtype=int))
                some = replace(some, draft=drafts, batch=np.full(len(drafts), float(live)))
                tokens = int(context * self.problem.request_tokens)
                found = self.estimator.tokens_per_s(some, np.full(len(drafts), float(tokens)))
                at = int(np.argmax(found))
                length = self.problem.drafts[drafts[at]].length
                table.append(
                    LengthAt(context_tokens=tokens, live=live, draft_length=length, tokens_per_s=float(found[at]))
                )
        return tuple(table)

    def _pareto(self, priced: Priced) -> tuple[ParetoPoint, ...]:
        """From the most throughput to the least latency, at most 24 points."""
        s_per_token = priced.choices.batch / priced.tokens_per_s
        order = np.lexsort((s_per_token, -priced.tokens_per_s))
        front = order[np.flatnonzero(np.diff(np.minimum.accumulate(s_per_token[order]), prepend=np.inf) < 0)]
        lengths = self.lengths(priced.choices)
        return tuple(
            ParetoPoint(
                tokens_per_s=float(priced.tokens_per_s[i]),
                s_per_token=float(s_per_token[i]),
                batch=int(priced.choices.batch[i]),
                draft_length=int(lengths[i]),
            )
            for i in front[np.unique(np.linspace(0, len(front) - 1, 24).astype(int))]
        )

    def nothing_fits(self) -> AnswerIsNo:
        """Which tier lacks how much at the least, and the smallest change that would fit."""
        choices = self.space.choices(self.space.points())
        choices = replace(choices, batch=np.full(len(choices), float(self.space.batch or 1)))
        choices = replace(choices, resident=np.zeros_like(choices.resident), draft_kv_share=np.zeros(len(choices)))
        needs = {tier: total(purposes) for tier, purposes in tiers(self.problem, choices).items()}
        lacks = {tier: np.maximum(0, need - self.limits[tier]) for tier, need in needs.items()}
        at = int(np.argmin(lacks["fast"] + lacks["host"]))
        told = []
        for tier in ("fast", "host"):
            need, limit = int(needs[tier][at]), self.limits[tier]
            if need > limit:
                told.append(
                    f"{tier} memory: even the smallest plan needs {need:,} bytes, {need - limit:,} more than the limit of "
                    f"{limit:,}; the smallest change that fits is --{tier}-memory {in_mib(need + 16).replace(' ', '')}"
                )
        return AnswerIsNo("; and ".join(told) + (", or a smaller --batch." if self.request.batch else "."))

    def plan(self) -> Plan:
        """Search, choose, and look around."""
        r = self.request
        priced = self.by_optuna() if r.search == "optuna" else self.everything
        if not len(priced.choices):
            raise self.nothing_fits()
        priced = self.with_filled(priced)
        lengths = self.lengths(priced.choices)
        best, plainly = self.best(priced), self.best(priced, lengths == 0)
        if r.measure is not None and r.measure_top:
            trials: Trials[Candidate] = Trials(lambda c: self._written(c.one, plainly, priced), r.measure)
            of_lengths = [self.best(priced, lengths == length) for length in np.unique(lengths)]
            fastest = sorted(of_lengths, key=lambda one: -float(self.estimator.tokens_per_s(one)[0]))[: r.measure_top]
            best = trials.best([*map(self._candidate, fastest), self._candidate(plainly)]).one
            return self._written(best, plainly, priced, trials.told)
        if self.predict(plainly).tokens_per_s >= self.predict(best).tokens_per_s:
            best = plainly
        return self._written(best, plainly, priced)

    def _candidate(self, one: Choices) -> Candidate:
        draft = self.problem.drafts[int(one.draft[0])]
        choice = tuple((f.name, getattr(one, f.name)[0].item()) for f in fields(one))
        return Candidate(draft.drafter, draft.length, int(one.batch[0]), choice)

    def _written(
        self, best: Choices, plainly: Choices, priced: Priced, measured: tuple[MeasuredTrial, ...] = ()
    ) -> Plan:
        """The plan of a choice, beside the best of plain decoding."""
        r, lengths = self.request, self.lengths(priced.choices)
        chosen, plain = self.part(best), self.part(plainly)
        curve = []
        for length in map(int, np.unique(lengths)):
            one = self.best(priced, lengths == length)
            drafter = self.problem.drafts[int(one.draft[0])].drafter
            curve.append(CurvePoint(draft_length=length, drafter=drafter, prediction=self.predict(one)))
        draft, head = None, self.problem.head
        if chosen.decode.drafter in ("eagle", "model") and head is not None:
            draft = PlanModel(source=r.draft_source or "", name=head.name, fingerprint=head.fingerprint)
        return Plan(
            model=PlanModel(
                source=r.model_source,
                name=r.model.name,
                fingerprint=r.model.fingerprint,
                expert_format=r.model.expert_format,
            ),
            draft=draft,
            **dict(chosen),
            limits=PlanLimits(fast_memory_bytes=self.limits["fast"], host_memory_bytes=self.limits["host"]),
            inputs=r.inputs(len(priced.choices)),
            plain=plain,
            curve=tuple(curve),
            outlook=self.outlook(best, priced),
            measured=measured,
        )
