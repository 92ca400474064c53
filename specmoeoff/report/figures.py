"""One function per figure; each returns the figure and the table of every number in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from specmoeoff.report.style import AFTER, BEFORE, KINDS, MEASURED, NAMES, new_figure, title
from specmoeoff.roofline.curves import attainable, attention_flops, expert_flops, ridge, roofs
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import PlainPlan, Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord, TimelineEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure with its numbers and the sentence it shows."""

    name: str
    caption: str
    figure: "Figure"
    table: pd.DataFrame


ABOVE_ROOF = 1.02
LEVELS = {
    "l1_read": "L1",
    "l2_read": "L2",
    "l3_read": "L3",
    "dram_read": "DRAM",
    "disk": "disk",
    "disk cap": "disk cap",
}


def roofline_points(profile: HardwareProfile, plan: Plan | None, model: ModelSpec | None) -> pd.DataFrame:
    """Operators as measured, and the MoE layer and attention of a window before and after speculation.

    Columns: name, level, flops_per_byte, gflop_per_s, roof_gflop_per_s, percent_of_roof, limiter, window_share, provenance.
    """
    peaks, memory = roofs(profile)
    peak = peaks.get("bf16_dot") or peaks.get("fp32_fma") or 1.0
    rows: list[dict[str, object]] = []

    def add(name: str, level: str, intensity: float, rate: float, share: float, provenance: str) -> None:
        bandwidth = memory[level]
        if level == "disk" and plan and plan.limits.disk_limit_gb_per_s:
            bandwidth = min(bandwidth, plan.limits.disk_limit_gb_per_s)
        roof = attainable(intensity, bandwidth, peak)
        limiter = LEVELS[level] if intensity < ridge(bandwidth, peak) else "compute"
        if rate > ABOVE_ROOF * roof:
            limiter = f"above its roof: {LEVELS[level]} was faster then than when it was measured"
        rows.append(
            {
                "name": name,
                "level": LEVELS[level],
                "flops_per_byte": intensity,
                "gflop_per_s": rate,
                "roof_gflop_per_s": roof,
                "percent_of_roof": 100 * rate / roof,
                "limiter": limiter,
                "window_share": share,
                "provenance": provenance,
            }
        )

    most = max((t.n_threads for t in profile.operators), default=0)
    shape = model.shape_key if model else next((t.shape for t in profile.operators), "")
    for table in profile.operators:
        if table.n_threads == most and table.shape == shape and table.operator in ("expert", "head", "attention_block"):
            for wanted in (1, 16, 128):
                if wanted in table.grid[0]:
                    i = table.grid[0].index(wanted)
                    rate = table.flops[i] / table.seconds[i] / 1e9
                    name = f"{table.operator.replace('_', ' ')}, {wanted} rows"
                    add(name, "dram_read", table.flops[i] / table.bytes[i], rate, 0.0, "measured here")
    if plan and model:
        for label, part in (("k = 0", plan.plain), (f"k = {plan.decode.draft_length}", plan)):
            _window_points(add, label, part, model, "disk" in memory)
    return pd.DataFrame(rows)


def _window_points(add: object, label: str, part: "Plan | PlainPlan", model: ModelSpec, has_disk: bool) -> None:
    rows = part.decode.batch * (part.decode.draft_length + 1)
    p = part.predicted
    flops = model.n_layers * model.n_active * rows * expert_flops(model)
    moe_s = p.phases_s.get("experts", 0.0) + p.phases_s.get("expert", 0.0)
    if has_disk and p.disk_bytes:
        add(f"MoE layer, {label}", "disk", flops / p.disk_bytes, flops / p.window_s / 1e9, 1.0, "predicted")  # type: ignore[operator]
    used = 1.0 - (1.0 - model.n_active / model.n_experts) ** rows
    dram_bytes = model.n_all_experts * used * model.expert_bytes
    if moe_s:
        share = moe_s / p.window_s
        add(f"MoE layer, {label}", "dram_read", flops / dram_bytes, flops / moe_s / 1e9, share, "predicted")  # type: ignore[operator]
    attention_s = p.phases_s.get("attention", 0.0)
    context = max(1, p.context_tokens)
    work = model.n_layers * (attention_flops(model, rows, context) + 2.0 * rows * model.attention_params)
    kv = part.decode.batch * context * model.kv_bytes_per_token + model.n_layers * 2.0 * model.attention_params
    if attention_s:
        share = attention_s / p.window_s
        add(f"attention block, {label}", "dram_read", work / kv, work / attention_s / 1e9, share, "predicted")  # type: ignore[operator]


def roofline(
    profile: HardwareProfile, plan: Plan | None, model: ModelSpec | None, extra: pd.DataFrame | None
) -> Picture:
    """The hierarchical roofline: slow tier to caches, and how speculation moves the MoE layer on it."""
    peaks, memory = roofs(profile)
    cap = plan.limits.disk_limit_gb_per_s if plan else None
    points = roofline_points(profile, plan, model)
    lines = dict(memory)
    if cap:
        lines["disk cap"] = cap
    peak = max(peaks.values(), default=1.0)
    x_low, x_high = 0.5, max(4e3, 3 * peak / min(lines.values(), default=1.0))
    figure, (axis,) = new_figure(9.5, 5.8)
    table_rows: list[dict[str, object]] = []
    for name, value in peaks.items():
        text = name.replace("_", " ")
        axis.axhline(value, color="#333333", linewidth=1.2)
        axis.text(x_high, value * 1.07, f"{text} {value:,.0f} GFLOP/s", ha="right", fontsize=8)
        table_rows.append({"name": name, "level": "peak", "gflop_per_s": value, "provenance": "measured here"})
    bf16 = peaks.get("bf16_dot", peak)
    floor = _floor(points, lines, x_low)
    order = sorted(lines.items(), key=lambda item: -item[1])
    last_knee = 1e-9
    for i, (name, rate) in enumerate(order):
        knee = ridge(rate, bf16)
        style = {"linestyle": "--"} if name == "disk cap" else {}
        axis.plot([x_low, knee], [x_low * rate, bf16], color="#777777", linewidth=1.1, **style)  # type: ignore[arg-type]
        axis.plot([knee], [bf16], marker="|", color="#333333", markersize=8)
        if x_low < knee < x_high and knee / last_knee > 1.35:
            axis.text(knee, bf16 * 1.22, f"{knee:,.3g}", ha="center", fontsize=7, color="#333333")
            last_knee = knee
        _roof_label(axis, LEVELS[name], rate, x_low, floor, i, bf16)
        table_rows.append(
            {
                "name": name,
                "level": LEVELS[name],
                "gb_per_s": rate,
                "ridge_flops_per_byte": knee,
                "provenance": "given" if name == "disk cap" else "measured here",
            }
        )
    axis.set(xscale="log", yscale="log", xlim=(x_low, x_high), ylim=(floor, peak * 2))
    axis.set_xlabel("arithmetic intensity, FLOP per byte of the level named", fontsize=10)
    axis.set_ylabel("GFLOP/s", fontsize=10)
    _draw_points(axis, points)
    if extra is not None:
        axis.scatter(extra["flops_per_byte"], extra["gflop_per_s"], marker="D", color="black", s=25, zorder=5)
        for _, row in extra.iterrows():
            axis.annotate(
                str(row["name"]),
                (row["flops_per_byte"], row["gflop_per_s"]),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
            )
        points = pd.concat([points, extra.assign(provenance="given")])
    headline = "Roofs of this machine"
    disk = points[(points["level"] == "disk") & points["name"].str.startswith("MoE")] if len(points) else points
    if len(disk) == 2:
        before, after = disk["flops_per_byte"]
        headline = f"Speculation moves the MoE layer from {before:.0f} to {after:.0f} FLOP per streamed byte"
    title(axis, headline)
    table = pd.concat([pd.DataFrame(table_rows), points], ignore_index=True)
    return Picture(
        "roofline",
        "Dashed: the cap put on the disk. Marker size: share of the window. Small dots: operators alone. Small numbers: FLOP per byte at the ridges.",
        figure,
        table,
    )


def _floor(points: pd.DataFrame, lines: dict[str, float], x_low: float) -> float:
    lowest = float(points["gflop_per_s"].min()) if len(points) else 10.0
    return max(0.2, min(lowest / 3, 20 * x_low * min(lines.values(), default=1.0)))


def _roof_label(axis: "Axes", name: str, rate: float, x_low: float, floor: float, index: int, peak: float) -> None:
    """Where the line enters the frame, each a little further along than the one above it."""
    x = max(x_low * 1.15, floor * 1.6 / rate) * 1.1
    if x * rate > peak * 0.8:
        return
    axis.text(
        x,
        x * rate * 1.12,
        f"{name} {rate:,.3g} GB/s",
        fontsize=8,
        rotation=0,
        ha="left",
        va="bottom",
        color="#444444",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )


def _draw_points(axis: "Axes", points: pd.DataFrame) -> None:
    if not len(points):
        return
    operators = points[points["provenance"] == "measured here"]
    axis.scatter(operators["flops_per_byte"], operators["gflop_per_s"], s=14, color="#999999", zorder=3)
    windows = points[points["provenance"] == "predicted"]
    below, above = (9, -12), (4, 8)
    for key, group in windows.groupby(windows["name"].str[:3] + "|" + windows["level"], sort=False):
        kind, level = str(key).split("|")
        xs, ys = list(group["flops_per_byte"]), list(group["gflop_per_s"])
        if len(xs) == 2:
            axis.annotate(
                "",
                (xs[1], ys[1]),
                (xs[0], ys[0]),
                arrowprops={"arrowstyle": "->", "color": "#333333", "lw": 1.2},
                zorder=4,
            )
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            share = float(group["window_share"].iloc[i])
            marker = "s" if kind == "att" else "o"
            axis.scatter(
                [x], [y], s=40 + 160 * share, marker=marker, color=AFTER if i else BEFORE, edgecolor="white", zorder=5
            )
            axis.annotate(
                f"{group['name'].iloc[i]} ({level})",
                (x, y),
                xytext=above if i and level == "DRAM" else below,
                textcoords="offset points",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                zorder=4.5,
            )


def throughput(plan: Plan, record: RunRecord | None) -> Picture:
    """Tokens per second over draft length, predicted and measured."""
    rows = [
        {
            "draft_length": c.draft_length,
            "source": "predicted, best plan of this length",
            "tokens_per_s": c.prediction.tokens_per_s,
        }
        for c in plan.curve
    ]
    measured: list[tuple[int, float, str]] = []
    if record:
        measured += [(s.draft_length, s.tokens_per_s, "measured, tuned placement") for s in record.sweep]
        for s in record.speed_ups:
            if s.disk_limit_gb_per_s == plan.limits.disk_limit_gb_per_s:
                measured.append((0, median(p.plain_tokens_per_s for p in s.pairs), "measured, pairs"))
                measured.append(
                    (plan.decode.draft_length, median(p.tuned_tokens_per_s for p in s.pairs), "measured, pairs")
                )
    rows += [{"draft_length": k, "source": source, "tokens_per_s": v} for k, v, source in measured]
    table = pd.DataFrame(rows)
    figure, (axis,) = new_figure()
    curve = table[table["source"].str.startswith("predicted")] if len(table) else table
    axis.plot(curve["draft_length"], curve["tokens_per_s"], color="#333333", marker="o", markersize=4)
    if len(curve):
        middle = curve.iloc[len(curve) // 2]
        axis.annotate(
            "predicted",
            (middle["draft_length"], middle["tokens_per_s"]),
            xytext=(6, -12),
            textcoords="offset points",
            fontsize=9,
        )
    for source, marker, filled in (("measured, tuned placement", "s", False), ("measured, pairs", "D", True)):
        part = table[table["source"] == source]
        if len(part):
            axis.scatter(
                part["draft_length"],
                part["tokens_per_s"],
                marker=marker,
                s=45,
                facecolor=MEASURED if filled else "white",
                edgecolor=MEASURED,
                zorder=4,
                label=source,
            )
    if measured:
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    axis.set(xlabel="draft length k (0: plain decoding)", ylabel="tokens per second, all requests", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    base, best = plan.plain.predicted.tokens_per_s, plan.predicted.tokens_per_s
    title(axis, f"Drafting {plan.decode.draft_length} tokens is predicted to give {best / base:.1f}x plain decoding")
    caption = "Plain and chosen length: medians of paired blocks. The other lengths ran a few windows each; their tokens per round vary."
    return Picture("throughput", caption, figure, table)


def breakdown(plan: Plan, record: RunRecord | None) -> Picture:
    """Where a window's time goes, by draft length."""
    rows: list[dict[str, object]] = []
    for c in plan.curve:
        rows += [
            {"draft_length": c.draft_length, "source": "predicted", "phase": k, "seconds": v}
            for k, v in c.prediction.phases_s.items()
        ]
    for s in record.sweep if record else ():
        rows += [
            {"draft_length": s.draft_length, "source": "measured", "phase": k, "seconds": v}
            for k, v in s.phases_s.items()
        ]
    if record:
        for k, label in ((0, "plain"), (plan.decode.draft_length, "tuned")):
            windows = [
                w
                for w in record.windows
                if w.label.startswith(f"{label}, disk capped")
                or (w.label == f"{label}, disk uncapped" and not plan.limits.disk_limit_gb_per_s)
            ]
            names = sorted({n for w in windows for n in w.phases_s})
            rows += [
                {
                    "draft_length": k,
                    "source": "measured",
                    "phase": n,
                    "seconds": median(w.phases_s.get(n, 0.0) for w in windows),
                }
                for n in names
            ]
    table = pd.DataFrame(rows)
    figure, (axis,) = new_figure(9.0, 4.6)
    for source, shift, alpha in (("predicted", -0.2, 0.75), ("measured", 0.2, 1.0)):
        part = table[table["source"] == source] if len(table) else table
        for k in sorted(set(part["draft_length"])) if len(part) else ():
            bottom = 0.0
            at = part[part["draft_length"] == k].drop_duplicates("phase").set_index("phase")["seconds"]
            for kind in [n for n in KINDS if n in at.index]:
                height = float(at[kind])
                axis.bar(
                    k + shift,
                    height,
                    0.36,
                    bottom=bottom,
                    color=KINDS[kind],
                    alpha=alpha,
                    edgecolor="white",
                    linewidth=0.3,
                )
                bottom += height
            axis.text(k + shift, bottom, "p" if source == "predicted" else "m", ha="center", va="bottom", fontsize=7)
    handles = [axis.bar(0, 0, color=KINDS[k], label=NAMES[k]) for k in KINDS if len(table) and k in set(table["phase"])]
    if handles:
        axis.legend(frameon=False, fontsize=8, ncols=min(4, len(handles)), loc="upper left", bbox_to_anchor=(0, -0.13))
    axis.set(xlabel="draft length k", ylabel="seconds of one window")
    axis.xaxis.get_major_locator().set_params(integer=True)
    waits = plan.predicted.phases_s.get("wait", 0.0) / plan.predicted.window_s
    title(axis, f"At k = {plan.decode.draft_length} the compute lane waits for the disk {waits:.0%} of the window")
    return Picture("breakdown", "Left of each pair (p): predicted; right (m): measured, medians.", figure, table)


def timeline(record: RunRecord) -> Picture:
    """One window, predicted above measured, on one time axis."""
    frames = []
    for source, events in (("predicted", record.timeline_predicted), ("measured", record.timeline_measured)):
        frames.append(pd.DataFrame([{"source": source, **e.model_dump()} for e in events]))
    figure, axes = new_figure(10.0, 4.4, 2, 1, sharex=True)
    ends = []
    for axis, (source, events) in zip(
        axes, (("predicted", record.timeline_predicted), ("measured", record.timeline_measured)), strict=True
    ):
        ends.append(_lanes(axis, events))
        title(axis, f"{source}: {ends[-1] * 1e3:,.0f} ms")
    axes[-1].set_xlabel("milliseconds since the window began (reads may begin before)", fontsize=10)
    handles = [axes[0].barh(0, 0, color=KINDS[k], label=NAMES[k]) for k in KINDS if k not in ("wait", "verify")]
    axes[0].legend(handles=handles, frameon=False, fontsize=8, ncols=6, loc="lower right", bbox_to_anchor=(1, 1.0))
    return Picture(
        "timeline",
        "Every node of the graph on its lane: the compute lane above, the disk below.",
        figure,
        pd.concat(frames),
    )


def _lanes(axis: "Axes", events: Sequence[TimelineEvent]) -> float:
    lanes = {"cpu": 1, "disk": 0}
    for kind in KINDS:
        for lane, y in lanes.items():
            spans = [
                (e.start_s * 1e3, (e.end_s - e.start_s) * 1e3) for e in events if e.kind == kind and e.lane == lane
            ]
            if spans:
                axis.broken_barh(spans, (y - 0.4, 0.8), facecolors=KINDS[kind], linewidth=0)
    axis.set_yticks(list(lanes.values()), list(lanes))
    axis.set_ylim(-0.6, 1.6)
    return max((e.end_s for e in events if e.lane == "cpu"), default=0.0)


def memory(plan: Plan, record: RunRecord | None) -> Picture:
    """Bytes by tier and purpose, and the peak that was measured."""
    rows = [{"tier": "fast", "purpose": k, "bytes": v} for k, v in plan.memory.fast.items()]
    rows += [
        {"tier": "host", "purpose": k, "bytes": v} for k, v in sorted(plan.memory.host.items(), key=lambda i: -i[1])
    ]
    if record:
        rows.append({"tier": "measured", "purpose": "peak RSS", "bytes": record.rss_peak_bytes})
    rows.append({"tier": "limit", "purpose": "fast memory", "bytes": plan.limits.fast_memory_bytes})
    table = pd.DataFrame(rows)
    figure, (axis,) = new_figure(9.0, 2.9)
    left, palette = 0.0, ["#0072B2", "#56B4E9", "#E69F00", "#F0E442", "#009E73", "#CC79A7", "#999999", "#D55E00"]
    for i, row in table[table["tier"].isin(["fast", "host"])].reset_index().iterrows():
        mib = row["bytes"] / (1 << 20)
        axis.barh(
            1,
            mib,
            left=left,
            color=palette[int(i) % len(palette)],
            edgecolor="white",
            label=f"{row['tier']}: {row['purpose'].replace('_', ' ')} {mib:,.0f}",
        )
        left += mib
    if record:
        peak = record.rss_peak_bytes / (1 << 20)
        axis.barh(0, peak, color=MEASURED)
        axis.text(peak, 0, f" {peak:,.0f} MiB", va="center", fontsize=9)
    axis.text(left, 1, f" {left:,.0f} MiB", va="center", fontsize=9)
    axis.set_yticks([1, 0] if record else [1], ["planned", "measured peak"] if record else ["planned"])
    axis.set_xlim(0, left * 1.15)
    axis.set_xlabel("MiB")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.25))
    said = f": {record.rss_peak_bytes / plan.memory.rss_bytes - 1:+.1%} measured" if record else ""
    title(axis, f"{left:,.0f} MiB planned{said}")
    return Picture(
        "memory", "Fast: experts held or passing through. Host: everything else of the process.", figure, table
    )


def throughput_spread(record: RunRecord) -> pd.DataFrame:
    """Every pair of every comparison."""
    return pd.DataFrame(
        [
            {"comparison": s.label, "pair": i, **p.model_dump(), "ratio": p.tuned_tokens_per_s / p.plain_tokens_per_s}
            for s in record.speed_ups
            for i, p in enumerate(s.pairs)
        ]
    )


def finite(value: float) -> float:
    """For tables: NaN where a number makes no sense."""
    return value if np.isfinite(value) else float("nan")
