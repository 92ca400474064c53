"""Shipped facts can be read, say where they are from, and a name stands for its file."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.profiles import find, names
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload

ROOT = Path(__file__).parents[1]
SHEETS = runpy.run_path(str(ROOT / "tools" / "datasheets.py"))
DATASHEETS = sorted(SHEETS["HOSTS"])


def sheet(name: str) -> HardwareProfile:
    return HardwareProfile.load(find("machines", name))


def all_provenances(value: Any) -> set[str]:
    """Of every number in a file's JSON."""
    if isinstance(value, list):
        return set().union(*map(all_provenances, value))
    if isinstance(value, dict):
        return {value.get("provenance", "")} - {""} | all_provenances(list(value.values()))
    return set()


def test_all_that_is_shipped_can_be_read_and_tells_what_it_is() -> None:
    kinds = {name: sheet(name).kind for name in names("machines")}
    assert kinds == {"epyc-zen5-2c": "measured"} | dict.fromkeys(DATASHEETS, "datasheet")
    workloads = {name: Workload.load(find("workloads", name)).kind for name in names("workloads")}
    assert workloads == {"demo": "measured"} | dict.fromkeys(("apps", "cnn-dailymail", "mt-bench"), "published")


def test_a_file_comes_before_a_name_and_what_is_neither_is_refused(tmp_path: Path) -> None:
    assert find("machines", str(tmp_path)) == tmp_path
    with pytest.raises(BadInput, match=r"nothing-like-it: no such file, and no shipped name; .* a30, epyc-zen5-2c"):
        find("machines", "nothing-like-it")


@pytest.mark.parametrize("name", DATASHEETS)
def test_a_datasheet_profile_is_what_the_table_of_facts_makes_it(name: str) -> None:
    assert find("machines", name).read_text() == SHEETS["profile"](name).text(), "run tools/datasheets.py"


@pytest.mark.parametrize("name", DATASHEETS)
def test_no_number_of_a_datasheet_passes_for_measured(name: str) -> None:
    profile = sheet(name)
    assert all_provenances(profile.model_dump(mode="json")) == {"datasheet"}
    numbers = [roof.rate for roof in (*profile.peaks, *profile.memory)]
    numbers += [profile.disk.read_gb_per_s, profile.disk.latency_s]
    assert all(n.note.startswith("source: ") and "datasheet" in n.note for n in numbers)
    assert profile.name.endswith("(datasheet)")
    assert not profile.operators
    assert "operators" in profile.waived


@pytest.mark.parametrize("name", DATASHEETS)
def test_the_farther_from_the_gpu_the_slower(name: str) -> None:
    profile = sheet(name)
    gpu, dram = profile.bandwidth("memory_read", 0), profile.bandwidth("dram_read", profile.machine.n_cores)
    links = {link.direction: link.gb_per_s for link in profile.links}
    assert set(links) == {"h2d", "d2h"}
    assert gpu > dram > max(links.values()) >= min(links.values()) > profile.disk.read_gb_per_s.value
    cpu, fp32, fp16 = (
        profile.peak("fp32_fma", profile.machine.n_cores),
        *map(profile.peak, ("fp32_fma", "fp16_gemm"), (0, 0)),
    )
    assert cpu < fp32 < fp16


def test_facts_of_the_papers_two_machines_and_of_links_are_as_published() -> None:
    a30, rtx = sheet("a30"), sheet("4090d")
    assert (a30.peak("bf16_gemm", 0), a30.bandwidth("memory_read", 0)) == (165_000, 933)
    assert rtx.bandwidth("memory_read", 0) == 1008
    assert [round(sheet(n).links[0].gb_per_s, 1) for n in ("t4", "a30", "h100")] == [15.8, 31.5, 63.0]
    assert sheet("t4").peak("bf16_gemm", 0) is None
    assert "no bf16" in sheet("t4").waived["gpu_bf16_gemm"]
