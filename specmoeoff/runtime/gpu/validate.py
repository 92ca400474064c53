"""Checks a plan on the machine with a GPU it was made for: is the output unchanged, is it as fast and as large as predicted?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Any

import numpy as np

from specmoeoff import __version__
from specmoeoff.errors import AnswerIsNo, BadInput
from specmoeoff.estimate.gpu_choices import Choices, make_problem
from specmoeoff.estimate.gpu_window import GpuEstimator
from specmoeoff.estimate.rates import rates_of
from specmoeoff.files import sha256_text
from specmoeoff.pipeline import GpuWindow, gpu_window_graph
from specmoeoff.roofline.profile import machine
from specmoeoff.runtime.checks import check, lossless
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.gpu.device import Device
from specmoeoff.runtime.loading import Opened
from specmoeoff.runtime.process import peak_rss_bytes
from specmoeoff.runtime.sampling import GREEDY
from specmoeoff.runtime.sequence import Request
from specmoeoff.specs.plan import PlainPlan, Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import Check, Comparison, NodeTime, RunRecord, Window
from specmoeoff.specs.workload import Workload

WINDOW_ERROR = 0.15
ANSWER_TOKENS = 64
Progress = Any  # (what, share of it that is done) -> None


@dataclass(frozen=True)
class Ran:
    """A part of the plan that was run over all requests."""

    part: PlainPlan
    outputs: dict[str, list[int]]
    windows: list[Window]
    memory_bytes: int

    @property
    def steady(self) -> list[Window]:
        """Windows of as many requests as ever decoded at once, but for the first of them."""
        decoding = [w for w in self.windows if not w.prefill_rows]
        most = max((w.live for w in decoding), default=0)
        return [w for w in decoding if w.live == most][1:]

    @property
    def tokens_per_s(self) -> float:
        """Of the steady windows."""
        return sum(w.tokens for w in self.steady) / sum(w.duration_s for w in self.steady)


class GpuValidator:
    """One validation; `run` tells all. Tuned and plain run one after the other, since GPU memory holds one of them."""

    def __init__(
        self,
        plan: Plan,
        opened: Opened,
        profile: HardwareProfile,
        workload: Workload,
        requests: Sequence[Request],
        progress: Progress = lambda what, share: None,
        device: Device | None = None,
    ) -> None:
        self.plan, self.opened, self.profile, self.workload = plan, opened, profile, workload
        self.requests = [replace(r, sampling=GREEDY, max_tokens=min(r.max_tokens, ANSWER_TOKENS)) for r in requests]
        self.progress, self.device = progress, device
        self.checks: list[Check] = []

    def run(self) -> RunRecord:
        """All questions. Raises BadInput where no window was steady."""
        begun, plan = datetime.now(UTC), self.plan
        tuned, plain = (self._ran(name, part) for name, part in (("tuned", plan.tuned), ("plain", plan.plain)))
        self.checks.append(lossless(plain.outputs, tuned.outputs))
        self._memory(tuned)
        comparisons, nodes = [], []
        for name, ran in (("tuned", tuned), ("plain", plain)):
            comparison, of_kinds = self._against_prediction(name, ran)
            comparisons.append(comparison)
            nodes += of_kinds
        comparisons.append(self._speed_up(plain, tuned))
        now, windows = datetime.now(UTC), [*tuned.windows, *plain.windows]
        return RunRecord(
            kind="validate",
            created=now.isoformat(timespec="seconds"),
            tool_version=__version__,
            plan_sha256=sha256_text(plan.text()),
            model_name=plan.model.name,
            machine_fingerprint=machine().fingerprint,
            n_requests=len(self.requests),
            n_tokens=sum(map(len, tuned.outputs.values())),
            duration_s=(now - begun).total_seconds(),
            disk_bytes_planned=0,
            disk_bytes_read=0,
            rss_planned_bytes=sum(plan.memory.host.values()),
            rss_peak_bytes=peak_rss_bytes(),
            lossless=self.checks[0].passed,
            windows=tuple(windows),
            checks=tuple(self.checks),
            comparisons=tuple(comparisons),
            nodes=tuple(nodes),
        )

    def _ran(self, name: str, part: PlainPlan) -> Ran:
        opened, windows, done = self.opened, [], 0
        total = sum(r.max_tokens for r in self.requests)
        draft = opened.draft if part.decode.draft_length else None
        with Engine(
            opened.target, draft, part.decode, part.experts, part.threads, gpu=part.gpu, device=self.device
        ) as engine:
            engine.submit(self.requests)
            for window in engine.run(name):
                windows.append(window)
                done += window.tokens
                self.progress(f"running the {name} plan", done / total)
            ran = Ran(part, {s.request.request_id: s.output for s in engine.finished}, windows, engine.device_bytes)
        if not ran.steady:
            raise BadInput(
                f"no two windows of the {name} plan had as many requests decoding; give more or longer prompts."
            )
        return ran

    def _check(self, name: str, passed: bool, detail: str, cause: str) -> None:
        self.checks.append(check(name, passed, detail, cause))

    def _memory(self, tuned: Ran) -> None:
        purposes, taken = tuned.part.memory.fast, tuned.memory_bytes
        planned, margin = sum(purposes.values()), purposes.get("margin", 0)
        self._check(
            "GPU memory",
            taken <= planned,
            f"{taken:,} bytes of GPU memory taken, planned {planned - margin:,} ({taken / (planned - margin) - 1:+.1%}) and "
            f"a margin of {margin:,}",
            f"the plan understates GPU memory by {taken - planned:,} bytes: make it anew with `tune`",
        )

    def _against_prediction(self, name: str, ran: Ran) -> tuple[Comparison, list[NodeTime]]:
        windows, k = ran.steady, ran.part.decode.draft_length
        context = np.array([fmean(w.mean_context for w in windows)])
        estimator, choice = self._estimator(ran)
        predicted, measured = float(estimator.window_s(choice, context)[0]), median(w.duration_s for w in windows)
        comparison = Comparison(
            name=f"{name} window",
            predicted=predicted,
            measured=measured,
            unit="s",
            provenance="predicted, stored profile",
            limit=WINDOW_ERROR,
        )
        self._check(
            f"prediction: {name} window",
            abs(comparison.error) <= WINDOW_ERROR,
            f"predicted {predicted * 1e3:.1f} ms, measured {measured * 1e3:.1f} ms ({comparison.error:+.1%})",
            f"{name}: the prediction is {comparison.error:+.0%} off: tune again with --calibrate and this record",
        )
        prices, counts = estimator.prices(choice, context), self._counts(ran.part, choice)
        kinds = {kind: fmean(w.phases_s.get(kind, 0.0) for w in windows) / n for kind, n in counts.items()}
        return comparison, [
            NodeTime(kind=kind, draft_length=k, predicted_s=float(prices[kind][0]), measured_s=seconds)
            for kind, seconds in kinds.items()
            if seconds > 0 and prices[kind][0] > 0
        ]

    def _estimator(self, ran: Ran) -> tuple[GpuEstimator, Choices]:
        """Prices of the part as it ran: with the requests that decoded, and the tokens that they kept."""
        decode, experts, gpu, windows = ran.part.decode, ran.part.experts, ran.part.gpu, ran.steady
        draft = self.opened.draft.spec if decode.drafter in ("model", "eagle") and self.opened.draft else None
        longest = max(1, decode.draft_length)
        spec = self.opened.target.spec
        problem = make_problem(spec, self.workload, decode.context_tokens, longest, draft, decode.drafter)
        drafts = [d for d in problem.drafts if (d.drafter, d.length) == (decode.drafter, decode.draft_length)]
        if not drafts:
            raise AnswerIsNo(
                f"the workload has no acceptance of {decode.drafter}; measure one with `specmoeoff workload`."
            )
        kept = fmean(w.tokens / w.live for w in windows)
        problem = replace(problem, drafts=(drafts[0]._replace(tokens_per_round=kept),))
        values = {
            "draft": 0,
            "micro_batches": decode.micro_batches,
            "on_demand": not any(experts.prefetch),
            "resident": round(fmean(map(len, experts.resident))),
            "on_host": round(fmean(map(len, experts.on_host or [()]))),
            "kv_share": gpu.kv_share if gpu else 0.0,
            "draft_kv_share": gpu.draft_kv_share if gpu else 0.0,
            "batch": float(windows[0].live),
        }
        estimator = GpuEstimator(problem, rates_of(self.profile))
        return estimator, Choices(**{name: np.array([value]) for name, value in values.items()})

    def _counts(self, part: PlainPlan, choice: Choices) -> Counter[str]:
        """Nodes of each kind in a window, drafting apart: a draft model has lanes of its own, which nobody times."""
        on_host = bool(choice.on_host[0])
        shape = GpuWindow(part.decode.micro_batches, 0, False, on_host, bool(choice.on_demand[0]))
        graph = gpu_window_graph(shape, self.opened.target.spec.n_layers, 2)
        return Counter(node.kind for node in graph.nodes if node.window == 1)

    def _speed_up(self, plain: Ran, tuned: Ran) -> Comparison:
        """Told with both rates; the answer is no where drafting is slower than not."""
        measured = tuned.tokens_per_s / plain.tokens_per_s
        predicted = tuned.part.predicted.tokens_per_s / plain.part.predicted.tokens_per_s
        self._check(
            "tuned is faster",
            tuned.part == plain.part or measured >= 1,
            f"plain {plain.tokens_per_s:.1f} tokens/s, then tuned {tuned.tokens_per_s:.1f} tokens/s: {measured:.2f}x, predicted "
            f"{predicted:.2f}x; one after the other, so that the machine may have changed between",
            f"plain decoding is {1 / measured:.2f}x as fast: tune again with --calibrate and this record, or with --measure",
        )
        return Comparison(
            name="tuned over plain", predicted=predicted, measured=measured, unit="x", provenance="the plan"
        )
