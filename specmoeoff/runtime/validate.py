"""Asks whether a plan's promises hold: same output, predicted time, planned memory, planned bytes. Names the cause if not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from statistics import fmean, median

import numpy as np

from specmoeoff import __version__
from specmoeoff.estimate.costs import Calibration, Prices
from specmoeoff.estimate.memory import expert_stride
from specmoeoff.estimate.predict import Forecast, forecast
from specmoeoff.estimate.tables import thread_counts
from specmoeoff.files import sha256_text
from specmoeoff.pipeline import Node
from specmoeoff.roofline.profile import machine
from specmoeoff.roofline.recalibrate import Recalibration, recalibrate
from specmoeoff.roofline.timing import paired_ratios
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import Opened
from specmoeoff.runtime.process import available_bytes, disk_bytes_read, peak_rss_bytes
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.verify import accept
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import PlainPlan, Plan, PlanExperts
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import (
    Check,
    Comparison,
    Pair,
    RunRecord,
    SpeedUp,
    SweepPoint,
    TimelineEvent,
    Window,
)
from specmoeoff.specs.workload import Workload

WINDOW_ERROR, DISK_ERROR, RSS_ERROR, BYTES_ERROR = 0.15, 0.15, 0.10, 0.02
LOSSLESS_TOKENS = 64
SWEEP_LENGTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Options:
    """How long to look. Windows per block exclude the first, which fills the pipeline."""

    n_pairs: int = 6
    block_windows: int = 10
    uncapped_block_windows: int = 5
    sweep_windows: int = 2
    accept: Callable[[list[int], list[int]], int] = accept
    progress: Callable[[str, float], None] = field(default=lambda what, share: None)


def tuned_part(plan: Plan) -> PlainPlan:
    """The tuned settings in the shape of the plain ones."""
    return PlainPlan(
        decode=plan.decode, experts=plan.experts, threads=plan.threads, memory=plan.memory, predicted=plan.predicted
    )


class Validator:
    """One validation; `record` tells all."""

    def __init__(
        self,
        plan: Plan,
        opened: Opened,
        profile: HardwareProfile,
        workload: Workload,
        requests: Sequence[Request],
        options: Options,
    ) -> None:
        self.plan, self.opened, self.profile, self.workload = plan, opened, profile, workload
        self.requests, self.options = list(requests), options
        self.tuned, self.plain = tuned_part(plan), plan.plain
        self.spec = opened.target.spec
        self.draft_spec = opened.draft.spec if opened.draft else None
        self.limit = plan.limits.disk_limit_gb_per_s
        self.checks: list[Check] = []
        self.comparisons: list[Comparison] = []
        self.windows: list[Window] = []
        self.speed_ups: list[SpeedUp] = []
        self.sweep: list[SweepPoint] = []
        self.measured_events: tuple[TimelineEvent, ...] = ()
        self.predicted_events: tuple[TimelineEvent, ...] = ()
        self.disk_seen: list[float] = []
        self.lossless: bool | None = None
        self.bytes_planned = self.bytes_read = self.rss_bytes = self.n_tokens = 0

    def run(self) -> RunRecord:
        """All questions, cheapest first; damaged experts end it early, since everything after would be about them."""
        begun = datetime.now(UTC)
        if self._experts_intact():
            tuned_output = self._run_as_planned()
            self._run_resident(tuned_output)
            self._run_pairs()
            self._profile_disk()
        now = datetime.now(UTC)
        return RunRecord(
            kind="validate",
            created=now.isoformat(timespec="seconds"),
            tool_version=__version__,
            plan_sha256=sha256_text(self.plan.text()),
            model_name=self.spec.name,
            machine_fingerprint=machine().fingerprint,
            n_requests=len(self.requests),
            n_tokens=self.n_tokens,
            duration_s=(now - begun).total_seconds(),
            disk_bytes_planned=self.bytes_planned,
            disk_bytes_read=self.bytes_read,
            rss_planned_bytes=self.plan.memory.rss_bytes,
            rss_peak_bytes=self.rss_bytes,
            lossless=self.lossless,
            windows=tuple(self.windows),
            checks=tuple(self.checks),
            comparisons=tuple(self.comparisons),
            speed_ups=tuple(self.speed_ups),
            sweep=tuple(self.sweep),
            timeline_measured=self.measured_events,
            timeline_predicted=self.predicted_events,
        )

    # ---- the questions ----------------------------------------------------------------------------------------------

    def _check(self, name: str, passed: bool, detail: str, cause: str) -> None:
        self.checks.append(Check(name=name, passed=passed, detail=detail, cause="" if passed else cause))

    def _experts_intact(self) -> bool:
        damaged = self.opened.target.damaged_experts(lambda what, i, n: self.options.progress(what, i / n))
        where = ", ".join(f"layer {layer} expert {expert}" for layer, expert in damaged[:3])
        detail = f"{self.spec.n_all_experts - len(damaged)} of {self.spec.n_all_experts} experts as packed"
        folder = self.opened.target.folder
        cause = f"expert bytes on disk changed since packing ({where}): delete {folder} and it will be packed anew"
        self._check("experts intact", not damaged, detail, cause)
        return not damaged

    def _recalibrate(self) -> Recalibration:
        self.options.progress("recalibrating", 0.0)
        threads, path = self.tuned.threads.compute, self.opened.target.expert_path
        result = recalibrate(self.profile, self.spec, threads, path, 2.0)
        self.disk_seen += result.disk_samples_gb_per_s
        return result

    def _run_as_planned(self) -> dict[str, list[int]]:
        """The plan itself over the requests: its output, its memory, its bytes."""
        requests = [replace(r, max_tokens=min(r.max_tokens, LOSSLESS_TOKENS)) for r in self.requests]
        total = sum(r.max_tokens for r in requests)
        before, done = disk_bytes_read(), 0
        with self._engine(self.tuned, self.tuned) as engine:
            loaded = disk_bytes_read() - before - engine.store.bytes_planned
            engine.accept = self.options.accept
            engine.submit(requests)
            for window in engine.run("as planned"):
                self.windows.append(window)
                done += window.tokens
                self.options.progress("running the plan", done / total)
            output = {s.request.request_id: s.output for s in engine.finished}
            self.rss_bytes = peak_rss_bytes()
            self.bytes_planned = engine.store.bytes_planned
        self.bytes_read = disk_bytes_read() - before - loaded
        self.n_tokens = sum(map(len, output.values()))
        planned = self.plan.memory.rss_bytes
        ratio = self.rss_bytes / planned
        self._check(
            "memory",
            abs(ratio - 1) <= RSS_ERROR,
            f"peak RSS {self.rss_bytes:,} bytes, planned {planned:,} ({ratio - 1:+.1%})",
            f"the plan {'understates' if ratio > 1 else 'overstates'} memory by {abs(1 - 1 / ratio):.0%}: make it anew with `tune`",
        )
        share = self.bytes_read / self.bytes_planned if self.bytes_planned else 1.0
        self._check(
            "disk bytes",
            abs(share - 1) <= BYTES_ERROR,
            f"the kernel counted {self.bytes_read:,} bytes read, the run asked for {self.bytes_planned:,} ({share - 1:+.2%})",
            "reads did not go to the disk as planned: the page cache or another reader is in between",
        )
        return output

    def _run_resident(self, tuned_output: dict[str, list[int]]) -> None:
        """Plain decoding with every expert in memory: the reference output, and windows that only compute bounds."""
        everything = self._everything()
        plain, tuned = self._resident(self.plain, everything), self._resident(self.tuned, everything)
        if everything is None:
            plain, tuned = self.plain, self.tuned
        requests = [replace(r, max_tokens=min(r.max_tokens, LOSSLESS_TOKENS)) for r in self.requests]
        with self._engine(plain, tuned) as engine:
            engine.submit(requests)
            total, done = sum(r.max_tokens for r in requests), 0
            for window in engine.run("plain, all resident"):
                done += window.tokens
                self.windows.append(window)
                self.options.progress("plain decoding", done / total)
            plain_output = {s.request.request_id: s.output for s in engine.finished}
            self._compare_outputs(plain_output, tuned_output)
            if everything is not None:
                self._warm(engine, extra_tokens=0)
                self.calibration = self._recalibrate()
                for name, part in (("plain", plain), ("tuned", tuned)):
                    windows = self._block(engine, part, f"{name}, all resident", self._fitting(engine, part))
                    self._compare_window(f"{name} window, all experts resident", part, windows, None)

    def _run_pairs(self) -> None:
        """Plain and tuned in turn, at the plan's disk limit and without one; then the other draft lengths."""
        o = self.options
        k = self.tuned.decode.draft_length
        extra = 64 + (o.n_pairs * (o.block_windows + 1) + len(SWEEP_LENGTHS) * (o.sweep_windows + 1)) * (k + 2)
        with self._engine(self.plain, self.tuned, extra_tokens=extra) as engine:
            self._warm(engine, extra)
            self.calibration = self._recalibrate()
            self._speed_up(engine, self.limit, o.block_windows)
            self._sweep(engine)
            if self.limit is not None:
                engine.cancel_all()
                self._warm(engine, extra)
                engine.store.bucket.gb_per_s = None
                self._speed_up(engine, None, o.uncapped_block_windows)

    def _profile_disk(self) -> None:
        """Whether the stored profile's disk is a speed this disk was seen to have."""
        disk = self.profile.disk
        if disk is None:
            return
        stored, fastest, slowest = disk.read_gb_per_s.value, max(self.disk_seen), min(self.disk_seen)
        detail = f"profile {stored:.2f} GB/s, seen now {slowest:.2f} to {fastest:.2f} GB/s"
        too_fast, too_slow = stored / fastest, slowest / stored
        cause = (
            f"the profile's disk is {too_fast:.1f}x too fast"
            if too_fast > 1
            else f"the profile's disk is {too_slow:.1f}x too slow"
        )
        passed = too_fast <= 1 + DISK_ERROR and too_slow <= 1 + DISK_ERROR
        self._check("profile's disk", passed, detail, f"{cause} ({detail}): profile the machine again")

    # ---- how ----------------------------------------------------------------------------------------------------------

    def _engine(self, first: PlainPlan, second: PlainPlan, extra_tokens: int = 0) -> Engine:
        """An engine that can be configured as either part, running the first."""
        k = max(first.decode.draft_length, second.decode.draft_length)
        if extra_tokens:
            k = max(k, *SWEEP_LENGTHS)
        context = min(first.decode.context_tokens + extra_tokens, self.spec.max_positions)
        widest = first.decode.model_copy(update={"draft_length": k, "context_tokens": context, "drafter": "none"})
        slots = max(p.experts.n_resident + p.experts.stream_slots for p in (first, second))
        if first is second:
            widest = first.decode
        engine = Engine(self.opened.target, self.opened.draft, widest, first.experts, first.threads, self.limit, slots)
        if first is not second:
            self._configure(engine, first)
        return engine

    @staticmethod
    def _configure(engine: Engine, part: PlainPlan) -> None:
        context = engine.decode.context_tokens
        engine.configure(part.decode.model_copy(update={"context_tokens": context}), part.experts)

    def _warm(self, engine: Engine, extra_tokens: int) -> None:
        """All places decoding, end of sequence ignored, with room for `extra_tokens` more (0: all the context has)."""
        context = engine.decode.context_tokens
        batch = self.tuned.decode.batch
        chosen = sorted(self.requests, key=lambda r: len(r.prompt))[: max(1, len(self.requests) * 3 // 4)]
        chosen = [chosen[i % len(chosen)] for i in np.linspace(0, len(chosen) - 1, batch).round().astype(int)]
        engine.submit(Request(f"live {i}", r.prompt, context - len(r.prompt), ()) for i, r in enumerate(chosen[:batch]))
        self._configure(engine, self.plain)
        while True:
            engine.step("warm-up")
            if not any(s.prefilling for s in engine.live) and len(engine.live) == batch:
                return

    def _fitting(self, engine: Engine, part: PlainPlan) -> int:
        """How many windows of a part are sure not to end a request, at most a block's."""
        left = min(s.n_remaining for s in engine.live)
        return max(1, min(self.options.block_windows, left // (2 * (part.decode.draft_length + 1)) - 1))

    def _block(self, engine: Engine, part: PlainPlan, label: str, n_windows: int) -> list[Window]:
        self._configure(engine, part)
        engine.step("warm-up")
        windows = [engine.step(label) for _ in range(n_windows)]
        self.windows += windows
        return windows

    def _everything(self) -> PlanExperts | None:
        """Every expert resident, if the machine's memory allows it."""
        n, per_layer = self.spec.n_all_experts, tuple(range(self.spec.n_experts))
        if n * expert_stride(self.spec) > 0.7 * available_bytes():
            return None
        layers = self.spec.n_layers
        return PlanExperts(resident=(per_layer,) * layers, prefetch=((),) * layers, stream_slots=0)

    def _resident(self, part: PlainPlan, everything: PlanExperts | None) -> PlainPlan:
        return part if everything is None else part.model_copy(update={"experts": everything})

    def _compare_outputs(self, plain: dict[str, list[int]], tuned: dict[str, list[int]]) -> None:
        different = [i for i in plain if plain[i] != tuned.get(i)]
        self.lossless = not different
        n_tokens = sum(map(len, plain.values()))
        cause = ""
        if different:
            first = different[0]
            at = next((i for i, (a, b) in enumerate(zip(plain[first], tuned[first], strict=False)) if a != b), 0)
            cause = (
                f"{len(different)} requests differ from plain decoding, {first!r} first, at token {at}: verification "
                "accepts tokens the target did not choose"
            )
        detail = f"{len(plain) - len(different)} of {len(plain)} requests, {n_tokens} tokens equal to plain decoding"
        self._check("lossless", not different, detail, cause)

    def _forecast(
        self, part: PlainPlan, windows: Sequence[Window], limit: float | None, recalibrated: bool
    ) -> Forecast:
        calibration = None
        if recalibrated:
            calibration = Calibration(self.calibration.disk_gb_per_s, self.calibration.compute_scale)
        known = thread_counts(self.profile, self.spec.shape_key)
        threads = part.threads.compute if part.threads.compute in known else known[0]
        prices = Prices(self.profile, self.spec, self.draft_spec, threads, limit, calibration)
        contexts = [int(fmean(w.mean_context for w in windows))] * windows[0].live
        return forecast(self.spec, self.workload, part.decode, part.experts, prices, contexts)

    def _compare_window(self, name: str, part: PlainPlan, windows: Sequence[Window], limit: float | None) -> Forecast:
        """Predicted against measured window time, recalibrated (judged) and from the stored profile (told)."""
        measured = median(w.duration_s for w in windows)
        stored = self._forecast(part, windows, limit, recalibrated=False)
        now = self._forecast(part, windows, limit, recalibrated=True)
        for which, provenance in ((now, "predicted, recalibrated"), (stored, "predicted, stored profile")):
            self.comparisons.append(
                Comparison(
                    name=name,
                    predicted=which.prediction.window_s,
                    measured=measured,
                    unit="s",
                    provenance=provenance,
                    limit=WINDOW_ERROR if which is now else None,
                )
            )
        comparison = self.comparisons[-2]
        bound = now.prediction.bound
        self._check(
            f"prediction: {name}",
            abs(comparison.error) <= WINDOW_ERROR,
            f"predicted {comparison.predicted * 1e3:.1f} ms, measured {measured * 1e3:.1f} ms ({comparison.error:+.1%}), "
            f"stored profile {self.comparisons[-1].error:+.1%}, {bound}-bound",
            f"{name}: the prediction is {comparison.error:+.0%} off on the {bound} lane: profile the machine again",
        )
        return now

    def _speed_up(self, engine: Engine, limit: float | None, n_windows: int) -> None:
        label = f"disk capped at {limit:g} GB/s" if limit else "disk uncapped"
        blocks: dict[str, list[list[Window]]] = {"plain": [], "tuned": []}
        timelines: list[tuple[float, tuple[TimelineEvent, ...]]] = []
        for i in range(self.options.n_pairs):
            self.options.progress(f"plain against tuned, {label}", i / self.options.n_pairs)
            order = ("plain", "tuned") if i % 2 == 0 else ("tuned", "plain")
            for name in order:
                part = self.plain if name == "plain" else self.tuned
                blocks[name].append(self._block(engine, part, f"{name}, {label}", n_windows))
                if name == "tuned" and limit == self.limit:
                    timelines.append((blocks[name][-1][-1].duration_s, _events(engine)))
        rates = {name: [_rate(b) for b in each] for name, each in blocks.items()}
        disks = {name: [_disk_rate(b) for b in each] for name, each in blocks.items()}
        middle, low, high, confidence = paired_ratios(rates["tuned"], rates["plain"])
        bound, reason = self._bound(blocks, limit)
        self.speed_ups.append(
            SpeedUp(
                label=label,
                disk_limit_gb_per_s=limit,
                pairs=tuple(
                    Pair(plain_tokens_per_s=p, tuned_tokens_per_s=t, plain_disk_gb_per_s=dp, tuned_disk_gb_per_s=dt)
                    for p, t, dp, dt in zip(rates["plain"], rates["tuned"], disks["plain"], disks["tuned"], strict=True)
                ),
                median=middle,
                low=low,
                high=high,
                confidence=confidence,
                limit=bound,
                limit_reason=reason,
            )
        )
        if limit == self.limit:
            for name, part in (("plain", self.plain), ("tuned", self.tuned)):
                windows = [w for block in blocks[name] for w in block]
                now = self._compare_window(f"{name} window, {label}", part, windows, limit)
                if name == "tuned":
                    typical = median(w.duration_s for w in windows)
                    self.measured_events = min(timelines, key=lambda t: abs(t[0] - typical))[1]
                    self.predicted_events = _predicted_events(now)
            self._plain_near_bound([w for block in blocks["plain"] for w in block], disks["plain"])

    def _bound(self, blocks: dict[str, list[list[Window]]], limit: float | None) -> tuple[float, str]:
        """Speed-up if both ran at the limit of their own bytes, FLOPs and acceptance."""
        disk = max(self.disk_seen) if limit is None else limit
        peak = self.profile.peak("bf16_dot", self.tuned.threads.compute) or 0.0
        seconds, tokens = {}, {}
        for name, each in blocks.items():
            windows = [w for block in each for w in block]
            disk_s = fmean(w.disk_bytes for w in windows) / (disk * 1e9)
            flops = fmean(w.rows for w in windows) * _flops_per_row(self.spec)
            if name == "tuned" and self.draft_spec is not None:
                live, k = windows[0].live, self.tuned.decode.draft_length
                flops += live * k * _flops_per_row(self.draft_spec)
            seconds[name] = max(disk_s, flops / (peak * 1e9) if peak else 0.0)
            tokens[name] = fmean(w.tokens for w in windows)
        bound = (tokens["tuned"] / seconds["tuned"]) / (tokens["plain"] / seconds["plain"])
        reason = f"this run's bytes at {disk:.2f} GB/s, FLOPs at {peak:.0f} GFLOP/s, and tokens per round"
        return bound, reason

    def _plain_near_bound(self, windows: list[Window], disks: list[float]) -> None:
        measured = median(w.duration_s for w in windows)
        disk_s = median(w.disk_bytes for w in windows) / (max(disks) * 1e9)
        cpu_s = median(w.busy_s["cpu"] for w in windows)
        bound = max(disk_s, cpu_s)
        self.comparisons.append(
            Comparison(
                name="plain window against its own bound (bytes at the disk's rate, or compute)",
                predicted=bound,
                measured=measured,
                unit="s",
                provenance="measured here",
            )
        )
        self._check(
            "plain decoding is a fair baseline",
            measured <= 1.1 * bound,
            f"window {measured * 1e3:.1f} ms, its own bound {bound * 1e3:.1f} ms ({measured / bound - 1:+.1%})",
            "the baseline waits for neither disk nor compute more than 10 % of its time: tune again",
        )

    def _sweep(self, engine: Engine) -> None:
        """Measured throughput at other draft lengths under the tuned placement."""
        if self.tuned.decode.drafter == "none":
            return
        for i, k in enumerate(SWEEP_LENGTHS):
            self.options.progress("other draft lengths", i / len(SWEEP_LENGTHS))
            decode = self.tuned.decode.model_copy(update={"draft_length": k})
            part = self.tuned.model_copy(update={"decode": decode})
            if min(s.n_remaining for s in engine.live) <= (k + 1) * (self.options.sweep_windows + 2):
                return
            windows = self._block(engine, part, f"draft length {k}", self.options.sweep_windows)
            names = {name for w in windows for name in w.phases_s}
            self.sweep.append(
                SweepPoint(
                    draft_length=k,
                    tokens_per_s=_rate(windows),
                    window_s=fmean(w.duration_s for w in windows),
                    tokens_per_round=fmean(w.tokens / w.live for w in windows),
                    phases_s={name: fmean(w.phases_s.get(name, 0.0) for w in windows) for name in sorted(names)},
                )
            )


def _rate(windows: Sequence[Window]) -> float:
    return sum(w.tokens for w in windows) / sum(w.duration_s for w in windows)


def _disk_rate(windows: Sequence[Window]) -> float:
    busy_s = sum(w.busy_s["disk"] for w in windows)
    return sum(w.disk_bytes for w in windows) / busy_s / 1e9 if busy_s > 0 else 0.0


def _flops_per_row(spec: ModelSpec) -> float:
    dense = spec.attention_params * spec.n_layers + spec.vocab * spec.hidden
    return 2.0 * (dense + spec.n_layers * spec.n_active * spec.expert_params)


def _event(node: Node, start_s: float, end_s: float, origin_s: float) -> TimelineEvent:
    return TimelineEvent(
        name=node.name,
        kind=node.kind,
        lane=node.lane,
        layer=node.layer,
        start_s=start_s - origin_s,
        end_s=end_s - origin_s,
    )


def _events(engine: Engine) -> tuple[TimelineEvent, ...]:
    """Of the window last run. Its loads may have begun before it."""
    trace = engine.last_trace
    nodes = trace.builder.graph.nodes
    return tuple(_event(nodes[i], a, b, trace.start_s) for i, (a, b) in sorted(trace.times.items()))


def _predicted_events(forecast_: Forecast) -> tuple[TimelineEvent, ...]:
    """Of the last simulated window, on the measured window's clock."""
    schedule = forecast_.schedule
    ends = schedule.graph.ends
    origin = schedule.end_s[ends[-2]]
    return tuple(
        _event(n, schedule.start_s[n.index], schedule.end_s[n.index], origin)
        for n in schedule.graph.nodes
        if n.window == schedule.n_windows - 1 and schedule.end_s[n.index] > schedule.start_s[n.index]
    )
