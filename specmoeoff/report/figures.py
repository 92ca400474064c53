"""One function per figure; each returns the figure and the table of every number in it."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import pandas as pd

from specmoeoff.report.style import KINDS, MEASURED, NAMES, Picture, new_figure, title
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.record import RunRecord, TimelineEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
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
    axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
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
