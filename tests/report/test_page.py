"""The report's page: one file, nothing from the network, its script does what it says, and nothing else is needed for it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from specmoeoff.cli import app
from specmoeoff.errors import MissingCapability
from specmoeoff.kernels import cpu
from specmoeoff.report import write_report
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import Comparison, RunRecord

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(
    shipped: HardwareProfile, plan: Plan, target_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, shipped, plan, [], model=target_spec)
    return path


def test_nothing_is_loaded(page: Path) -> None:
    html = page.read_text()
    loads = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import\s*(\S+)""", html)
    assert {"".join(found)[0] for found in loads} == {"#"}
    assert not re.search(r"<(?:link|iframe|object|embed|img|base)\b|fetch\(|XMLHttpRequest|import\(|sendBeacon", html)
    assert all(not address.startswith("//") for found in loads for address in found)


def test_every_mark_tells_its_numbers(page: Path) -> None:
    titles = re.findall(r'data-groups="([^"]*)"><title>([^<]*)</title>', page.read_text())
    by_group: dict[str, set[str]] = {}
    for group, text in titles:
        by_group.setdefault(group, set()).add(text)
    assert any(re.fullmatch(r"disk cap 1 GB/s; ridge at \S+ FLOP per byte \(given\)", t) for t in by_group["disk cap"])
    told = r"MoE layer, k = 0 \(disk\): \S+ FLOP per byte, \S+ GFLOP/s, \d+ % of its roof; limiter: disk \(predicted\)"
    assert any(re.fullmatch(told, text) for text in by_group["windows"])


def test_a_validations_bias_is_told_apart_from_its_scatter(
    shipped: HardwareProfile, plan: Plan, run_record: RunRecord, tmp_path: Path
) -> None:
    windows = tuple(
        Comparison(name=name, predicted=1.2 * s, measured=s, unit="s", provenance="predicted, recalibrated")
        for name, s in (("plain", 1.0), ("tuned", 2.0))
    )
    write_report(tmp_path / "r.html", shipped, plan, [run_record.model_copy(update={"comparisons": windows})])
    row = re.search(r"<tr><td>window, predicted, recalibrated</td>.*</tr>", (tmp_path / "r.html").read_text())
    assert row
    assert re.findall(r"<td>([^<]*)</td>", row[0])[1:] == ["2", "+20.0 %", "0.0 %", "20.0 %", "", "", "bias"]
    assert pd.read_csv(tmp_path / "r_files" / "accuracy.csv")["bias"].to_list() == pytest.approx([0.2])


def test_what_an_earlier_report_showed_does_not_stay_beside_a_later_one(
    shipped: HardwareProfile, plan: Plan, run_record: RunRecord, tmp_path: Path
) -> None:
    whole = write_report(tmp_path / "r.html", shipped, plan, [run_record])
    (tmp_path / "r_files" / "notes.txt").write_text("a person's own")
    fewer = write_report(tmp_path / "r.html", shipped, None, [])
    assert len(fewer) < len(whole)
    assert {*tmp_path.glob("*.html"), *(tmp_path / "r_files").iterdir()} == {*fewer, tmp_path / "r_files" / "notes.txt"}


def test_ids_are_unique(page: Path) -> None:
    ids = re.findall(r'\sid="([^"]*)"', page.read_text())
    assert len(ids) == len(set(ids))


def chromium(page: Path) -> str:
    """The page as Chromium has it after its scripts, without a network."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    profile = f"--user-data-dir={page.parent / 'chromium'}"
    command = [str(CHROMIUM), *options, profile, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_switch_hides_its_roof_and_pointing_tells_its_numbers(page: Path) -> None:
    play = """<script>
      const box = document.querySelector('.groups input[value="DRAM"]');
      box.click();
      const shown = (g) => [...document.querySelectorAll(`[data-groups="${g}"]`)].filter((m) => m.style.display != 'none').length;
      document.body.dataset.hidden = `${shown('DRAM')} ${shown('L1') > 0}`;
      box.click();
      document.body.dataset.shown = shown('DRAM') > 0;
      document.querySelector('[data-groups="L1"]').dispatchEvent(new MouseEvent('mousemove'));
      document.body.dataset.tip = document.getElementById('tip').textContent;
    </script></body>"""
    played = page.with_name("played.html")
    played.write_text(page.read_text().replace("</body>", play))
    dom = chromium(played)
    assert int(re.search(r'<html[^>]* data-marks="(\d+)"', dom)[1]) > 50  # type: ignore[index]
    body = re.search(r"<body[^>]*>", dom)[0]  # type: ignore[index]
    assert 'data-hidden="0 true"' in body
    assert 'data-shown="true"' in body
    assert re.search(r'data-tip="L1 \S+ GB/s; ridge at \S+ FLOP per byte \(measured here\)"', body)


def test_a_report_needs_no_compiled_kernels(
    shipped: HardwareProfile, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise MissingCapability("no library here")

    monkeypatch.setattr(cpu, "_library", refuse)
    shipped.save(tmp_path / "p.json")
    plan.save(tmp_path / "plan.toml")
    arguments = ["report", "--profile", str(tmp_path / "p.json"), "-o", str(tmp_path / "r.html")]
    app([*arguments, "--plan", str(tmp_path / "plan.toml"), "--terminal"], standalone_mode=False)
    assert (tmp_path / "r.html").exists()


def test_a_profiles_report_does_not_even_look_for_the_kernels(shipped: HardwareProfile, tmp_path: Path) -> None:
    shipped.save(tmp_path / "p.json")
    code = f"""import sys
for name in ("specmoeoff.kernels", "torch", "cupy"): sys.modules[name] = None
from specmoeoff.cli import app
app(["report", "--profile", {str(tmp_path / "p.json")!r}, "-o", {str(tmp_path / "r.html")!r}, "--terminal"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"DRAM \S+ GB/s, ridge \S+ FLOP/byte", done.stdout)
