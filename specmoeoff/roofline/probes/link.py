"""The link between host and GPU: copies of 4 KiB to 1 GiB, both ways, alone and beside other traffic.

The method is nvbandwidth's (reference/measuring.md, section 3): a blocked queue is filled before it runs, so that no
enqueueing is timed; the interfering copies are twice the measured ones; medians; every size is verified.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count, product
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cpu import aligned_empty
from specmoeoff.kernels.cpu.probes import Move, is_supported
from specmoeoff.roofline.fits import fit_transfer, transfer_intervals
from specmoeoff.roofline.probes.pcie import DEVICES, PcieLink, while_busy
from specmoeoff.roofline.timing import measurement
from specmoeoff.specs.profile import LinkCurve, LinkPoint

KIB, MIB = 1 << 10, 1 << 20
SIZES = tuple(4 * KIB << k for k in range(19))
PCIE_COPY_BYTES = 64 * MIB
VERIFIED_BYTES = 64 * MIB  # longer ones are more of the same, and take seconds to compare
PATTERN_BYTES = 2 * MIB - 1  # no whole number of blocks, so that exchanged ones are seen
DRAM_BYTES, COPY_BYTES = 512 * MIB, 64 * MIB
ROW_S = 2e-3
# One copy of 1 GiB takes longer than a hundred small ones; more than 512 would near the launch queue's depth of 1024.
FEWEST, MOST = 1, 512
WARM = 4
STRIDE = 64 * KIB  # successive copies start this far apart, so that small ones do not hit the same cached lines
FASTER = 1.05  # than pinned copies: no longer scatter
MIN_ROUNDS, MAX_ROUNDS = 3, 21
NO_GPU = "no CUDA GPU: on a machine with one, run `pip install 'specmoeoff[cuda12]'` and profile it there"

Beside = Literal["nothing", "other_direction", "dram_read"]
Reading = Callable[[], AbstractContextManager[None]]


class CorruptCopy(MissingCapability):
    """Other bytes arrived than were sent."""


class Way(NamedTuple):
    """From where to where."""

    direction: Literal["h2d", "d2h"]
    host_memory: Literal["pinned", "pageable"]


WAYS = (Way("h2d", "pinned"), Way("h2d", "pageable"), Way("d2h", "pinned"), Way("d2h", "pageable"))


class Waited(NamedTuple):
    """Seconds of one copy by the host's clock: until the call returned, and until it was done."""

    api_s: float
    end_to_end_s: float


class Device(Protocol):
    """What the probe needs of a GPU. Times are seconds of one copy of `n_bytes`.

    `against`: meanwhile the other direction copies at least twice as much.
    """

    def in_a_row(self, way: Way, n_bytes: int, n_copies: int, against: bool) -> float:
        """By the GPU's clock, of many back to back."""

    def waited_for(self, way: Way, n_bytes: int, against: bool) -> Waited:
        """One alone, by the host's clock."""

    def deliver(self, way: Way, data: np.ndarray) -> np.ndarray:
        """Put `data` (uint8) at the source, clear the destination, copy as timed copies do; what is there then."""


def measure_links(budget_s: float) -> list[LinkCurve]:
    """All twelve curves of the first GPU in about `budget_s` seconds. Raises MissingCapability without one."""
    make, bus = cuda_device(), bus_id()
    with near_gpu(bus):
        return measure_curves(make(), budget_s, bus=bus)


def measure_curves(
    device: Device,
    budget_s: float,
    sizes: Sequence[int] = SIZES,
    dram_read: Reading | None = None,
    bus: str | None = None,
) -> list[LinkCurve]:
    """{h2d, d2h} x {pinned, pageable} x {alone, other direction too, beside a DRAM read}. Raises CorruptCopy.

    bus: where the link's generation and width are asked for.
    """
    traffic: dict[Beside, Reading] = {
        "nothing": nullcontext,
        "other_direction": nullcontext,
        "dram_read": dram_read or reading_dram,
    }
    for way, n_bytes in product(WAYS, sizes):
        if n_bytes <= VERIFIED_BYTES or (n_bytes == max(sizes) and way.host_memory == "pinned"):
            _verify(device, way, n_bytes)
    pcie = while_busy(lambda: device.waited_for(WAYS[0], PCIE_COPY_BYTES, against=False), bus) if bus else PcieLink()
    curves = []
    for way, (beside, surroundings) in product(WAYS, traffic.items()):
        with surroundings():
            points = _points(device, way, beside == "other_direction", sizes, budget_s / len(WAYS) / len(traffic))
        curves.append(_fitted(way, beside, points, pcie))
    return curves


def _verify(device: Device, way: Way, n_bytes: int) -> None:
    pattern = np.random.default_rng(n_bytes).bytes(min(n_bytes, PATTERN_BYTES))
    sent = np.resize(np.frombuffer(pattern, np.uint8), n_bytes)
    if not np.array_equal(device.deliver(way, sent), sent):
        raise CorruptCopy(
            f"a copy of {n_bytes:,} bytes ({way.direction}, {way.host_memory} memory) arrived changed; check the GPU, "
            "its driver and its slot before measuring again."
        )


def _points(device: Device, way: Way, against: bool, sizes: Sequence[int], budget_s: float) -> tuple[LinkPoint, ...]:
    """Sizes take turns, so that a disturbance hits a sample of many sizes rather than all of one."""
    in_a_row: dict[int, list[float]] = {n: [] for n in sizes}
    waited_for: dict[int, list[Waited]] = {n: [] for n in sizes}
    n_copies: dict[int, int] = {}
    for n in sorted(sizes):  # what is longer than one that fills the time does so too
        full = FEWEST in n_copies.values()
        n_copies[n] = FEWEST if full else copies_for(device.in_a_row(way, n, FEWEST, against))
    end = time.perf_counter() + budget_s
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for n in sizes:
            waited = device.waited_for(way, n, against)
            waited_for[n].append(waited)
            # A long pageable copy keeps the host as long as the GPU: once is enough, for together they take most of the time.
            once = n_copies[n] == FEWEST and way.host_memory == "pageable"
            in_a_row[n].append(waited.end_to_end_s if once else device.in_a_row(way, n, n_copies[n], against))
    return tuple(
        LinkPoint(
            n_bytes=n,
            device_s=measurement(in_a_row[n], "s"),
            api_s=measurement([w.api_s for w in waited_for[n]], "s"),
            end_to_end_s=measurement([w.end_to_end_s for w in waited_for[n]], "s"),
        )
        for n in sizes
    )


def _fitted(way: Way, beside: Beside, points: tuple[LinkPoint, ...], pcie: PcieLink) -> LinkCurve:
    """A pageable copy is staged by the host, of which the GPU's clock sees only part."""
    pinned = way.host_memory == "pinned"
    sizes = [point.n_bytes for point in points]
    seconds = [(point.device_s if pinned else point.end_to_end_s).value for point in points]
    fit = fit_transfer(sizes, seconds)
    latency_s, bytes_per_s = transfer_intervals(fit, sizes, seconds) or (None, None)
    return LinkCurve(
        direction=way.direction,
        host_memory=way.host_memory,
        beside=beside,
        points=points,
        latency_s=fit.latency_s,
        latency_interval_s=latency_s,
        gb_per_s=fit.bytes_per_s / 1e9,
        interval_gb_per_s=bytes_per_s and (bytes_per_s[0] / 1e9, bytes_per_s[1] / 1e9),
        fit_error=fit.fit_error,
        pcie_generation=pcie.generation,
        pcie_width=pcie.width,
    )


def impossible(curves: Sequence[LinkCurve]) -> list[str]:
    """What cannot be as measured: largest copies faster than the link's lanes, or than those of pinned memory."""
    rates = {(c.direction, c.beside, c.host_memory): _largest_gb_per_s(c) for c in curves}
    notes = []
    for c in curves:
        rate, lanes = _largest_gb_per_s(c), c.pcie_gb_per_s
        name = f"{c.direction} copies of {c.host_memory} memory beside {c.beside.replace('_', ' ')}, {rate:.1f} GB/s,"
        if lanes and rate > lanes:
            notes.append(f"{name} are faster than the {lanes:.1f} of PCIe {c.pcie_generation}.0 x{c.pcie_width}")
        if rate > FASTER * rates.get((c.direction, c.beside, "pinned"), rate):
            notes.append(f"{name} are faster than those of pinned memory")
    return notes


def _largest_gb_per_s(curve: LinkCurve) -> float:
    return curve.points[-1].n_bytes / curve.points[-1].end_to_end_s.value / 1e9


def copies_for(seconds_of_one: float) -> int:
    """How many fill two milliseconds, within what a queue holds."""
    return min(max(math.ceil(ROW_S / max(seconds_of_one, 1e-9)), FEWEST), MOST)


def reading_dram() -> AbstractContextManager[None]:
    """Meanwhile all cores but the one that enqueues read memory, as experts computed by the CPU do."""
    n_threads = max(1, len(os.sched_getaffinity(0)) - 1)
    kind = "read_ahead" if is_supported("read_ahead") else "read"
    return _meanwhile(Move(kind, n_threads, aligned_empty(DRAM_BYTES)).run)


def copying(device: Device) -> AbstractContextManager[None]:
    """Meanwhile pinned memory is copied to the GPU, as streamed experts are."""
    return _meanwhile(lambda: device.in_a_row(Way("h2d", "pinned"), COPY_BYTES, FEWEST, against=False))


@contextmanager
def _meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """`work` over and over on another thread. Raises what it raised."""
    stop = threading.Event()
    failed: list[MissingCapability] = []

    def repeat() -> None:
        try:
            while not stop.is_set():
                work()
        except MissingCapability as error:
            failed.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def cuda_device() -> "type[TorchDevice]":
    """The first GPU, or MissingCapability with the remedy."""
    try:
        import torch
    except ImportError:
        raise MissingCapability(f"{NO_GPU}.") from None
    if not torch.cuda.is_available():
        raise MissingCapability(f"{NO_GPU}.")
    return TorchDevice


def bus_id() -> str:
    """Of the first GPU, as Linux writes it: 0000:65:00.0."""
    import torch

    at = torch.cuda.get_device_properties(0)
    return f"{at.pci_domain_id:04x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0"  # type: ignore[attr-defined]


@contextmanager
def near_gpu(bus: str) -> Iterator[None]:
    """Run, and so allocate, on the CPUs at the GPU's own root of the PCIe tree."""
    before = os.sched_getaffinity(0)
    try:
        near = parse_cpus((DEVICES / bus / "local_cpulist").read_text())
    except OSError:
        near = set()
    os.sched_setaffinity(0, near & before or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def parse_cpus(text: str) -> set[int]:
    """The CPUs of a list such as 0-3,8."""
    spans = [part.split("-") for part in text.strip().split(",") if part]
    return {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}


class TorchDevice:
    """The first CUDA GPU, through torch. Each direction has its own stream and its own gigabyte at either end."""

    def __init__(self, arena_bytes: int = SIZES[-1]) -> None:
        import torch

        self._torch, self._arena_bytes, self._turn = torch, arena_bytes, count()
        self._streams = {"h2d": torch.cuda.Stream(), "d2h": torch.cuda.Stream(), "gate": torch.cuda.Stream()}
        try:
            self._gpu = {d: torch.ones(arena_bytes, dtype=torch.uint8, device="cuda") for d in ("h2d", "d2h")}
            # Filled, so that no copy meets a page for the first time.
            self._host = {
                Way(d, m): torch.empty(arena_bytes, dtype=torch.uint8, pin_memory=m == "pinned").fill_(1)
                for d in ("h2d", "d2h")
                for m in ("pinned", "pageable")
            }
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise MissingCapability(
                f"the link's buffers of {arena_bytes >> 20:,} MiB (four in memory, two on the GPU) do not fit ({reason}); "
                "free some memory or raise `ulimit -l`."
            ) from None

    def in_a_row(self, way: Way, n_bytes: int, n_copies: int, against: bool) -> float:
        """A pageable copy keeps the host until it is staged, so its queue cannot be filled beforehand."""
        if way.host_memory == "pageable":
            return self._row(way, n_bytes, n_copies, against, gate_cycles=0)
        for patience in (1, 4, 16, 64):
            seconds = self._row(way, n_bytes, n_copies, against, gate_cycles=patience * (2_000_000 + 20_000 * n_copies))
            if seconds:
                return seconds
        raise MissingCapability("the GPU's queue ran before it was filled; stop other work on the CPU and try again.")

    def _row(self, way: Way, n_bytes: int, n_copies: int, against: bool, gate_cycles: int) -> float:
        """Seconds of one copy; 0 where the gate opened before all were enqueued."""
        torch, stream = self._torch, self._streams[way.direction]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        gate = torch.cuda.Event()
        if gate_cycles:
            with torch.cuda.stream(self._streams["gate"]):
                torch.cuda._sleep(gate_cycles)
        gate.record(self._streams["gate"])
        if against:
            self._interfere(way, n_bytes * n_copies, gate)
        stream.wait_event(gate)
        for _ in range(min(WARM, n_copies)):
            self._copy(way, n_bytes)
        begin.record(stream)
        for _ in range(n_copies):
            self._copy(way, n_bytes)
        end.record(stream)
        too_late = gate_cycles and gate.query()
        torch.cuda.synchronize()
        return 0.0 if too_late else begin.elapsed_time(end) / 1e3 / n_copies

    def waited_for(self, way: Way, n_bytes: int, against: bool) -> Waited:
        """Nothing but the copy itself is timed: the stream is entered and the ends are cut out before."""
        if against:
            self._interfere(way, n_bytes)
        source, target = self._ends(way, n_bytes)
        stream = self._streams[way.direction]
        with self._torch.cuda.stream(stream):
            begun = time.perf_counter()
            target.copy_(source, non_blocking=True)
            returned = time.perf_counter()
            stream.synchronize()
            done = time.perf_counter()
        self._torch.cuda.synchronize()
        return Waited(returned - begun, done - begun)

    def deliver(self, way: Way, data: np.ndarray) -> np.ndarray:
        """Through the arenas' beginnings."""
        torch, n_bytes = self._torch, len(data)
        source, target = self._ends(way, n_bytes, at=0)
        source.copy_(torch.from_numpy(data))
        target.fill_(0xCA)
        torch.cuda.synchronize()
        self._copy(way, n_bytes, at=0)
        torch.cuda.synchronize()
        return target.cpu().numpy()

    def _copy(self, way: Way, n_bytes: int, at: int | None = None) -> None:
        source, target = self._ends(way, n_bytes, at)
        with self._torch.cuda.stream(self._streams[way.direction]):
            target.copy_(source, non_blocking=True)

    def _ends(self, way: Way, n_bytes: int, at: int | None = None) -> tuple[Any, Any]:
        """Source and target, at the next place in the arenas if none is given."""
        if at is None:
            stride = max(STRIDE, n_bytes)
            at = next(self._turn) % (self._arena_bytes // stride) * stride
        gpu, host = self._gpu[way.direction][at : at + n_bytes], self._host[way][at : at + n_bytes]
        return (host, gpu) if way.direction == "h2d" else (gpu, host)

    def _interfere(self, way: Way, measured_bytes: int, gate: Any = None) -> None:
        """Few large pinned copies the other way: twice what is measured, and at least some milliseconds."""
        other = Way("d2h" if way.direction == "h2d" else "h2d", "pinned")
        if gate is not None:
            self._streams[other.direction].wait_event(gate)
        slower = 4 if way.host_memory == "pageable" else 1  # than the pinned copies, which are to outlast it
        wanted, chunk = slower * 2 * max(measured_bytes, 64 * MIB), min(self._arena_bytes, 64 * MIB)
        for _ in range(-(-wanted // chunk)):
            self._copy(other, chunk)
