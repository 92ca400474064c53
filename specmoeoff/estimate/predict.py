"""From settings to a predicted window: the graph of expected work, priced and simulated."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.estimate.costs import NODE_GAP_S, Prices
from specmoeoff.estimate.experts import probability_used
from specmoeoff.estimate.simulate import Schedule, simulate
from specmoeoff.estimate.speculation import all_accepted, expected_tokens
from specmoeoff.pipeline import ExpertUse, RequestTokens, WindowShape, window_graph
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import PlanDecode, PlanExperts, Prediction
from specmoeoff.specs.workload import Workload

STEADY_WINDOWS = 3


@dataclass(frozen=True)
class Forecast:
    """A prediction and the schedule it came from."""

    prediction: Prediction
    schedule: Schedule


def tokens_per_round(workload: Workload, decode: PlanDecode) -> float:
    """Expected tokens a request gains per window."""
    if decode.draft_length == 0 or decode.drafter == "none":
        return 1.0
    if decode.drafter not in workload.acceptance:
        raise BadInput(f"workload {workload.name}: acceptance of drafter {decode.drafter!r} was not measured.")
    known = workload.acceptance[decode.drafter]
    return expected_tokens(known.conditional, decode.draft_length, known.of_text)


def expert_uses(
    spec: ModelSpec, workload: Workload, experts: PlanExperts, n_requests: int, n_tokens: float
) -> tuple[tuple[ExpertUse, ...], ...]:
    """By layer, what is expected of each expert in a window of n_requests times n_tokens."""
    popularity = np.asarray(workload.popularity)
    used = probability_used(popularity, n_requests, n_tokens, workload.union_exponent)
    rows = n_requests * n_tokens * popularity
    layers = []
    for layer in range(spec.n_layers):
        resident, prefetch = set(experts.resident[layer]), experts.prefetch[layer]
        others = [e for e in range(spec.n_experts_of(layer)) if e not in resident and e not in prefetch]
        order = [*((e, "resident") for e in sorted(resident)), *((e, "prefetch") for e in prefetch)]
        order += [(e, "demand") for e in others]
        layers.append(
            tuple(
                ExpertUse(e, source, float(max(1.0, rows[layer, e] / used[layer, e])), float(used[layer, e]))  # type: ignore[arg-type]
                for e, source in order
                if used[layer, e] > 1e-6
            )
        )
    return tuple(layers)


def window_shape(
    spec: ModelSpec,
    workload: Workload,
    decode: PlanDecode,
    experts: PlanExperts,
    contexts: Sequence[int],
) -> WindowShape:
    """The expected window over live requests at these contexts, all decoding."""
    k, n = decode.draft_length if decode.drafter != "none" else 0, len(contexts)
    drafts: list[tuple[RequestTokens, ...]] = []
    if decode.drafter in ("model", "eagle") and k:
        known = workload.acceptance[decode.drafter]
        # A model lacks its own last token where all were accepted; a head takes all accepted ones again, from true states.
        if decode.drafter == "eagle":
            first = expected_tokens(known.conditional, k, known.of_text)
        else:
            first = 1.0 + all_accepted(known.conditional, k, known.of_text)
        drafts = [tuple(RequestTokens(first if step == 0 else 1.0, c + step) for c in contexts) for step in range(k)]
    parts = np.array_split(np.arange(n), min(decode.micro_batches, n))
    micro_batches = tuple(tuple(RequestTokens(k + 1.0, contexts[i]) for i in part) for part in parts)
    return WindowShape(tuple(drafts), micro_batches, expert_uses(spec, workload, experts, n, k + 1), n * (k + 1.0))


def forecast(
    spec: ModelSpec,
    workload: Workload,
    decode: PlanDecode,
    experts: PlanExperts,
    prices: Prices,
    contexts: Sequence[int],
) -> Forecast:
    """Predict the steady state of windows over these live requests."""
    shape = window_shape(spec, workload, decode, experts, contexts)
    graph = window_graph(shape, experts.stream_slots, STEADY_WINDOWS)
    schedule = simulate(graph, prices.seconds(graph), prices.wake_s, NODE_GAP_S)
    tokens = tokens_per_round(workload, decode)
    busy = schedule.busy_s
    prediction = Prediction(
        window_s=schedule.period_s,
        tokens_per_round=tokens,
        tokens_per_s=len(contexts) * tokens / schedule.period_s,
        busy_s=busy,
        phases_s=schedule.phases_s,
        disk_bytes=schedule.loads * prices.stride,
        bound="disk" if busy["disk"] > busy["cpu"] else "cpu",
        context_tokens=int(np.mean(contexts)),
    )
    return Forecast(prediction, schedule)
