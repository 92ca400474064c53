"""What is drawn under the roofs: operators as measured, windows as predicted, and points a person gave."""

from collections.abc import Callable, Iterator

import pandas as pd

from specmoeoff.roofline.curves import Ceiling, attainable, attention_flops, expert_flops, ridge, summit
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import PlainPlan, Plan
from specmoeoff.specs.profile import HardwareProfile, OperatorTable

ABOVE_ROOF = 1.02
SWEEP = "expert over rows"
OPERATORS = "operators"
WINDOWS = "windows"
GIVEN = "given points"

Add = Callable[..., None]


def roofline_points(
    profile: HardwareProfile,
    roofs: tuple[Ceiling, ...],
    plan: Plan | None,
    model: ModelSpec | None,
    given: pd.DataFrame | None,
) -> pd.DataFrame:
    """Columns: name, kind, level, flops_per_byte, gflop_per_s, roof_gflop_per_s, percent_of_roof, limiter, window_share,
    provenance. `level` names the roof whose bytes are counted.
    """
    slopes = {c.name: c for c in roofs if not c.is_peak}
    rows: list[dict[str, object]] = []

    def add(
        name: str, kind: str, level: str, intensity: float, rate: float, provenance: str, share: float = 0.0
    ) -> None:
        peak = summit(roofs, slopes[level].device) if level in slopes else None
        if peak is None:
            return
        bandwidth = slopes[level].rate
        if level == "disk" and "disk cap" in slopes:
            bandwidth = min(bandwidth, slopes["disk cap"].rate)
        roof = attainable(intensity, bandwidth, peak.rate)
        limiter = level if intensity < ridge(bandwidth, peak.rate) else "compute"
        if rate > ABOVE_ROOF * roof:
            cause = "its FLOPs are overcounted, or the clock was higher than when it was measured"
            if limiter == level:
                cause = f"{level} was faster than when it was measured, or a faster level served it"
            limiter = f"above its roof: {cause}"
        rows.append(
            {
                "name": name,
                "kind": kind,
                "level": level,
                "flops_per_byte": intensity,
                "gflop_per_s": rate,
                "roof_gflop_per_s": roof,
                "percent_of_roof": 100 * rate / roof,
                "limiter": limiter,
                "window_share": share,
                "provenance": provenance,
            }
        )

    for table in _operators(profile, model):
        sweep = table.operator == "expert"
        for n_rows, seconds, flops, n_bytes in zip(table.grid[0], table.seconds, table.flops, table.bytes, strict=True):
            if n_bytes and (sweep or n_rows in (1, 16, 128)):
                name = f"{table.operator.replace('_', ' ')}, {n_rows:.0f} row{'s' if n_rows > 1 else ''}"
                kind = SWEEP if sweep else OPERATORS
                add(name, kind, "DRAM", flops / n_bytes, flops / seconds / 1e9, "measured here")
    if plan and model:
        for label, part in (("k = 0", plan.plain), (f"k = {plan.decode.draft_length}", plan)):
            _window(add, label, part, model)
    for row in given.to_dict("records") if given is not None else ():
        level = row.get("level", "DRAM" if "DRAM" in slopes else max(slopes, key=lambda n: slopes[n].rate, default=""))
        add(row["name"], GIVEN, level, row["flops_per_byte"], row["gflop_per_s"], "given")
    return pd.DataFrame(rows)


def _operators(profile: HardwareProfile, model: ModelSpec | None) -> Iterator[OperatorTable]:
    """Those measured over rows alone, at the model's shape and the most threads."""
    most = max((t.n_threads for t in profile.operators), default=0)
    shape = model.shape_key if model else next((t.shape for t in profile.operators), "")
    for table in profile.operators:
        if (table.n_threads, table.shape) == (most, shape) and table.operator in ("expert", "head", "attention_block"):
            yield table


def _window(add: Add, label: str, part: "Plan | PlainPlan", model: ModelSpec) -> None:
    """The MoE layer over the bytes of the disk and of DRAM, and attention, in one predicted window."""
    rows = part.decode.batch * (part.decode.draft_length + 1)
    p = part.predicted
    flops = model.n_layers * model.n_active * rows * expert_flops(model)
    moe_s = p.phases_s.get("experts", 0.0) + p.phases_s.get("expert", 0.0)
    if p.disk_bytes:
        rate = flops / p.window_s / 1e9
        add(f"MoE layer, {label}", WINDOWS, "disk", flops / p.disk_bytes, rate, "predicted", 1.0)
    used = 1.0 - (1.0 - model.n_active / model.n_experts) ** rows
    dram_bytes = model.n_all_experts * used * model.expert_bytes
    if moe_s:
        share = moe_s / p.window_s
        add(f"MoE layer, {label}", WINDOWS, "DRAM", flops / dram_bytes, flops / moe_s / 1e9, "predicted", share)
    attention_s = p.phases_s.get("attention", 0.0)
    context = max(1, p.context_tokens)
    work = model.n_layers * (attention_flops(model, rows, context) + 2.0 * rows * model.attention_params)
    kv = part.decode.batch * context * model.kv_bytes_per_token + model.n_layers * 2.0 * model.attention_params
    if attention_s:
        share = attention_s / p.window_s
        add(f"attention block, {label}", WINDOWS, "DRAM", work / kv, work / attention_s / 1e9, "predicted", share)
