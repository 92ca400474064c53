"""The roofline in characters, log-log, for a terminal."""

from math import log10
from string import ascii_letters

from specmoeoff.report.points import roofline_points
from specmoeoff.roofline.curves import ceilings, frame, ridge, summit
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile

WIDTH, HEIGHT = 68, 18


def terminal_roofline(profile: HardwareProfile, plan: Plan | None, model: ModelSpec | None) -> str:
    """Slopes as letters, peaks as lines, points as `o`; below it the letters' levels with GB/s and ridge."""
    roofs = ceilings(profile, plan.limits.disk_limit_gb_per_s if plan else None)
    points = roofline_points(profile, roofs, plan, model, None)
    x_low, x_high, y_low, y_high = frame(roofs)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]

    def column(x: float) -> int:
        return round((WIDTH - 1) * log10(x / x_low) / log10(x_high / x_low))

    def put(x: float, y: float, mark: str) -> None:
        row = round((HEIGHT - 1) * log10(y_high / y) / log10(y_high / y_low))
        if 0 <= row < HEIGHT and 0 <= column(x) < WIDTH:
            grid[row][column(x)] = mark

    legend = []
    xs = [x_low * (x_high / x_low) ** (i / (WIDTH - 1)) for i in range(WIDTH)]
    for roof in (r for r in roofs if r.is_peak):
        for x in xs:
            put(x, roof.rate, "." if roof.kind == "gemm" else "-")
        legend.append(f"{'.' if roof.kind == 'gemm' else '-'} {roof.name} {roof.rate:,.4g} {roof.unit}")
    slopes = [r for r in roofs if not r.is_peak]
    for letter, roof in zip(ascii_letters, slopes, strict=False):
        top = summit(roofs, roof.device)
        for x in xs:
            if top is None or x * roof.rate <= top.rate:
                put(x, x * roof.rate, letter)
        knee = f", ridge {ridge(roof.rate, top.rate):,.4g} FLOP/byte" if top else ""
        legend.append(f"{letter} {roof.name} {roof.rate:,.4g} GB/s{knee}")
    for point in points.itertuples():
        put(point.flops_per_byte, point.gflop_per_s, "o")
    if len(points):
        legend.append("o measured operators and predicted windows")
    lines = [f"{'':9}|{''.join(row)}".rstrip() for row in grid]
    lines[0], lines[-1] = f"{y_high:8g} {lines[0][9:]}", f"{y_low:8g} {lines[-1][9:]}"
    ends = f"{x_low:g}".ljust(WIDTH - len(f"{x_high:g}")) + f"{x_high:g}"
    axis = ["GFLOP/s over FLOP per byte, both logarithmic", *lines, f"{'':9}+{'-' * WIDTH}", f"{'':10}{ends}"]
    return "\n".join([*axis, *legend])
