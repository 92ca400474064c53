"""Measures how requests behave on a model: lengths, acceptance by position, popularity and union of experts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.estimate.experts import fit_union_exponent
from specmoeoff.runtime.drafters.eagle import EagleHead
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.pack import PackedModel
from specmoeoff.runtime.process import available_bytes
from specmoeoff.runtime.sampling import GREEDY
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import DrafterName, PlanDecode, PlanExperts, PlanThreads
from specmoeoff.specs.workload import Acceptance, Lengths, UnionPoint, Workload

LONGEST_DRAFT = 24
UNION_REQUESTS = (1, 2, 4, 8, 16)
UNION_TOKENS = (1, 2, 3, 5, 9, 13)


@dataclass
class AcceptanceCounter:
    """Counts, for every draft position, how often it was tried (all before it accepted) and accepted. A drafter that proposes
    fewer tokens than asked for missed. of_text: as `Acceptance` has it; rounds after a whole draft are then not counted."""

    of_text: bool = False
    tried: np.ndarray = field(default_factory=lambda: np.zeros(LONGEST_DRAFT, np.int64))
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(LONGEST_DRAFT, np.int64))
    n_rounds: int = 0
    _n_output: dict[Sequence, int] = field(default_factory=dict)
    _amid_run: set[Sequence] = field(default_factory=set)

    def see(self, sequences: Iterable[Sequence]) -> None:
        """After every window: those that gained more than their first token went through a round."""
        for s in sequences:
            before = self._n_output.get(s, 0)
            if s.n_output == before:
                continue
            self._n_output[s] = s.n_output
            if before:
                self._count(s, s.n_output - before - 1, min(LONGEST_DRAFT, s.request.max_tokens - before - 1))

    def _count(self, sequence: Sequence, n_accepted: int, offered: int) -> None:
        skipped = sequence in self._amid_run
        (self._amid_run.add if self.of_text and n_accepted == LONGEST_DRAFT else self._amid_run.discard)(sequence)
        if skipped:
            return
        self.n_rounds += 1
        self.accepted[:n_accepted] += 1
        missed = n_accepted < offered and sequence.finish_reason != "stop"
        self.tried[: n_accepted + missed] += 1

    def acceptance(self, provenance: str) -> Acceptance:
        """Positions tried fewer than 30 times hold no information and end the table."""
        n_known = int(np.argmax(self.tried < 30)) if (self.tried < 30).any() else len(self.tried)
        rates = self.accepted[:n_known] / np.maximum(self.tried[:n_known], 1)
        return Acceptance(
            conditional=tuple(float(r) for r in rates),
            n_rounds=self.n_rounds,
            provenance=provenance,
            of_text=self.of_text,
        )


def observing_residents(target: PackedModel) -> int:
    """How many experts to hold while observing: all if memory allows, else a quarter."""
    n = target.spec.n_all_experts
    return n if n * target.expert_stride < 0.6 * available_bytes() else n // 4


def observing_experts(spec: ModelSpec, n_resident: int) -> PlanExperts:
    """The first `n_resident` experts, layer by layer for each number, are held; the others are read when asked for."""
    whole, rest = divmod(n_resident, spec.n_expert_layers)
    held = tuple(tuple(range(whole + (i < rest))) for i in range(spec.n_expert_layers))
    return PlanExperts(
        resident=((),) * spec.n_dense_layers + held,
        prefetch=((),) * spec.n_layers,
        stream_slots=0 if n_resident == spec.n_all_experts else max(2 * spec.n_active, 8),
    )


def lengths(counts: list[int]) -> Lengths:
    """Summary of token counts."""
    return Lengths(
        mean=float(np.mean(counts)),
        p50=int(np.percentile(counts, 50)),
        p95=int(np.percentile(counts, 95)),
        max=max(counts),
    )


def union_points(log: list[tuple[list[int], np.ndarray]]) -> list[UnionPoint]:
    """Distinct experts per layer over groups of requests and consecutive tokens, from logged routing.

    log: per window (rows of each request, expert_index (n_expert_layers, rows, n_active)).
    """
    points = []
    for n_requests in UNION_REQUESTS:
        for n_tokens in UNION_TOKENS:
            seen = [d for counts, index in log for d in _distinct(counts, index, n_requests, n_tokens)]
            if len(seen) >= 4:
                points.append(UnionPoint(requests=n_requests, tokens=n_tokens, distinct=float(np.mean(seen))))
    return points


def _distinct(counts: list[int], index: np.ndarray, n_requests: int, n_tokens: int) -> list[float]:
    starts = np.concatenate([[0], np.cumsum(counts)])
    firsts = [int(s) for s, c in zip(starts, counts, strict=False) if c >= n_tokens]
    result = []
    for group in range(len(firsts) // n_requests):
        members = firsts[group * n_requests : (group + 1) * n_requests]
        rows = np.concatenate([np.arange(first, first + n_tokens) for first in members])
        chosen = np.sort(index[:, rows].reshape(len(index), -1), axis=1)
        result.append(float(1 + (np.diff(chosen, axis=1) > 0).sum(axis=1).mean()))
    return result


def observe(
    target: PackedModel,
    drafts: Mapping[DrafterName, PackedModel | EagleHead | None],
    requests: list[Request],
    threads: PlanThreads,
    batch: int,
    n_resident: int,
    name: str,
    progress: Callable[[float], None] = lambda share: None,
) -> Workload:
    """Run the requests once per drafter, given with its weights if it has any, with long drafts and count. `n_resident`
    experts are held in memory."""
    spec = target.spec
    context = max(len(r.prompt) + r.max_tokens for r in requests)
    if context > spec.max_positions:
        raise BadInput(f"a prompt and its answer take {context} tokens; this model has {spec.max_positions} positions.")
    acceptance: dict[str, Acceptance] = {}
    chosen = np.zeros((spec.n_expert_layers, spec.n_experts))
    log: list[tuple[list[int], np.ndarray]] = []
    n_tokens, output_lengths = 0, [1]
    experts = observing_experts(spec, n_resident)
    for turn, (drafter, draft) in enumerate(drafts.items()):
        decode = PlanDecode(
            drafter=drafter,
            draft_length=0 if drafter == "none" else LONGEST_DRAFT,
            batch=batch,
            micro_batches=1,
            context_tokens=context,
            prefill_chunk_tokens=512,
        )
        counter = AcceptanceCounter(of_text=drafter == "model")
        with Engine(target, draft, decode, experts, threads) as engine:
            engine.submit(replace(r, sampling=GREEDY) for r in requests)
            total = sum(r.max_tokens for r in requests)
            done = 0
            routing = engine.log_routing()
            for window in engine.run():
                counter.see([*engine.live, *engine.finished])
                done += window.tokens
                progress((turn + done / total) / len(drafts))
                if window.prefill_rows == 0:
                    n_tokens += window.rows
                    index = np.stack(routing)
                    log.append((engine.last_counts, index))
                    for of_layer, numbers in zip(chosen, index, strict=True):
                        of_layer += np.bincount(numbers.ravel(), minlength=spec.n_experts)
                routing.clear()
            output_lengths = [s.n_output for s in engine.finished]
        if drafter != "none":
            acceptance[drafter] = counter.acceptance(f"measured here, experts in {spec.packed_format}")
    popularity = chosen / max(n_tokens, 1)
    union = union_points(log)
    return Workload(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model_name=spec.name,
        model_fingerprint=spec.fingerprint,
        draft_fingerprint=model.spec.fingerprint if (model := drafts.get("model")) else None,
        n_requests=len(requests),
        prompt_tokens=lengths([len(r.prompt) for r in requests]),
        output_tokens=lengths(output_lengths),
        acceptance=acceptance,
        popularity=((0.0,) * spec.n_experts,) * spec.n_dense_layers + tuple(map(tuple, popularity.tolist())),
        union_exponent=fit_union_exponent(popularity, [(p.requests, p.tokens, p.distinct) for p in union]),
        union=tuple(union),
        n_tokens_measured=n_tokens,
    )
