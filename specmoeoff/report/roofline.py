"""The hierarchical roofline: every roof of the machine, and how speculation moves the MoE layer under them."""

import re
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from specmoeoff.report.labels import Label, place
from specmoeoff.report.points import GIVEN, OPERATORS, SWEEP, WINDOWS, roofline_points
from specmoeoff.report.style import AFTER, BEFORE, CPU, GPU, LINK, MEASURED, Mark, Picture, new_figure, title
from specmoeoff.roofline.curves import Ceiling, ceilings, frame, ridge, summit
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = {"peak": "-", "gemm": ":", "memory": "-", "link": "-", "cap": "--"}
AREA = 260.0  # square points of a marker that takes the whole window


def roofline(
    profile: HardwareProfile, plan: Plan | None, model: ModelSpec | None, given: pd.DataFrame | None
) -> Picture:
    """Roofs with their numbers, ridges with theirs, and the points of `roofline_points`."""
    roofs = ceilings(profile, plan.limits.disk_limit_gb_per_s if plan else None)
    points = roofline_points(profile, roofs, plan, model, given)
    figure, (axis,) = new_figure(9.5, 5.8)
    x_low, x_high, y_low, y_high = frame(roofs)
    axis.set(xscale="log", yscale="log", xlim=(x_low, x_high), ylim=(y_low, y_high))
    axis.set_xlabel("arithmetic intensity, FLOP per byte of the level named", fontsize=10)
    axis.set_ylabel("GFLOP/s", fontsize=10)
    title(axis, _headline(points))
    drawing = _Drawing(axis)
    for roof in roofs:
        drawing.peak(roof) if roof.is_peak else drawing.slope(roof, summit(roofs, roof.device))
    if len(points):
        x, y = points["flops_per_byte"], points["gflop_per_s"]
        points["in_frame"] = (x >= x_low) & (x <= x_high) & (y >= y_low) & (y <= y_high)
        drawing.outside += list(points["name"][~points["in_frame"]])
        drawing.points(points[points["in_frame"]])
    place(axis, [*drawing.ridges, *drawing.labels], np.vstack([np.ones((1, 2)), *drawing.hidden]))
    caption = (
        "Numbers at the ridges: FLOP per byte from which on compute is the limit. Area of a marker: its share of the window. "
        "Small dots: operators alone, under the roof of DRAM."
    )
    if outside := drawing.outside:
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        caption += f" Outside the frame, in the table: {'; '.join(outside[:3])}{more}."
    table = pd.concat([pd.DataFrame(drawing.rows), points], ignore_index=True)
    return Picture("roofline", caption, figure, table, drawing.marks)


def _headline(points: pd.DataFrame) -> str:
    if len(points):
        disk = points[(points["level"] == "disk") & (points["kind"] == WINDOWS)]["flops_per_byte"]
        if len(disk) == 2:
            return (
                f"Speculation moves the MoE layer from {disk.iloc[0]:.0f} to {disk.iloc[1]:.0f} FLOP per streamed byte"
            )
    return "Roofs of this machine"


class _Drawing:
    """The axes with what was drawn so far: labels still to be placed, data they should not hide, marks, table rows."""

    def __init__(self, axis: "Axes") -> None:
        self.axis = axis
        self.ridges: list[Label] = []
        self.labels: list[Label] = []
        self.hidden: list[np.ndarray] = []
        self.marks: dict[str, Mark] = {}
        self.rows: list[dict[str, object]] = []
        self.outside: list[str] = []

    def peak(self, roof: Ceiling) -> None:
        """A flat roof, labelled at its right."""
        x = np.geomspace(*self.axis.get_xlim(), 100)
        self._line(roof, x, np.full_like(x, roof.rate), f"{roof.name} {number(roof.rate)} {roof.unit}", x[95:40:-3])
        self.rows.append({"name": roof.name, "level": "peak", "rate": roof.rate, "unit": roof.unit})
        self.rows[-1]["provenance"] = roof.provenance

    def slope(self, roof: Ceiling, top: Ceiling | None) -> None:
        """A level's slope up to its ridge, labelled where it is long."""
        (x_low, x_high), (y_low, y_high) = self.axis.get_xlim(), self.axis.get_ylim()
        knee = ridge(roof.rate, top.rate) if top else np.inf
        start, end = max(x_low, y_low / roof.rate), min(x_high, knee, y_high / roof.rate)
        tip = f"{roof.name} {number(roof.rate)} GB/s"
        in_frame = x_low < knee < x_high
        if start >= end:
            self.outside.append(tip)
        else:
            if top and not in_frame:
                tip += f", ridge {number(knee)}"
            x = np.geomspace(start, end, 100)
            self._line(roof, x, x * roof.rate, tip, x[20:90:5], f"; ridge at {number(knee)} FLOP per byte")
        if top and in_frame:
            self.axis.plot([knee], [top.rate], "o", color=_color(roof), markersize=3, gid=f"ridge-{slug(roof.name)}")
            self.ridges.append(Label(number(knee), [(knee, top.rate)], f"ridge-{slug(roof.name)}", _color(roof), 7.0))
            for part in ("ridge", "label-ridge", "leader-ridge"):
                self.marks[f"{part}-{slug(roof.name)}"] = Mark(
                    f"ridge of {tip}: {number(knee)} FLOP per byte", (roof.name,)
                )
        self.rows.append(
            {
                "name": roof.name,
                "level": roof.name,
                "rate": roof.rate,
                "unit": roof.unit,
                "ridge_flops_per_byte": knee,
                "provenance": roof.provenance,
            }
        )

    def _line(
        self, roof: Ceiling, x: np.ndarray, y: np.ndarray, text: str, anchors: np.ndarray, more: str = ""
    ) -> None:
        name, color = f"roof-{slug(roof.name)}", _color(roof)
        self.axis.plot(x, y, color=color, linewidth=1.2, linestyle=DASHES[roof.kind], gid=name)
        # A line of a point's width is hard to point at: this one is not seen, but is met.
        self.axis.plot(x, y, color=color, linewidth=9, alpha=0, gid=f"wide-{name}")
        self.hidden.append(np.column_stack([x, y]))
        heights = np.interp(anchors, x, y)
        self.labels.append(Label(text, list(zip(anchors, heights, strict=True)), name, color))
        for part in ("", "wide-", "label-", "leader-"):
            self.marks[part + name] = Mark(f"{text}{more} ({roof.provenance})", (roof.name,))

    def points(self, points: pd.DataFrame) -> None:
        """Markers; a line through the sweep; arrows from before to after."""
        sweep = points[points["kind"] == SWEEP].sort_values("flops_per_byte")
        if len(sweep) > 1:
            xy = sweep[["flops_per_byte", "gflop_per_s"]].to_numpy(dtype=float)
            self.axis.plot(*xy.T, color=MEASURED, linewidth=1.6, gid="sweep", zorder=3)
            self.hidden.append(xy)
            self.labels.append(Label("expert, measured over rows", [tuple(p) for p in xy[::-1]], "sweep", MEASURED))
            for part in ("sweep", "label-sweep", "leader-sweep"):
                self.marks[part] = Mark("expert, measured over rows", (SWEEP,))
        windows = points[points["kind"] == WINDOWS]
        for i, (_, pair) in enumerate(windows.groupby([windows["name"].str.split(",").str[0], "level"], sort=False)):
            if len(pair) == 2:
                ends = list(zip(pair["flops_per_byte"], pair["gflop_per_s"], strict=True))
                arrow = self.axis.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "->", "lw": 1.2}, zorder=4)
                arrow.arrow_patch.set_gid(f"arrow-{i}")  # type: ignore[union-attr]
                self.hidden.append(np.geomspace(ends[0], ends[1], 30))
                self.marks[f"arrow-{i}"] = Mark(f"{pair['name'].iloc[0]} to {pair['name'].iloc[1]}", (WINDOWS,))
        for i, point in enumerate(points.itertuples()):
            self._point(f"point-{i}", point)

    def _point(self, name: str, point: "pd.core.frame._PandasNamedTuple") -> None:  # type: ignore[name-defined]
        at = (point.flops_per_byte, point.gflop_per_s)
        after = not point.name.endswith("k = 0")
        look = {
            SWEEP: {"s": 12, "color": MEASURED},
            OPERATORS: {"s": 14, "color": "#999999"},
            GIVEN: {"s": 25, "color": "black", "marker": "D"},
            WINDOWS: {
                "s": AREA * point.window_share,
                "color": AFTER if after else BEFORE,
                "marker": "s" if point.name.startswith("att") else "o",
                "edgecolor": "white",
                "linewidth": 0.5,
            },
        }[point.kind]
        self.axis.scatter(*at, zorder=5 if point.kind in (WINDOWS, GIVEN) else 3, gid=name, **look)
        tip = (
            f"{point.name} ({point.level}): {number(at[0])} FLOP per byte, {number(at[1])} GFLOP/s, "
            f"{point.percent_of_roof:.0f} % of its roof; limiter: {point.limiter} ({point.provenance})"
        )
        for part in ("", "label-", "leader-"):
            self.marks[part + name] = Mark(tip, (point.kind,))
        if point.kind in (WINDOWS, GIVEN):
            self.labels.insert(0, Label(f"{point.name} ({point.level})", [at], name, radius=np.sqrt(look["s"]) / 2))
        self.hidden.append(np.repeat([at], 4, axis=0))


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def slug(name: str) -> str:
    """For ids."""
    return re.sub(r"\W+", "-", name)


def _color(roof: Ceiling) -> str:
    if roof.kind in ("link", "cap"):
        return LINK
    return GPU if roof.device == "gpu" else CPU
