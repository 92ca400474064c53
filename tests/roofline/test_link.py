"""The probes of link and GPU find what a made-up device does, and a copy that goes wrong is not timed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from specmoeoff.errors import MissingCapability
from specmoeoff.roofline.probes import gpu, link, pcie
from specmoeoff.roofline.probes.link import CorruptCopy, Waited, Way, copies_for, copying, measure_curves, parse_cpus
from specmoeoff.roofline.probes.pcie import PcieLink
from specmoeoff.roofline.timing import modes

KIB, MIB = 1 << 10, 1 << 20
SIZES = tuple(4 * KIB << k for k in range(12))
LATENCY_S = {"pinned": 8e-6, "pageable": 30e-6}
GB_PER_S = {"pinned": 25.0, "pageable": 9.0}
BESIDE_OTHER, BESIDE_READ, TO_HOST = 0.8, 0.7, 0.9
WAIT_S, API_S = 5e-6, 3e-6


def torch_with_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


class FakeDevice:
    """Keeps to a line, with noise that lengthens."""

    def __init__(self, seed: int = 0, noise: float = 0.02) -> None:
        self.calls: list[tuple[str, Way, int]] = []
        self.n_copies: dict[int, set[int]] = {}
        self.dram_is_read = False
        self._rng, self._noise = np.random.default_rng(seed), noise

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.dram_is_read = True
        yield
        self.dram_is_read = False

    def rate(self, way: Way, against: bool) -> float:
        shares = (BESIDE_OTHER if against else 1, BESIDE_READ if self.dram_is_read else 1)
        return GB_PER_S[way.host_memory] * 1e9 * np.prod(shares) * (TO_HOST if way.direction == "d2h" else 1)

    def in_a_row(self, way: Way, n_bytes: int, n_copies: int, against: bool) -> float:
        self.calls.append(("row", way, n_bytes))
        self.n_copies.setdefault(n_bytes, set()).add(n_copies)
        noise = 1 + self._noise * abs(self._rng.standard_normal())
        return (LATENCY_S[way.host_memory] + n_bytes / self.rate(way, against)) * noise

    def waited_for(self, way: Way, n_bytes: int, against: bool) -> Waited:
        return Waited(API_S, self.in_a_row(way, n_bytes, 1, against) + WAIT_S)

    def deliver(self, way: Way, data: np.ndarray) -> np.ndarray:
        self.calls.append(("verify", way, len(data)))
        return data.copy()


def test_every_curve_finds_the_devices_latency_and_rate_in_its_surroundings() -> None:
    device = FakeDevice()
    curves = measure_curves(device, 0.0, SIZES, device.reading)
    assert len({(c.direction, c.host_memory, c.beside) for c in curves}) == len(curves) == 12
    for curve in curves:
        device.dram_is_read = curve.beside == "dram_read"
        true = device.rate(Way(curve.direction, curve.host_memory), curve.beside == "other_direction")
        assert curve.gb_per_s == pytest.approx(true / 1e9, rel=0.05)
        latency_s = LATENCY_S[curve.host_memory] + (WAIT_S if curve.host_memory == "pageable" else 0)
        assert curve.latency_s == pytest.approx(latency_s, rel=0.05)
        assert curve.n_half_bytes == pytest.approx(latency_s * true, rel=0.1)
        assert curve.fit_error < 0.05
        assert tuple(p.n_bytes for p in curve.points) == SIZES


def test_each_size_keeps_every_sample_of_its_three_times() -> None:
    device = FakeDevice()
    for point in measure_curves(device, 0.0, SIZES, device.reading)[0].points:
        times = (point.api_s, point.device_s, point.end_to_end_s)
        assert [(t.unit, t.statistic, len(t.samples)) for t in times] == [("s", "median", link.MIN_ROUNDS)] * 3
        assert point.device_s.value == pytest.approx(np.median(point.device_s.samples), rel=1e-5)
        assert point.api_s.value == API_S
        assert point.end_to_end_s.value - point.device_s.value < WAIT_S + 0.05 * point.device_s.value


def test_the_link_is_asked_while_the_device_copies_and_every_curve_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()

    def ask(bus: str) -> PcieLink:
        n_calls = len(device.calls)
        while len(device.calls) < n_calls + 3:
            pass
        return {"0000:65:00.0": PcieLink(4, 8)}[bus]

    monkeypatch.setattr(pcie, "ask", ask)
    curves = measure_curves(device, 0.0, SIZES, device.reading, bus="0000:65:00.0")
    assert {(c.pcie_generation, c.pcie_width) for c in curves} == {(4, 8)}
    notes = link.impossible(curves)
    rate = f"{SIZES[-1] / curves[0].points[-1].end_to_end_s.value / 1e9:.1f} GB/s"
    assert notes[0] == f"h2d copies of pinned memory beside nothing, {rate}, are faster than the 15.8 of PCIe 4.0 x8"
    assert not link.impossible(measure_curves(device, 0.0, SIZES, device.reading))
    swapped = [
        c.model_copy(update={"host_memory": {"pinned": "pageable", "pageable": "pinned"}[c.host_memory]})
        for c in curves
    ]
    assert len([n for n in link.impossible(swapped) if n.endswith("are faster than those of pinned memory")]) == 6


def test_intervals_hold_the_link_that_made_the_data_at_about_their_rate() -> None:
    """Noise of 3 % that only lengthens: the typical copy takes 1 + 0.03 * 0.6745 of the ideal one, the median of it."""
    typical, held = 1 + 0.03 * 0.6745, []
    for seed in range(100):
        device = FakeDevice(seed, noise=0.03)
        points = link._points(device, Way("h2d", "pinned"), False, link.SIZES, 0.0)
        curve = link._fitted(Way("h2d", "pinned"), "nothing", points, PcieLink())
        assert (curve.latency_s, curve.gb_per_s) == pytest.approx((8e-6, 25.0), rel=0.05)
        (short, long), (slow, fast) = curve.latency_interval_s, curve.interval_gb_per_s
        held.append((short <= 8e-6 * typical <= long, slow <= 25 / typical <= fast))
        assert long - short < 0.1 * curve.latency_s
        assert fast - slow < 0.1 * curve.gb_per_s
    assert np.all(np.abs(np.mean(held, axis=0) - 0.95) < 0.05)


def test_every_size_both_ways_is_verified_before_anything_is_timed() -> None:
    device = FakeDevice()
    measure_curves(device, 0.0, SIZES, device.reading)
    kinds = [kind for kind, _, _ in device.calls]
    n_verified = 4 * len(SIZES)
    assert kinds == ["verify"] * n_verified + ["row"] * (len(kinds) - n_verified)
    assert len(set(device.calls[:n_verified])) == n_verified


def test_small_copies_are_many_and_large_ones_few() -> None:
    assert [copies_for(s) for s in (1e-9, 7e-6, 3e-4, 0.04)] == [512, 286, 7, 1]
    assert link.SIZES[0] == 4 * KIB
    assert (link.SIZES[-1], len(link.SIZES)) == (1024 * MIB, 19)


def test_operators_can_be_measured_beside_copies_to_the_gpu() -> None:
    device = FakeDevice()
    with copying(device):
        while len(device.calls) < 3:
            time.sleep(0.001)
    n_calls = len(device.calls)
    time.sleep(0.01)
    assert len(device.calls) == n_calls
    assert {(what, way) for what, way, _ in device.calls} == {("row", Way("h2d", "pinned"))}


def test_copies_that_fail_beside_another_measurement_are_told() -> None:
    class Broken(FakeDevice):
        def in_a_row(self, way: Way, n_bytes: int, n_copies: int, against: bool) -> float:
            raise MissingCapability("the GPU's queue ran before it was filled")

    with pytest.raises(MissingCapability, match="queue ran"), copying(Broken()):
        time.sleep(0.01)


class OneByteOff(FakeDevice):
    def deliver(self, way: Way, data: np.ndarray) -> np.ndarray:
        there = super().deliver(way, data)
        if (way, len(data)) == (Way("d2h", "pageable"), 64 * KIB):
            there[40_000] ^= 1
        return there


class CopiesNothing(FakeDevice):
    def deliver(self, way: Way, data: np.ndarray) -> np.ndarray:
        return np.full_like(data, 0xCA)


class ExchangesBlocks(FakeDevice):
    def deliver(self, way: Way, data: np.ndarray) -> np.ndarray:
        return np.roll(data, 2 * MIB) if len(data) == 8 * MIB else data


@pytest.mark.parametrize(
    ("device", "named"),
    [
        (OneByteOff(), r"65,536 bytes \(d2h, pageable memory\)"),
        (CopiesNothing(), r"4,096 bytes \(h2d, pinned memory\)"),
        (ExchangesBlocks(), r"8,388,608 bytes \(h2d, pinned memory\)"),
    ],
)
def test_a_copy_that_arrives_changed_is_an_error_that_names_it_and_no_rate(device: FakeDevice, named: str) -> None:
    with pytest.raises(CorruptCopy, match=rf"^a copy of {named} arrived changed; check the GPU"):
        measure_curves(device, 0.0, SIZES, device.reading)
    assert not any(kind == "row" for kind, _, _ in device.calls)


def test_memory_is_read_on_other_cores_for_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    monkeypatch.setattr(link, "DRAM_BYTES", 8 * MIB)
    monkeypatch.setattr(link.Move, "run", lambda self: rounds.append(self.n_bytes))
    with link.reading_dram():
        while len(rounds) < 3:
            pass
    n_rounds = len(rounds)
    assert rounds[0] == pytest.approx(8 * MIB, rel=0.01)
    assert len(rounds) == n_rounds


def test_cpus_are_read_as_the_kernel_writes_them() -> None:
    assert parse_cpus("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert parse_cpus("\n") == set()


class FakeGpu:
    """Matrix products at 100 TFLOP/s, memory at 900 GB/s, and no int8."""

    def work(self, name: str) -> gpu.Work | None:
        if name == "int8_gemm":
            return None
        amount, rate = (1e9, 900e9) if name.startswith("memory") else (1e12, 100e12)
        return gpu.Work(amount, lambda n: amount / rate)


def test_the_gpus_roofs_are_amounts_over_time_and_what_lacks_is_waived() -> None:
    roofs = gpu.measure_roofs(FakeGpu(), 0.0)
    assert {r.name for r in roofs} == set(gpu.ROWS) - {"int8_gemm"}
    assert {(r.device, r.n_threads) for r in roofs} == {("gpu", 0)}
    rates = {r.name: (r.rate.value, r.rate.unit) for r in roofs}
    assert rates["bf16_gemm"] == (pytest.approx(100e3), "GFLOP/s")
    assert rates["memory_triad"] == (pytest.approx(900), "GB/s")
    assert all(len(modes(r.rate.samples)) == 1 for r in roofs)
    assert list(gpu.waived_gpu(roofs)) == ["gpu_int8_gemm"]


def test_without_a_gpu_every_row_is_waived_with_a_remedy() -> None:
    assert set(gpu.waived_gpu()) == {f"gpu_{name}" for name in gpu.ROWS}
    assert all("pip install" in reason for reason in gpu.waived_gpu().values())


@pytest.mark.skipif(torch_with_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("measure", [link.measure_links, gpu.measure_gpu])
def test_without_a_gpu_measuring_names_the_remedy(measure: object) -> None:
    with pytest.raises(MissingCapability, match=r"^no CUDA GPU: .* `pip install 'specmoeoff\[cuda12\]'`.*\.$"):
        measure(1.0)  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch_with_gpu(), reason="there is no CUDA GPU")
def test_a_real_link_and_gpu_are_in_physical_order() -> None:
    curves = measure_curves(link.TorchDevice(64 * MIB), 1.0, SIZES, link.reading_dram)
    alone = {c.direction: c.gb_per_s for c in curves if (c.host_memory, c.beside) == ("pinned", "nothing")}
    roofs = {r.name: r.rate.value for r in gpu.measure_gpu(5.0)}
    assert 1 < min(alone.values()) <= max(alone.values()) < roofs["memory_read"]
    assert roofs["fp32_gemm"] < roofs["fp16_gemm"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch_with_gpu(), reason="there is no CUDA GPU")
def test_a_real_pinned_copy_reaches_four_fifths_of_its_lanes_and_no_more_than_all() -> None:
    curve = link.measure_links(3.0)[0]
    assert 0.78 < curve.gb_per_s / curve.pcie_gb_per_s < 1
