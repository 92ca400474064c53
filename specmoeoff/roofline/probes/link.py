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
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cpu import aligned_empty
from specmoeoff.kernels.cpu.probes import Move, is_supported
from specmoeoff.roofline.fits import fit_transfer
from specmoeoff.specs.profile import LinkCurve

KIB, MIB = 1 << 10, 1 << 20
SIZES = tuple(4 * KIB << k for k in range(19))
PATTERN_BYTES = 2 * MIB - 1  # no whole number of blocks, so that exchanged ones are seen
DRAM_BYTES = 512 * MIB
ROW_S = 2e-3
# One copy of 1 GiB takes longer than a hundred small ones; more than 512 would near the launch queue's depth of 1024.
FEWEST, MOST = 4, 512
WARM = 4
STRIDE = 64 * KIB  # successive copies start this far apart, so that small ones do not hit the same cached lines
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


class Device(Protocol):
    """What the probe needs of a GPU. Times are seconds of one copy of `n_bytes`.

    `against`: meanwhile the other direction copies at least twice as much.
    """

    def in_a_row(self, way: Way, n_bytes: int, n_copies: int, against: bool) -> float:
        """By the GPU's clock, of many back to back."""

    def waited_for(self, way: Way, n_bytes: int, against: bool) -> float:
        """By the host's clock, from the call until it is done."""

    def deliver(self, way: Way, data: np.ndarray) -> np.ndarray:
        """Put `data` (uint8) at the source, clear the destination, copy as timed copies do; what is there then."""


def measure_links(budget_s: float) -> list[LinkCurve]:
    """All twelve curves of the first GPU in about `budget_s` seconds. Raises MissingCapability without one."""
    device = cuda_device()
    with near_gpu():
        return measure_curves(device(), budget_s)


def measure_curves(
    device: Device,
    budget_s: float,
    sizes: Sequence[int] = SIZES,
    dram_read: Reading | None = None,
) -> list[LinkCurve]:
    """{h2d, d2h} x {pinned, pageable} x {alone, other direction too, beside a DRAM read}. Raises CorruptCopy."""
    traffic: dict[Beside, Reading] = {
        "nothing": nullcontext,
        "other_direction": nullcontext,
        "dram_read": dram_read or reading_dram,
    }
    for way, n_bytes in product(WAYS, sizes):
        _verify(device, way, n_bytes)
    curves = []
    for way, (beside, surroundings) in product(WAYS, traffic.items()):
        with surroundings():
            curves.append(_curve(device, way, beside, sizes, budget_s / len(WAYS) / len(traffic)))
    return curves


def _verify(device: Device, way: Way, n_bytes: int) -> None:
    pattern = np.random.default_rng(n_bytes).bytes(min(n_bytes, PATTERN_BYTES))
    sent = np.resize(np.frombuffer(pattern, np.uint8), n_bytes)
    if not np.array_equal(device.deliver(way, sent), sent):
        raise CorruptCopy(
            f"a copy of {n_bytes:,} bytes ({way.direction}, {way.host_memory} memory) arrived changed; check the GPU, "
            "its driver and its slot before measuring again."
        )


def _curve(device: Device, way: Way, beside: Beside, sizes: Sequence[int], budget_s: float) -> LinkCurve:
    """Sizes take turns, so that a disturbance hits a sample of many sizes rather than all of one."""
    against = beside == "other_direction"
    in_a_row: dict[int, list[float]] = {n: [] for n in sizes}
    waited_for: dict[int, list[float]] = {n: [] for n in sizes}
    n_copies = {n: copies_for(device.in_a_row(way, n, FEWEST, against)) for n in sizes}
    end = time.perf_counter() + budget_s
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for n in sizes:
            in_a_row[n].append(device.in_a_row(way, n, n_copies[n], against))
            waited_for[n].append(device.waited_for(way, n, against))
    device_s = tuple(float(np.median(in_a_row[n])) for n in sizes)
    fit = fit_transfer(sizes, device_s)
    return LinkCurve(
        direction=way.direction,
        host_memory=way.host_memory,
        beside=beside,
        sizes_bytes=tuple(sizes),
        device_s=device_s,
        end_to_end_s=tuple(float(np.median(waited_for[n])) for n in sizes),
        latency_s=fit.latency_s,
        gb_per_s=fit.bytes_per_s / 1e9,
        n_half_bytes=fit.n_half_bytes,
        fit_error=fit.fit_error,
    )


def copies_for(seconds_of_one: float) -> int:
    """How many fill two milliseconds, within what a queue holds."""
    return min(max(math.ceil(ROW_S / max(seconds_of_one, 1e-9)), FEWEST), MOST)


@contextmanager
def reading_dram() -> Iterator[None]:
    """All cores but the one that enqueues read memory, as experts computed by the CPU do."""
    n_threads = max(1, len(os.sched_getaffinity(0)) - 1)
    kind = "read_ahead" if is_supported("read_ahead") else "read"
    move, stop = Move(kind, n_threads, aligned_empty(DRAM_BYTES)), threading.Event()

    def read() -> None:
        while not stop.is_set():
            move.run()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def cuda_device() -> Callable[[], "TorchDevice"]:
    """The first GPU, or MissingCapability with the remedy."""
    try:
        import torch
    except ImportError:
        raise MissingCapability(f"{NO_GPU}.") from None
    if not torch.cuda.is_available():
        raise MissingCapability(f"{NO_GPU}.")
    return TorchDevice


@contextmanager
def near_gpu() -> Iterator[None]:
    """Run, and so allocate, on the CPUs at the first GPU's own root of the PCIe tree."""
    import torch

    at, before = torch.cuda.get_device_properties(0), os.sched_getaffinity(0)
    bus = f"{at.pci_domain_id:04x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0"  # type: ignore[attr-defined]
    try:
        near = parse_cpus(Path(f"/sys/bus/pci/devices/{bus}/local_cpulist").read_text())
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
        for _ in range(WARM):
            self._copy(way, n_bytes)
        begin.record(stream)
        for _ in range(n_copies):
            self._copy(way, n_bytes)
        end.record(stream)
        too_late = gate_cycles and gate.query()
        torch.cuda.synchronize()
        return 0.0 if too_late else begin.elapsed_time(end) / 1e3 / n_copies

    def waited_for(self, way: Way, n_bytes: int, against: bool) -> float:
        """One copy, from the call to the stream's end."""
        if against:
            self._interfere(way, n_bytes)
        begun = time.perf_counter()
        self._copy(way, n_bytes)
        self._streams[way.direction].synchronize()
        seconds = time.perf_counter() - begun
        self._torch.cuda.synchronize()
        return seconds

    def deliver(self, way: Way, data: np.ndarray) -> np.ndarray:
        """Through the arenas' beginnings."""
        torch, n_bytes = self._torch, len(data)
        gpu, host = self._gpu[way.direction][:n_bytes], self._host[way][:n_bytes]
        source, target = (host, gpu) if way.direction == "h2d" else (gpu, host)
        source.copy_(torch.from_numpy(data))
        target.fill_(0xCA)
        torch.cuda.synchronize()
        self._copy(way, n_bytes, at=0)
        torch.cuda.synchronize()
        return target.cpu().numpy()

    def _copy(self, way: Way, n_bytes: int, at: int | None = None) -> None:
        if at is None:
            stride = max(STRIDE, n_bytes)
            at = next(self._turn) % (self._arena_bytes // stride) * stride
        gpu, host = self._gpu[way.direction][at : at + n_bytes], self._host[way][at : at + n_bytes]
        source, target = (host, gpu) if way.direction == "h2d" else (gpu, host)
        with self._torch.cuda.stream(self._streams[way.direction]):
            target.copy_(source, non_blocking=True)

    def _interfere(self, way: Way, measured_bytes: int, gate: Any = None) -> None:
        """Few large pinned copies the other way: twice what is measured, and at least some milliseconds."""
        other = Way("d2h" if way.direction == "h2d" else "h2d", "pinned")
        if gate is not None:
            self._streams[other.direction].wait_event(gate)
        slower = 4 if way.host_memory == "pageable" else 1  # than the pinned copies, which are to outlast it
        wanted, chunk = slower * 2 * max(measured_bytes, 64 * MIB), min(self._arena_bytes, 64 * MIB)
        for _ in range(-(-wanted // chunk)):
            self._copy(other, chunk)
