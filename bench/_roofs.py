"""The limit of the moment, and samples taken beside it: what every benchmark here is judged by."""

from collections.abc import Callable, Mapping

import numpy as np

from specmoeoff.kernels import cpu
from specmoeoff.kernels.cpu.probes import Move, Peak, is_supported
from specmoeoff.roofline.timing import seconds_of

READ_BYTES = 192 << 20  # over four times the L3; what is measured walks through as much
WANTED, MOST = 15, 60
DRIFT = 0.05
PEAK_ROUNDS = 20000


class Roof:
    """What the machine can do at this moment: bytes read per second, operations of one kind per second, or where it has none of
    that kind, of fp32."""

    def __init__(self, n_threads: int, peak: str) -> None:
        buffer = cpu.aligned_empty(READ_BYTES, huge_pages=True)
        buffer[:] = 0x3E
        self._reads = [Move(kind, n_threads, buffer) for kind in ("read", "read_ahead")]
        self._peak = Peak(peak if is_supported(peak) else "fp32_fma", n_threads)

    def rates(self) -> tuple[float, float]:
        """(bytes/s, operations/s)."""
        rate = max(read.n_bytes / read.run().seconds for read in self._reads)
        return rate, max(ops / timed.seconds for ops, timed in (self._peak.run(PEAK_ROUNDS) for _ in range(4)))


def inside(*names: str) -> Callable[[Callable[[], object]], float]:
    """Seconds that a call spends in these functions of the C library. What goes before in Python, checks of every argument, takes
    some 15 us a call where caches still hold it and 40 to 110 us where other samples have pushed it out."""
    library, spent = cpu._library(), [0.0]

    def timed(function: Callable[..., object]) -> Callable[..., None]:
        return lambda *arguments: spent.__setitem__(0, spent[0] + seconds_of(lambda: function(*arguments)))

    for name in names:
        setattr(library, name, timed(getattr(library, name)))

    def measure(call: Callable[[], object]) -> float:
        spent[0] = 0.0
        call()
        return spent[0]

    return measure


class Samples:
    """Seconds of `ours` and of the roof beside it, of every peer, and the median rates."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.roof: list[float] = []
        self.peers: dict[str, list[float]] = {}
        self.rates: list[tuple[float, float]] = []

    def best_peer(self) -> tuple[str, float]:
        """Name and median seconds; ("", nan) of none."""
        medians = {name: float(np.median(seconds)) for name, seconds in self.peers.items()}
        name = min(medians, key=lambda n: medians[n], default="")
        return name, medians.get(name, float("nan"))


def take_turns(
    ours: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    roof: Roof,
    n_bytes: float,
    operations: float,
    measure: Callable[[Callable[[], object]], float] = seconds_of,
) -> Samples:
    """Roof, ours, roof, peers, and again, until WANTED pairs had a roof that moved by no more than DRIFT. `measure`: of ours."""
    found = Samples()
    found.peers = {name: [] for name in peers}
    for work in (ours, *peers.values()):
        work()
    for _ in range(MOST):
        before = roof.rates()
        seconds = measure(ours)
        after = roof.rates()
        for name, peer in peers.items():
            found.peers[name].append(seconds_of(peer))
        limits = [max(n_bytes / b, operations / o) for b, o in (before, after)]
        if abs(limits[1] / limits[0] - 1) <= DRIFT:
            found.ours.append(seconds)
            found.roof.append(sum(limits) / 2)
            found.rates += [before, after]
        if len(found.ours) == WANTED:
            break
    else:
        print(f"only {len(found.ours)} of {MOST} samples had a steady roof")
    return found
