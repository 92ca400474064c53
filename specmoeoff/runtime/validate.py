"""Asks whether a plan's promises hold: same output, predicted time, planned memory, planned bytes. Names the cause if not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import log
from statistics import fmean, median

import numpy as np

from specmoeoff import __version__
from specmoeoff.estimate.calibrate import typical
from specmoeoff.estimate.costs import Calibration, Prices
from specmoeoff.estimate.memory import expert_stride
from specmoeoff.estimate.predict import Forecast, forecast
from specmoeoff.files import sha256_text
from specmoeoff.pipeline import Node
from specmoeoff.roofline.profile import machine
from specmoeoff.roofline.recalibrate import Recalibrator
from specmoeoff.roofline.timing import paired_ratios
from specmoeoff.runtime.checks import check, lossless
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.gpu.validate import GpuValidator
from specmoeoff.runtime.loading import Opened
from specmoeoff.runtime.pack import PackedModel
from specmoeoff.runtime.process import available_bytes, disk_bytes_read, peak_rss_bytes
from specmoeoff.runtime.sampling import GREEDY
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.verify import accept
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import PlainPlan, Plan, PlanExperts
from specmoeoff.specs.profile import HardwareProfile, Measurement
from specmoeoff.specs.record import (
    Check,
    Comparison,
    Pair,
    RunRecord,
    Slice,
    SpeedUp,
    SweepPoint,
    TimelineEvent,
    Window,
)
from specmoeoff.specs.workload import Workload

WINDOW_ERROR, DISK_ERROR, RSS_ERROR, BYTES_ERROR = 0.15, 0.15, 0.10, 0.02
LOSSLESS_TOKENS = 64
SWEEP_LENGTHS = (1, 2, 4, 8)
ANSWERED_TOKENS = (
    32  # requests of a block are up to this far in their answers, evenly: all beginning at once use fewer experts
)


@dataclass(frozen=True)
class Options:
    """How long to look. Windows per block exclude the first, which fills the pipeline."""

    n_pairs: int = 6
    block_windows: int = 9
    uncapped_block_windows: int = 4
    resident_block_windows: int = 3
    sweep_windows: int = 2
    accept: Callable[[list[int], list[int]], int] = accept
    progress: Callable[[str, float], None] = field(default=lambda what, share: None)


@dataclass(frozen=True)
class Block:
    """Windows of one plan run one after the other, the timeline of the last, and the machine's speed before and after."""

    windows: list[Window]
    timeline: tuple[TimelineEvent, ...]
    speed: tuple[Slice, Slice]


Blocks = dict[str, list[Block]]


def validate_plan(
    plan: Plan,
    opened: Opened,
    profile: HardwareProfile,
    workload: Workload,
    requests: Sequence[Request],
    options: Options,
) -> RunRecord:
    """What there is to find, on the kind of machine that the plan is for."""
    if plan.gpu:
        return GpuValidator(plan, opened, profile, workload, requests, options.progress).run()
    return Validator(plan, opened, profile, workload, requests, options).run()


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
        if not isinstance(opened.target, PackedModel):
            raise TypeError("the model is not packed for the CPU")
        self.plan, self.target, self.draft = plan, opened.target, opened.draft
        self.profile, self.workload = profile, workload
        self.requests, self.options = [replace(r, sampling=GREEDY) for r in requests], options
        self.tuned, self.plain = plan.tuned, plan.plain
        self.spec = self.target.spec
        self.draft_spec = self.draft.spec if self.draft else None
        self.limit = plan.limits.disk_limit_gb_per_s
        self.checks: list[Check] = []
        self.comparisons: list[Comparison] = []
        self.windows: list[Window] = []
        self.speed_ups: list[SpeedUp] = []
        self.sweep: list[SweepPoint] = []
        self.measured_events: tuple[TimelineEvent, ...] = ()
        self.predicted_events: tuple[TimelineEvent, ...] = ()
        self.recalibrator: Recalibrator | None = None
        self.answers: dict[str, list[int]] = {}  # known ones, by request
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
            recalibration=tuple(self.recalibrator.slices if self.recalibrator else ()),
            sweep=tuple(self.sweep),
            timeline_measured=self.measured_events,
            timeline_predicted=self.predicted_events,
        )

    # ---- the questions ----------------------------------------------------------------------------------------------

    def _check(self, name: str, passed: bool, detail: str, cause: str) -> None:
        self.checks.append(check(name, passed, detail, cause))

    def _experts_intact(self) -> bool:
        damaged = self.target.damaged_experts(lambda what, i, n: self.options.progress(what, i / n))
        where = ", ".join(f"layer {layer} expert {expert}" for layer, expert in damaged[:3])
        detail = f"{self.spec.n_all_experts - len(damaged)} of {self.spec.n_all_experts} experts as packed"
        folder = self.target.folder
        cause = f"expert bytes on disk changed since packing ({where}): delete {folder} and it will be packed anew"
        self._check("experts intact", not damaged, detail, cause)
        return not damaged

    def _run_as_planned(self) -> dict[str, list[int]]:
        """The plan itself over the requests: its output, its memory, its bytes."""
        requests = [replace(r, max_tokens=min(r.max_tokens, LOSSLESS_TOKENS)) for r in self.requests]
        total = sum(r.max_tokens for r in requests)
        before, done = disk_bytes_read(), 0
        with self._engine({"tuned": self.tuned}) as engine:
            loaded = disk_bytes_read() - before - engine.store.bytes_planned
            engine.accept = self.options.accept
            engine.submit(requests)
            for window in engine.run("as planned"):
                self.windows.append(window)
                done += window.tokens
                self.options.progress("running the plan", done / total)
            output = self.answers = {s.request.request_id: s.output for s in engine.finished}
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
        parts = {"plain": self.plain, "tuned": self.tuned}
        if everything is not None:
            parts = {name: part.model_copy(update={"experts": everything}) for name, part in parts.items()}
        requests = [replace(r, max_tokens=min(r.max_tokens, LOSSLESS_TOKENS)) for r in self.requests]
        with self._engine(parts, room=True) as engine:
            engine.submit(requests)
            total, done = sum(r.max_tokens for r in requests), 0
            for window in engine.run("plain decoding"):
                done += window.tokens
                self.windows.append(window)
                self.options.progress("plain decoding", done / total)
            self._compare_outputs({s.request.request_id: s.output for s in engine.finished}, tuned_output)
            engine.finished.clear()
            if everything is not None:
                self._warm(engine, 0)
                blocks: Blocks = {name: [] for name in parts}
                for i in range(self.options.n_pairs):
                    self.options.progress("all experts resident", i / self.options.n_pairs)
                    self._pair(engine, parts, blocks, i, "all experts resident", self.options.resident_block_windows)
                self._compare_windows(parts, blocks, "all experts resident", None)

    def _run_pairs(self) -> None:
        """Plain and tuned in turn, at the plan's disk limit and without one; then the other draft lengths."""
        o, parts = self.options, {"plain": self.plain, "tuned": self.tuned}
        limits = {self.limit: o.block_windows}
        if self.limit is not None:
            limits[None] = o.uncapped_block_windows
        every: dict[float | None, Blocks] = {limit: {name: [] for name in parts} for limit in limits}
        with self._engine(parts, room=True) as engine:
            for i in range(o.n_pairs):
                engine.store.bucket.gb_per_s = None
                self._warm(engine, i)
                for limit, n_windows in limits.items():
                    o.progress(f"plain against tuned, {_named(limit)}", i / o.n_pairs)
                    engine.store.bucket.gb_per_s = limit
                    self._pair(engine, parts, every[limit], i, _named(limit), n_windows)
            engine.store.bucket.gb_per_s = self.limit
            self._sweep(engine)
        for limit, blocks in every.items():
            self._speed_up(blocks, limit)

    def _profile_disk(self) -> None:
        """Whether the stored profile's disk is the one seen while this ran."""
        if self.profile.disk and self.recalibrator:
            seen = [s.disk_gb_per_s for s in self.recalibrator.slices]
            off, detail = disk_off_by(self.profile.disk.read_gb_per_s, seen)
            way = f"{off:.1f}x too fast" if off > 1 else f"{1 / off:.1f}x too slow"
            cause = f"the profile's disk is {way} ({detail}): profile the machine again"
            self._check("profile's disk", max(off, 1 / off) <= 1 + DISK_ERROR, detail, cause)

    # ---- how ----------------------------------------------------------------------------------------------------------

    def _engine(self, parts: dict[str, PlainPlan], room: bool = False) -> Engine:
        """An engine that can be configured as any of the parts, running the first; `room`: for blocks after a prompt."""
        first = next(iter(parts.values()))
        k = max(p.decode.draft_length for p in parts.values())
        context = first.decode.context_tokens
        if room:
            k, longest = max(k, *SWEEP_LENGTHS), max(len(r.prompt) for r in self.requests) + ANSWERED_TOKENS
            windows = max(self.options.block_windows, self.options.uncapped_block_windows) + 2
            context = min(max(context, longest + windows * (k + 1)), self.spec.max_positions)
        widest = first.decode.model_copy(
            update={"draft_length": k, "context_tokens": context, "drafter": "none", "kv_tokens": None}
        )
        slots = max(p.experts.n_resident + p.experts.stream_slots for p in parts.values())
        if len(parts) == 1:
            widest = first.decode
        engine = Engine(self.target, self.draft, widest, first.experts, first.threads, self.limit, slots)
        if len(parts) > 1:
            self._configure(engine, first)
        return engine

    @staticmethod
    def _configure(engine: Engine, part: PlainPlan) -> None:
        kept = {name: getattr(engine.decode, name) for name in ("context_tokens", "kv_tokens")}
        engine.configure(part.decode.model_copy(update=kept), part.experts)

    def _warm(self, engine: Engine, turn: int) -> None:
        """Every place decoding, end of sequence ignored; each turn takes other prompts where there are more."""
        engine.cancel_all()
        context, batch = engine.decode.context_tokens, self.tuned.decode.batch
        chosen = [self.requests[(turn * batch + i) % len(self.requests)] for i in range(batch)]
        for i, r in enumerate(chosen):
            begun = r.prompt + tuple(self.answers.get(r.request_id, ())[: ANSWERED_TOKENS * i // batch])
            engine.submit([Request(f"live {i}", begun, context - len(begun), ())])
        while not engine.live or any(s.prefilling for s in engine.live) or len(engine.live) < batch:
            engine.step("warm-up")
            engine.rewind()  # none may end before the last has begun

    def _pair(
        self, engine: Engine, parts: dict[str, PlainPlan], into: Blocks, turn: int, label: str, n_windows: int
    ) -> None:
        """One block of each part, from the same tokens on; every other turn in the other order."""
        if self.recalibrator is None:
            threads, path = self.tuned.threads.compute, self.target.expert_path
            self.recalibrator = Recalibrator(self.profile, self.spec, self.draft_spec, threads, path)
        engine.pause()
        before = self.recalibrator.slice()
        for name in list(parts) if turn % 2 == 0 else list(parts)[::-1]:
            engine.rewind()
            windows = self._block(engine, parts[name], f"{name}, {label}", n_windows)
            timeline = _events(engine)
            engine.pause()
            after = self.recalibrator.slice()
            into[name].append(Block(windows, timeline, (before, after)))
            before = after

    def _block(self, engine: Engine, part: PlainPlan, label: str, n_windows: int) -> list[Window]:
        """Windows of one part; the first, which fills the pipeline, is not among them."""
        self._configure(engine, part)
        engine.step("warm-up")
        left = min(s.n_remaining for s in engine.live)
        windows = [
            engine.step(label) for _ in range(max(1, min(n_windows, left // (part.decode.draft_length + 1) - 1)))
        ]
        self.windows += windows
        return windows

    def _everything(self) -> PlanExperts | None:
        """Every expert resident, if the machine's memory allows it."""
        if self.spec.n_all_experts * expert_stride(self.spec) > 0.7 * available_bytes():
            return None
        return PlanExperts.all_resident(self.spec)

    def _compare_outputs(self, plain: dict[str, list[int]], tuned: dict[str, list[int]]) -> None:
        answer = lossless(plain, tuned)
        self.lossless = answer.passed
        self.checks.append(answer)

    def _forecast(self, part: PlainPlan, blocks: list[Block], limit: float | None, speed: Slice | None) -> Forecast:
        """Of the blocks' windows, at the speed measured beside them; None: at the profile's."""
        calibration = None
        if speed:
            calibration = Calibration(**speed.model_dump())
        prices = Prices(self.profile, self.spec, self.draft_spec, part.threads.compute, limit, calibration)
        windows = [w for b in blocks for w in b.windows]
        contexts = [int(fmean(w.mean_context for w in windows))] * windows[0].live
        return forecast(self.spec, self.workload, part.decode, part.experts, prices, contexts)

    def _compare_windows(
        self, parts: dict[str, PlainPlan], blocks: Blocks, circumstances: str, limit: float | None
    ) -> None:
        """Predicted against measured window times, recalibrated (judged) and from the stored profile (told)."""
        moment = speed_beside(blocks)
        for part_name, part in parts.items():
            name, own = f"{part_name} window, {circumstances}", blocks[part_name]
            measured = median(w.duration_s for b in own for w in b.windows)
            found, stored = (self._forecast(part, own, limit, speed).prediction for speed in (moment, None))
            error, stored_error = (
                self._comparison(name, seconds, measured, provenance, bar)
                for seconds, provenance, bar in (
                    (found.window_s, "recalibrated", WINDOW_ERROR),
                    (stored.window_s, "stored profile", None),
                )
            )
            self._check(
                f"prediction: {name}",
                abs(error) <= WINDOW_ERROR,
                f"predicted {(1 + error) * measured * 1e3:.1f} ms, measured {measured * 1e3:.1f} ms ({error:+.1%}), "
                f"stored profile {stored_error:+.1%}, {found.bound}-bound",
                f"{name}: the prediction is {error:+.0%} off on the {found.bound} lane: profile the machine again",
            )

    def _comparison(self, name: str, predicted: float, measured: float, provenance: str, limit: float | None) -> float:
        """Kept; returns its error."""
        comparison = Comparison(
            name=name,
            predicted=predicted,
            measured=measured,
            unit="s",
            provenance=f"predicted, {provenance}",
            limit=limit,
        )
        self.comparisons.append(comparison)
        return comparison.error

    def _speed_up(self, blocks: Blocks, limit: float | None) -> None:
        rates = {name: [_rate(b.windows) for b in each] for name, each in blocks.items()}
        disks = {name: [_disk_rate(b.windows) for b in each] for name, each in blocks.items()}
        middle, low, high, confidence = paired_ratios(rates["tuned"], rates["plain"])
        bound, reason = self._bound(blocks, limit)
        self.speed_ups.append(
            SpeedUp(
                label=_named(limit),
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
            self._compare_windows({"plain": self.plain, "tuned": self.tuned}, blocks, _named(limit), limit)
            middle_s = median(b.windows[-1].duration_s for b in blocks["tuned"])
            shown = min(blocks["tuned"], key=lambda b: abs(b.windows[-1].duration_s - middle_s))
            self.measured_events = shown.timeline
            self.predicted_events = _predicted_events(self._forecast(self.tuned, [shown], limit, typical(shown.speed)))
            self._plain_near_bound([w for b in blocks["plain"] for w in b.windows], disks["plain"])

    def _bound(self, blocks: Blocks, limit: float | None) -> tuple[float, str]:
        """Speed-up if both ran at the limit of their own bytes, FLOPs and acceptance."""
        disk = limit or _best([s.disk_gb_per_s for s in self.recalibrator.slices])  # type: ignore[union-attr]
        peak = self.profile.peak("bf16_dot", self.tuned.threads.compute) or 0.0
        seconds, tokens = {}, {}
        for name, each in blocks.items():
            windows = [w for block in each for w in block.windows]
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
            engine.rewind()
            part = self.tuned.model_copy(update={"decode": decode})
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


def disk_off_by(stored: Measurement, seen: Sequence[float]) -> tuple[float, str]:
    """How many times faster the stored disk is than what was seen (GB/s), and both in words.

    Shared disks flip between speeds: only a disk that is off in its middle and at its best alike is another disk.
    """
    edited = stored.value / median(stored.samples)  # a value that is not its samples' moves the whole disk
    middle, best = stored.value / median(seen), edited * _best(stored.samples) / _best(seen)
    agree = (middle > 1) == (best > 1)
    off = min(middle, best, key=lambda ratio: abs(log(ratio))) if agree else 1.0
    return off, f"profile {stored.value:.2f} GB/s, seen now {median(seen):.2f}, at best {_best(seen):.2f} GB/s"


def speed_beside(blocks: Blocks) -> Slice:
    """Of all parts' blocks, which took turns: a slice is far shorter than what it is to tell of."""
    return typical([speed for each in blocks.values() for block in each for speed in block.speed])


def _named(limit: float | None) -> str:
    return f"disk capped at {limit:g} GB/s" if limit else "disk uncapped"


def _best(rates: Sequence[float]) -> float:
    return float(np.percentile(rates, 90))


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
    """Of the steady window, on the measured window's clock."""
    schedule = forecast_.schedule
    origin = schedule.span_s[0]
    return tuple(
        _event(n, schedule.start_s[n.index], schedule.end_s[n.index], origin)
        for n in schedule.graph.nodes
        if n.window == schedule.steady and schedule.end_s[n.index] > schedule.start_s[n.index]
    )
