"""The roofline as drawn: read back from its SVG."""

import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.report import write_report
from specmoeoff.report.roofline import number, roofline
from specmoeoff.report.style import Picture
from specmoeoff.report.terminal import terminal_roofline
from specmoeoff.report.write import read_points, svg_text
from specmoeoff.roofline.curves import attainable, ceilings, frame, ridge, summit
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile, Roof

MACHINES = ("shipped", "no disk", "every kind of roof", "GPU", "roofs within two percent", "peaks alone", "nothing")
SVG = "{http://www.w3.org/2000/svg}"


class Drawn:
    """An SVG's groups by id, without the figure's name before them."""

    def __init__(self, svg: str) -> None:
        root = ElementTree.fromstring(svg)
        self.groups = {g.get("id", "").removeprefix("roofline-"): g for g in root.iter(f"{SVG}g") if g.get("id")}

    def texts(self, prefix: str) -> dict[str, str]:
        found = {n: g.find(f"{SVG}text") for n, g in self.groups.items() if n.startswith(prefix)}
        return {n: "".join(text.itertext()) for n, text in found.items() if text is not None}

    def boxes(self) -> dict[str, tuple[float, float, float, float]]:
        return {n: self.extent(n) for n in self.groups if n.startswith("box-")}

    def extent(self, name: str) -> tuple[float, float, float, float]:
        path = self.groups[name].find(f".//{SVG}path")
        assert path is not None
        xy = np.array(re.findall(r"-?[\d.]+", path.get("d", "")), dtype=float).reshape(-1, 2)
        return (*xy.min(0), *xy.max(0))

    def ticks(self, axis: str) -> list[tuple[float, float]]:
        """Power of ten written at each major tick, and where the tick is."""
        found = []
        for name, group in self.groups.items():
            text = "".join(group.itertext()).replace("\N{MINUS SIGN}", "-").split()
            if name.startswith(f"{axis}tick_") and text:
                use = group.find(f".//{SVG}use")
                assert use is not None
                assert "".join(text).startswith("10")
                found.append((float("".join(text)[2:]), float(use.get(axis, ""))))
        return found


@pytest.fixture(scope="module")
def draw(machines: dict[str, HardwareProfile], plan: Plan, target_spec: ModelSpec) -> Callable[[str], Drawn]:
    drawn: dict[str, Drawn] = {}

    def draw(machine: str) -> Drawn:
        if machine not in drawn:
            drawn[machine] = Drawn(svg_text(roofline(machines[machine], plan, target_spec, None)))
        return drawn[machine]

    return draw


@pytest.mark.parametrize("machine", MACHINES)
def test_both_axes_are_logarithmic(draw: Callable[[str], Drawn], machine: str) -> None:
    for axis in "xy":
        powers, places = np.array(draw(machine).ticks(axis)).T
        assert len(powers) >= 3
        step = np.diff(places) / np.diff(powers)
        assert step == pytest.approx(np.full(len(step), step[0]), rel=1e-3)


@pytest.mark.parametrize("machine", MACHINES)
def test_every_roof_and_every_ridge_has_its_number(
    draw: Callable[[str], Drawn], machines: dict[str, HardwareProfile], machine: str
) -> None:
    roofs, texts = ceilings(machines[machine], 1.0), draw(machine).texts("label-")
    written = list(texts.values())
    for roof in roofs:
        assert f"{roof.name} {number(roof.rate)} {roof.unit}" in written
    ridges = [number(ridge(r.rate, top.rate)) for r in roofs if not r.is_peak and (top := summit(roofs, r.device))]
    assert sorted(ridges) == sorted(text for name, text in texts.items() if name.startswith("label-ridge-"))


@pytest.mark.parametrize("machine", MACHINES)
def test_no_two_labels_touch(draw: Callable[[str], Drawn], machine: str) -> None:
    drawn = draw(machine)
    boxes = drawn.boxes()
    assert set(boxes) == {name.replace("label-", "box-") for name in drawn.texts("label-")}
    for (a, (a0, a1, a2, a3)), (b, (b0, b1, b2, b3)) in combinations(boxes.items(), 2):
        assert a2 <= b0 or b2 <= a0 or a3 <= b1 or b3 <= a1, f"{a} meets {b}"
    for name, (x0, y0, x1, y1) in boxes.items():
        text = drawn.groups[name.replace("box-", "label-")].find(f"{SVG}text")
        assert text is not None
        assert x0 <= float(text.get("x", "")) <= x1
        assert y0 <= float(text.get("y", "")) <= y1


def test_what_lies_outside_the_frame_is_told(shipped: HardwareProfile, plan: Plan) -> None:
    def slow(gb_per_s: float) -> Picture:
        limits = plan.limits.model_copy(update={"disk_limit_gb_per_s": gb_per_s})
        return roofline(shipped, plan.model_copy(update={"limits": limits}), None, None)

    knee = number(ridge(0.01, summit(ceilings(shipped), "cpu").rate))
    assert f"disk cap 0.01 GB/s, ridge {knee}" in Drawn(svg_text(slow(0.01))).texts("label-").values()
    assert "Outside the frame, in the table: disk cap 1e-05 GB/s." in slow(1e-5).caption


def test_thirty_levels_find_room(shipped: HardwareProfile, roof: Callable[..., Roof]) -> None:
    rng = np.random.default_rng(0)
    many = tuple(roof(f"level{i}_read", float(10 ** rng.uniform(0, 3))) for i in range(30))
    drawn = Drawn(svg_text(roofline(shipped.model_copy(update={"memory": many}), None, None, None)))
    assert len(drawn.texts("label-roof-")) == len(ceilings(shipped.model_copy(update={"memory": many})))
    for (_, (a0, a1, a2, a3)), (_, (b0, b1, b2, b3)) in combinations(drawn.boxes().items(), 2):
        assert a2 <= b0 or b2 <= a0 or a3 <= b1 or b3 <= a1


def test_a_gpu_has_its_own_roofs_and_its_link(machines: dict[str, HardwareProfile]) -> None:
    roofs = {r.name: r for r in ceilings(machines["GPU"])}
    assert {"PCIe", "GPU L2", "GPU memory", "GPU bf16 gemm", "L1", "DRAM", "disk"} <= set(roofs)
    tops = {name: summit(roofs.values(), roofs[name].device).name for name in ("DRAM", "GPU memory", "PCIe")}
    assert tops == {"DRAM": "bf16 dot", "GPU memory": "GPU bf16 gemm", "PCIe": "GPU bf16 gemm"}


def test_a_library_is_no_roof_of_the_machine(machines: dict[str, HardwareProfile]) -> None:
    roofs = ceilings(machines["every kind of roof"])
    assert {r.name for r in roofs if r.kind == "gemm"} == {"fp32 gemm", "bf16 gemm"}
    assert [r.unit for r in roofs if r.name == "int8 dot"] == ["GOP/s"]
    assert summit(roofs, "cpu") == next(r for r in roofs if r.name == "bf16 dot")


def test_the_machine_alone_decides_the_frame(shipped: HardwareProfile, plan: Plan, target_spec: ModelSpec) -> None:
    far = pd.DataFrame({"name": ["far"], "flops_per_byte": [1e9], "gflop_per_s": [1e-9]})
    pictures = [roofline(shipped, None, None, None), roofline(shipped, plan, target_spec, far)]
    frames = {(*p.figure.axes[0].get_xlim(), *p.figure.axes[0].get_ylim()) for p in pictures}
    assert frames == {frame(ceilings(shipped))}
    assert pictures[1].caption.endswith("Outside the frame, in the table: far.")
    told = pictures[1].table.set_index("name")
    assert told.loc["far", ["flops_per_byte", "gflop_per_s", "in_frame"]].tolist() == [1e9, 1e-9, False]


def test_a_point_above_its_roof_stays_there_and_is_flagged(shipped: HardwareProfile) -> None:
    roofs = ceilings(shipped)
    dram = next(r.rate for r in roofs if r.name == "DRAM")
    high = 1.5 * attainable(2.0, dram, summit(roofs, "cpu").rate)
    given = pd.DataFrame({"name": ["high"], "flops_per_byte": [2.0], "gflop_per_s": [high]})
    picture = roofline(shipped, None, None, given)
    row = picture.table.set_index("name").loc["high"]
    assert row["percent_of_roof"] == pytest.approx(150)
    assert row["limiter"].startswith("above its roof: DRAM was faster")
    assert [2.0, high] in [list(c.get_offsets()[0]) for c in picture.figure.axes[0].collections]


def test_areas_are_shares_of_the_window(shipped: HardwareProfile, plan: Plan, target_spec: ModelSpec) -> None:
    picture = roofline(shipped, plan, target_spec, None)
    areas = {c.get_gid(): c.get_sizes()[0] for c in picture.figure.axes[0].collections}
    shown = picture.table[picture.table["in_frame"] == True].reset_index()  # noqa: E712
    windows = shown[shown["kind"] == "windows"]
    assert len(windows) == 6
    per_share = [areas[f"point-{i}"] / share for i, share in windows["window_share"].items()]
    assert per_share == pytest.approx([per_share[0]] * 6)


def test_the_experts_sweep_rises_under_its_roof(shipped: HardwareProfile) -> None:
    table = roofline(shipped, None, None, None).table
    sweep = table[table["kind"] == "expert over rows"]
    assert len(sweep) == len(next(t for t in shipped.operators if t.operator == "expert").grid[0])
    assert sweep["flops_per_byte"].is_monotonic_increasing
    assert sweep["percent_of_roof"].median() < 102


def test_points_may_name_their_level(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("name,flops_per_byte,gflop_per_s,level\nmine,4,10,tape\n")
    with pytest.raises(BadInput, match="line 2: level 'tape' is not a roof; there are DRAM, disk"):
        read_points(path, {"disk", "DRAM"})
    assert read_points(path, {"tape"})["level"].tolist() == ["tape"]


@pytest.mark.parametrize("machine", MACHINES)
def test_the_terminal_shows_every_roof(machines: dict[str, HardwareProfile], machine: str) -> None:
    text = terminal_roofline(machines[machine], None, None)
    for roof in ceilings(machines[machine]):
        assert f" {roof.name} " in text
    assert max(map(len, text.splitlines())) <= 80


def test_all_figures_draw_without_a_gpu(
    shipped: HardwareProfile, plan: Plan, target_spec: ModelSpec, tmp_path: Path
) -> None:
    assert shipped.machine.gpu is None
    names = {p.name for p in write_report(tmp_path / "r.html", shipped, plan, [], model=target_spec)}
    for figure in ("roofline", "throughput", "breakdown", "memory"):
        assert {f"{figure}.svg", f"{figure}.png", f"{figure}.csv"} <= names
