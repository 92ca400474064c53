"""The PCIe link is read while copies run, from whoever knows it, and is unknown rather than wrong."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from specmoeoff.roofline.probes import pcie
from specmoeoff.roofline.probes.pcie import PcieLink
from specmoeoff.specs.profile import LinkCurve

BUS = "0000:65:00.0"


@pytest.fixture(autouse=True)
def no_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither library, tool nor device."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pcie, "DEVICES", tmp_path)


def nvidia_smi(folder: Path, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def linux(folder: Path, speed: str, width: str = "16") -> None:
    (folder / BUS).mkdir()
    (folder / BUS / "current_link_speed").write_text(f"{speed}\n")
    (folder / BUS / "current_link_width").write_text(f"{width}\n")


def nvml(generation: int, width: int, closed: list[bool]) -> SimpleNamespace:
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: closed.append(True),
        nvmlDeviceGetHandleByPciBusId=lambda bus: {BUS.encode(): "gpu"}[bus],
        nvmlDeviceGetCurrPcieLinkGeneration=lambda gpu: generation,
        nvmlDeviceGetCurrPcieLinkWidth=lambda gpu: width,
    )


def test_where_nobody_knows_it_is_unknown() -> None:
    assert pcie.ask(BUS) == PcieLink(None, None)


def test_the_drivers_library_comes_first_and_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed: list[bool] = []
    monkeypatch.setitem(sys.modules, "pynvml", nvml(5, 16, closed))
    nvidia_smi(tmp_path, "echo 4, 8")
    assert (pcie.ask(BUS), closed) == (PcieLink(5, 16), [True])
    assert pcie.ask("0000:01:00.0") == PcieLink(4, 8)  # not a GPU of the library's


def test_the_drivers_tool_is_asked_about_this_gpu_alone(tmp_path: Path) -> None:
    nvidia_smi(tmp_path, f'[ "$3" = "--id={BUS}" ] && echo "4, 16"')
    assert pcie.ask(BUS) == PcieLink(4, 16)
    assert pcie.ask("0000:01:00.0") == PcieLink()


@pytest.mark.parametrize(
    "script", ["echo '[N/A], [N/A]'", "echo 4", "echo 99, 16", "echo 4, 3", "exit 9", "printf '\\377'"]
)
def test_what_a_tool_says_amiss_is_not_believed_and_linux_is_asked(script: str, tmp_path: Path) -> None:
    nvidia_smi(tmp_path, script)
    assert pcie.ask(BUS) == PcieLink()
    linux(tmp_path, "16.0 GT/s PCIe", "8")
    assert pcie.ask(BUS) == PcieLink(4, 8)


@pytest.mark.parametrize(("speed", "width"), [("Unknown", "16"), ("16.0 GT/s PCIe", "0"), ("7.0 GT/s PCIe", "16")])
def test_what_linux_does_not_know_is_unknown(speed: str, width: str, tmp_path: Path) -> None:
    linux(tmp_path, speed, width)
    assert pcie.ask(BUS) == PcieLink()


def test_a_slow_tool_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pcie, "PATIENCE_S", 0.2)
    nvidia_smi(tmp_path, "exec /bin/sleep 20")
    linux(tmp_path, "8.0 GT/s PCIe")
    begun = time.monotonic()
    assert pcie.ask(BUS) == PcieLink(3, 16)
    assert time.monotonic() - begun < 5


def test_copies_run_before_and_for_as_long_as_the_question_takes(tmp_path: Path) -> None:
    copies: list[float] = []
    nvidia_smi(tmp_path, "/bin/sleep 0.3; echo 4, 16")

    def copy() -> None:
        copies.append(time.monotonic())
        time.sleep(0.01)

    assert pcie.while_busy(copy, BUS) == PcieLink(4, 16)
    assert copies[-1] - copies[0] > 0.25


def test_a_curve_says_what_its_lanes_carry() -> None:
    def lanes(link: PcieLink) -> float | None:
        known = {"pcie_generation": link.generation, "pcie_width": link.width}
        curve = LinkCurve(
            direction="h2d", host_memory="pinned", beside="nothing", latency_s=None, gb_per_s=1.0, **known
        )
        return curve.pcie_gb_per_s

    rates = [lanes(PcieLink(generation, 16)) for generation in (1, 2, 3, 4, 5)]
    assert rates == pytest.approx([4.0, 8.0, 15.75, 31.5, 63.0], abs=0.02)
    assert lanes(PcieLink(4, 8)) == pytest.approx(rates[2])
    assert [lanes(PcieLink()), lanes(PcieLink(6, 16))] == [None, None]
