"""Two files, number by number: the worst first, above 1 is better, and a gate for rates."""

import json
from pathlib import Path

import pytest

from specmoeoff.cli import app
from specmoeoff.compare import compare
from specmoeoff.errors import AnswerIsNo, BadInput
from specmoeoff.profiles import find
from specmoeoff.specs.profile import HardwareProfile, Roof
from specmoeoff.specs.record import RunRecord, Window


def scaled(profile: HardwareProfile, name: str, by: float) -> HardwareProfile:
    """One memory roof made faster or slower."""

    def faster(roof: Roof) -> Roof:
        rate = roof.rate.model_copy(
            update={"value": roof.rate.value * by, "samples": tuple(v * by for v in roof.rate.samples)}
        )
        return roof.model_copy(update={"rate": rate})

    roofs = [faster(r) if r.name == name else r for r in profile.memory]
    return profile.model_copy(update={"memory": tuple(roofs)})


@pytest.fixture
def record() -> RunRecord:
    window = Window(
        label="tuned",
        start_s=0.0,
        duration_s=0.5,
        draft_length=4,
        live=16,
        prefill_rows=0,
        rows=80,
        tokens=60,
        mean_context=100.0,
        disk_bytes=0,
        busy_s={},
        phases_s={},
        experts_used=8.0,
    )
    return RunRecord(
        kind="run",
        created="",
        tool_version="0",
        plan_sha256="",
        model_name="m",
        machine_fingerprint="",
        n_requests=1,
        n_tokens=600,
        duration_s=6.0,
        disk_bytes_planned=0,
        disk_bytes_read=0,
        rss_planned_bytes=1000,
        rss_peak_bytes=1000,
        windows=(window,),
    )


@pytest.fixture
def files(shipped: HardwareProfile, record: RunRecord, tmp_path: Path) -> dict[str, Path]:
    slower = record.model_copy(update={"duration_s": 12.0, "rss_peak_bytes": 500})
    contents = {"p": shipped, "slow": scaled(shipped, "dram_read", 0.9), "r": record, "slow-r": slower}
    for name, content in contents.items():
        content.save(tmp_path / f"{name}.json")
    return {name: tmp_path / f"{name}.json" for name in contents}


def call(*arguments: object) -> None:
    app(["compare", *map(str, arguments)], standalone_mode=False)


@pytest.mark.parametrize("name", ["p", "r"])
def test_a_file_equals_itself(files: dict[str, Path], name: str) -> None:
    rows = compare(files[name], files[name])
    assert {r.ratio for r in rows} == {1.0}
    assert len(rows) > 4
    call(files[name], files[name], "--fail-under", "1")


def test_a_slower_roof_comes_first_and_fails_the_gate(files: dict[str, Path]) -> None:
    rows = compare(files["p"], files["slow"])
    assert {r.name for r in rows[:2]} == {"dram_read, 1 threads", "dram_read, 2 threads"}
    assert rows[0].ratio == pytest.approx(0.9)
    with pytest.raises(AnswerIsNo, match=r"below 0.95 of .*: dram_read, . threads 0.900; dram_read, . threads 0.900\."):
        call(files["p"], files["slow"], "--fail-under", "0.95")
    call(files["p"], files["slow"], "--fail-under", "0.89")
    call(files["slow"], files["p"], "--fail-under", "0.95")
    call(files["p"], files["slow"])


def test_above_one_is_better_whatever_the_unit(files: dict[str, Path]) -> None:
    ratios = {r.name: r.ratio for r in compare(files["r"], files["slow-r"])}
    assert ratios["all"] == 0.5
    assert ratios["peak RSS"] == 2.0
    assert ratios["read from disk"] == 1.0


def test_only_rates_are_gated(files: dict[str, Path], record: RunRecord, tmp_path: Path) -> None:
    record.model_copy(update={"rss_peak_bytes": 4000}).save(tmp_path / "fat.json")
    call(files["r"], tmp_path / "fat.json", "--fail-under", "0.95")


def test_json_lists_all(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    call(files["p"], files["slow"], "--json")
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["name"].startswith("dram_read, ")
    assert [r["ratio"] for r in rows] == sorted(r["ratio"] for r in rows)
    assert len(rows) == len(compare(files["p"], files["slow"]))


def test_what_cannot_be_compared_is_said_in_one_sentence(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"kind": ["run"]}')
    for b, words in (
        (files["r"], "is a hardware profile and .* a run record; give two of a kind"),
        (tmp_path / "list.json", "neither a hardware profile nor a run record"),
        (tmp_path / "odd.json", "neither a hardware profile nor a run record"),
        (tmp_path / "broken.json", "not a profile or run record"),
        (tmp_path / "absent.json", "no such profile or run record"),
    ):
        with pytest.raises(BadInput, match=words):
            call(files["p"], b)
    with pytest.raises(BadInput, match="--fail-under nan: give a number"):
        call(files["p"], files["p"], "--fail-under", "nan")


def test_two_gpus_are_compared_by_roofs_links_and_lanes_and_what_one_lacks_is_left_out(tmp_path: Path) -> None:
    a30, h100 = (find("machines", name) for name in ("a30", "h100"))
    ratios = {r.name: r.ratio for r in compare(a30, h100)}
    assert ratios["PCIe lanes"] == pytest.approx(2)
    assert ratios["h2d, pinned, beside nothing"] == pytest.approx(2, rel=1e-3)
    assert ratios["memory_read, GPU"] == pytest.approx(2000 / 933)
    assert not any("latency" in name and "h2d" in name for name in ratios)
    profile = HardwareProfile.load(a30)
    faster = [c.model_copy(update={"latency_s": 8e-6, "gb_per_s": 25.0}) for c in profile.links]
    profile.model_copy(update={"links": tuple(faster)}).save(tmp_path / "measured.json")
    ratios = {r.name: r.ratio for r in compare(tmp_path / "measured.json", tmp_path / "measured.json")}
    assert ratios["h2d, pinned, beside nothing: latency"] == 1
    assert min(r.ratio for r in compare(a30, tmp_path / "measured.json")) == pytest.approx(25 / 31.508)


def test_speeds_that_a_machine_flips_between_are_compared_speed_by_speed(
    made_up_profile: HardwareProfile, tmp_path: Path
) -> None:
    def flipping(value: float, *modes: float) -> HardwareProfile:
        name = "dram_read, 2 threads"
        one = scaled(made_up_profile, "dram_read", value / roof(made_up_profile))
        quality = one.quality.model_copy(update={"modes": {name: modes} if modes else {}})
        return one.model_copy(update={"quality": quality})

    def roof(profile: HardwareProfile) -> float:
        return next(r.rate.value for r in profile.memory if r.name == "dram_read")

    def ratio(a: HardwareProfile, b: HardwareProfile) -> float:
        a.save(tmp_path / "a.json"), b.save(tmp_path / "b.json")
        rows = compare(tmp_path / "a.json", tmp_path / "b.json")
        return next(r.ratio for r in rows if r.name == "dram_read, 2 threads")

    assert ratio(flipping(40.0, 33.0, 58.0), flipping(57.0)) == pytest.approx(57 / 58)
    assert ratio(flipping(40.0, 33.0, 58.0), flipping(55.0, 32.0, 60.0)) == pytest.approx(32 / 33)
    assert ratio(flipping(40.0), flipping(50.0)) == pytest.approx(50 / 40)
