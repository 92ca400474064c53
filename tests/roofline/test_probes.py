"""Probes on a small scale: sane orders, and a reason where something cannot be measured."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.errors import AnswerIsNo, MissingCapability
from specmoeoff.roofline import profile as profiles
from specmoeoff.roofline.doctor import examine
from specmoeoff.roofline.probes import disk, operators
from specmoeoff.roofline.profile import machine, measure_profile
from specmoeoff.specs.model import ModelSpec


def test_the_disk_is_read_past_the_page_cache(tmp_path: Path) -> None:
    from specmoeoff.runtime.process import disk_bytes_read

    path = tmp_path / "data"
    path.write_bytes(os.urandom(16 << 20))
    os.sync()
    before = disk_bytes_read()
    link = disk.Disk(path, 1.0).link()
    assert 0.01 < link.read_gb_per_s.value < 100
    if disk_bytes_read() == before:
        pytest.skip("this file system does not count reads")
    assert disk_bytes_read() - before > 16 << 20


@pytest.mark.usefixtures("quickly")
def test_a_machine_without_direct_reads_has_no_disk_link_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: Path) -> int:
        raise MissingCapability(f"{path}: O_DIRECT reads are not allowed here")

    monkeypatch.setattr(disk, "open_direct", refuse)
    monkeypatch.setenv("SPECMOEOFF_CACHE", str(tmp_path))
    monkeypatch.setattr(disk, "TEST_BYTES", 32 << 20)
    found = measure_profile([], 1.0)
    assert found.disk is None
    assert "O_DIRECT" in found.waived["disk"]
    assert list(tmp_path.iterdir()) == []
    peaks = {r.name: r.rate.value for r in found.peaks if r.n_threads == 1}
    assert peaks["fp32_fma"] > 1
    if machine().isa == "avx512bf16":
        assert peaks["bf16_dot"] > peaks["fp32_fma"]


def test_the_runtime_process_is_counted_with_what_it_imports() -> None:
    assert 20 << 20 < profiles.runtime_process_bytes(None) < 400 << 20


def test_the_doctor_names_a_remedy_for_all_that_is_missing() -> None:
    assert all(f.remedy for f in examine() if f.status == "missing")


def test_libraries_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "LIBRARIES", ("numpy", "no-such-library"))
    assert list(profiles._versions()) == ["numpy"]


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the tests do not look at: caches, and the library's products."""
    monkeypatch.setattr(profiles, "gemm_peaks", lambda counts: ([], {}))
    monkeypatch.setattr(profiles.cpu_probes.Memory, "measure_caches", lambda self: None)


@pytest.mark.usefixtures("quickly")
def test_a_contended_machine_is_marked_and_strictly_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECMOEOFF_CACHE", str(tmp_path))
    monkeypatch.setattr(disk, "TEST_BYTES", 32 << 20)
    monkeypatch.setattr(profiles.cpu_probes, "CONTENDED_SHARE", -1.0)
    found = measure_profile([], 1.0)
    assert found.quality.contended
    assert "other work kept the CPU" in found.quality.notes[0]
    assert len(found.quality.clock_ghz) == 3
    assert 0 < min(found.quality.clock_ghz) <= max(found.quality.clock_ghz) < 10
    with pytest.raises(AnswerIsNo, match="could not be measured well: other work kept the CPU"):
        measure_profile([], 1.0, strict=True)
    assert all(reason for name, reason in found.waived.items() if name.startswith("gpu_"))


@pytest.mark.usefixtures("quickly")
def test_a_disk_that_fails_in_the_middle_is_waived_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECMOEOFF_CACHE", str(tmp_path))
    monkeypatch.setattr(disk, "TEST_BYTES", 32 << 20)
    working, calls = disk.Reader.read, 0

    def fail_later(self: disk.Reader, seconds: float, stop: threading.Event | None = None) -> float:
        nonlocal calls
        calls += 1
        if calls > len(disk.CHUNKS) * len(disk.READERS) * 2:
            raise OSError(5, "Input/output error")
        return working(self, seconds, stop)

    monkeypatch.setattr(disk.Reader, "read", fail_later)
    found = measure_profile([], 1.0)
    assert found.disk is None
    assert "Input/output error" in found.waived["disk"]
    assert any(roof.name == "dram_read" for roof in found.memory)


def test_operators_are_measured_beside_a_lane_that_takes_their_time(target_spec: ModelSpec) -> None:
    busy = threading.Event()
    spec = target_spec.model_copy(
        update={"hidden": 64, "intermediate": 64, "n_heads": 2, "n_kv_heads": 1, "vocab": 256}
    )

    @contextmanager
    def traffic() -> Iterator[None]:
        busy.set()
        yield
        busy.clear()

    spend = operators.after_a_gap
    slower = pytest.MonkeyPatch()
    slower.setattr(operators, "after_a_gap", lambda work: spend(work) * (3.0 if busy.is_set() else 1.0))
    try:
        tables = operators.measure_operators([spec], 1, 0.0, 1, lanes={"disk": traffic})
    finally:
        slower.undo()
    ratios = {(t.operator, s.size): s.ratio.value for t in tables for s in t.beside}
    assert {size for name, size in ratios if name == "expert"} == set(map(float, operators.ROWS_BESIDE))
    assert ("attention", operators.TOKENS_BESIDE) in ratios
    assert 2.0 < float(np.median(list(ratios.values()))) < 4.0
