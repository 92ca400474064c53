"""`make gpu-check` ends, tells what it found, and runs through without a GPU when rehearsed."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "gpu_check.py"
WITHOUT = "import sys, runpy\nfor m in ('pydantic', 'optuna', 'typer', 'scipy', 'pandas'): sys.modules[m] = None\n"
RUN = f"sys.argv = {{arguments}}\nsys.path.insert(0, {str(TOOL.parent)!r})\nrunpy.run_path({str(TOOL)!r}, run_name='__main__')"


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler here")
def test_the_whole_check_runs_on_a_played_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--rehearse", "--out", str(tmp_path)], capture_output=True, text=True
    )
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: (s["status"], s.get("error")) for name, s in found["sections"].items() if s["status"] != "done"} == {}
    assert done.returncode == 0, done.stdout
    assert found["rehearsal"]
    rows = list(csv.DictReader((tmp_path / "gpu_check.csv").read_text().splitlines()))
    assert len(rows) == sum(len(s["rows"]) for s in found["sections"].values())
    imposed = [row for row in rows if "tokens per second" in row["name"] and row["section"] in ("mixtral", "qwen3")]
    assert imposed
    assert all("imposed" in row["note"] for row in imposed)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler here")
def test_kernels_are_checked_without_the_packages_a_gpu_machine_lacks_and_plans_say_which(tmp_path: Path) -> None:
    for section, status in (("kernels", "done"), ("mixtral", "missing")):
        arguments = [str(TOOL), "--rehearse", "--section", section, "--out", str(tmp_path)]
        subprocess.run([sys.executable, "-c", WITHOUT + RUN.format(arguments=arguments)], check=True)
        found = json.loads((tmp_path / f"{section}.json").read_text())
        assert found["status"] == status
    assert "pydantic" in found["error"]


def test_without_a_gpu_every_section_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--only", "link", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "link: missing" in done.stdout
    assert "no CUDA GPU answers here" in done.stdout


@pytest.mark.slow
def test_a_section_that_hangs_is_ended_and_what_it_found_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(TOOL.parent)!r})\nimport gpu_check\nfrom gpu_sections import Row\n"
        "gpu_check.make_device, gpu_check.GRACE_S = lambda *_: None, 8.0\n"
        "def slow(setting):\n    yield Row('first', 1)\n    time.sleep(600)\n"
        "gpu_check.SECTIONS['machine'] = (slow, 0.0)\ngpu_check.__file__ = __file__\nsys.exit(gpu_check.main())\n"
    )
    command = [sys.executable, str(script), "--only", "machine", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "machine: cut short, 1 rows" in done.stdout
    assert "its time was up" in done.stdout
