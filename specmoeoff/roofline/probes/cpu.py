"""Arithmetic peaks of the CPU, the bandwidth of every memory level, and latencies."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, compress, product
from pathlib import Path

import numpy as np

from specmoeoff.kernels.cpu import aligned_empty
from specmoeoff.kernels.cpu.probes import MOVES, PEAKS, Chase, Move, Peak, Timed, is_supported, n_forms
from specmoeoff.roofline.timing import JOINT_GAP, joint_modes, measurement, seconds_of
from specmoeoff.specs.profile import Measurement, Roof

KIB, MIB = 1 << 10, 1 << 20
DEFAULT_CACHES = {"l1": 32 * KIB, "l2": 1 * MIB, "l3": 32 * MIB}
SAMPLE_S = 1e-3
PEAK_SAMPLES, CACHE_SAMPLES, LATENCY_SAMPLES = 200, 60, 9
PLACES, TURN = 4, 10
PATTERN = 0x3E  # not zeros, which some memory systems carry for less
ON_CPU = 0.98  # samples during which a thread had to wait for its CPU are dropped, where enough others are left
CONTENDED_SHARE = 0.05  # of the time
SHARED = ("l3", "dram")
CACHE_MOVES = ("read", "store", "copy", "triad")
INTEGER = ("int8_dot", "int8_amx")
MISSING = {
    "fp16_fma": "this CPU has no AVX512-FP16",
    "bf16_dot": "this CPU has no AVX512-BF16",
    "int8_dot": "this CPU has neither AVX512-VNNI nor AVX-VNNI",
    "bf16_amx": "this CPU, or its kernel, has no AMX-BF16",
    "int8_amx": "this CPU, or its kernel, has no AMX-INT8",
}


def cache_bytes() -> dict[str, int]:
    """Data cache sizes as the system tells them, the usual ones where it does not: one L1 and L2, all L3 together."""
    sizes, shared = dict(DEFAULT_CACHES), {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            kind, level = (folder / "type").read_text().strip(), (folder / "level").read_text().strip()
            text = (folder / "size").read_text().strip()
            cpus = (folder / "shared_cpu_list").read_text().strip()
        except OSError:
            continue
        n_bytes = int(text.rstrip("KM")) * (KIB if text.endswith("K") else MIB)
        if kind != "Instruction" and level == "3":
            shared[cpus] = n_bytes
        elif kind != "Instruction" and f"l{level}" in sizes:
            sizes[f"l{level}"] = n_bytes
    return sizes | ({"l3": sum(shared.values())} if shared else {})


@dataclass
class Tally:
    """Seconds of sampling, and of those how many the worst thread waited for its CPU while others had it."""

    seconds: float = 0.0
    waited_s: float = 0.0

    def add(self, found: Iterable[Timed]) -> None:
        """Some samples more."""
        for timed in found:
            self.seconds += timed.seconds
            self.waited_s += timed.seconds * (1.0 - timed.on_cpu)

    @property
    def waited_share(self) -> float:
        """Of the time."""
        return self.waited_s / self.seconds if self.seconds else 0.0


def _undisturbed(found: list[tuple[float, Timed]], tally: Tally) -> list[float]:
    """Rates of the samples during which every thread kept its CPU; of all if hardly any was."""
    kept = [amount / timed.seconds for amount, timed in found if timed.on_cpu >= ON_CPU]
    tally.add(timed for _, timed in found)
    return kept if len(kept) >= 5 else [amount / timed.seconds for amount, timed in found]


def _rounds(run: Callable[[int], Timed], seconds: float = SAMPLE_S) -> int:
    """Rounds that take about so long."""
    run(1)
    rounds = 1
    while (took := run(rounds).seconds) < seconds / 4:
        rounds *= 4
    return max(1, round(rounds * seconds / took))


def peaks(thread_counts: list[int], tally: Tally) -> tuple[list[Roof], dict[str, str]]:
    """Instruction peaks in GFLOP/s (GOP/s for integers), and why others are missing: the most of 200 samples of a
    millisecond. Instructions take turns, so that a neighbour's burst hits all alike."""
    result = []
    names = [name for name in PEAKS if is_supported(name)]
    for n_threads in thread_counts:
        probes = {name: Peak(name, n_threads) for name in names}
        rounds = {name: _rounds(lambda r, p=peak: p.run(r)[1]) for name, peak in probes.items()}  # type: ignore[misc]
        found: dict[str, list[tuple[float, Timed]]] = {name: [] for name in names}
        for _ in range(PEAK_SAMPLES // TURN):
            for name, peak in probes.items():
                found[name] += [peak.run(rounds[name]) for _ in range(TURN)]
        for name in names:
            unit = "GOP/s" if name in INTEGER else "GFLOP/s"
            rates = [rate / 1e9 for rate in _undisturbed(found[name], tally)]
            result.append(Roof(name=name, n_threads=n_threads, rate=measurement(rates, unit, "max")))
    return result, {name: reason for name, reason in MISSING.items() if not is_supported(name)}


def clock_ghz() -> float:
    """The clock as a chain of multiplications shows it: the best of a few samples of a millisecond."""
    chain = Peak("cycles", 1)
    rounds = _rounds(lambda r: chain.run(r)[1])
    return max(cycles / timed.seconds for cycles, timed in (chain.run(rounds) for _ in range(8))) / 1e9


def real_caches(
    told: dict[str, int], rate: Callable[[int], float], dram_rate: float
) -> tuple[dict[str, int], list[str]]:
    """Cache sizes that bandwidth confirms, and a sentence for each that it does not.

    `rate` gives GB/s of reading a working set. Half of the last cache must be faster than memory; if not (hypervisors show
    guests the caches of a whole machine), the largest working set that is tells the size. Faster by half: of a working set twice
    the cache a Zen 5 keeps enough to read it 1.3 to 1.4 times as fast as memory.
    """
    size = told["l3"]
    while size > 2 * told["l2"] and rate(size * 2 // 5) < 1.5 * dram_rate:
        size //= 2
    if size == told["l3"]:
        return told, []
    note = (
        f"the system tells of {told['l3'] // MIB} MiB of L3, but reads are as slow as memory's beyond {size // MIB} MiB"
    )
    return told | {"l3": size}, [note]


@dataclass
class Memory:
    """Bandwidths of every level. DRAM's are sampled again and again: on a shared host they change within seconds."""

    thread_counts: list[int]
    tally: Tally
    caches: dict[str, int] = field(default_factory=cache_bytes)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._huge = aligned_empty(max(4 * min(self.caches["l3"], 128 * MIB), 256 * MIB))
        self._huge[:] = PATTERN
        self._moves: dict[tuple[str, int], Move] = {}
        self._lay_small_pages()
        self._moves |= {
            (f"dram_{move}", n): Move(move, n, self._huge)
            for n in self.thread_counts
            for move in filter(is_supported, MOVES)
        } | {
            (f"dram_{move}_narrow", n): Move(move, n, self._huge, form=-1)
            for n in self.thread_counts
            for move in ("copy", "triad")
            if n_forms(move) > 1
        }
        self._dram: dict[tuple[str, int], list[float]] = {}
        self._cached: dict[tuple[str, int], list[list[float]]] = {}
        self._working_set: dict[tuple[str, int], int] = {key: move.n_bytes for key, move in self._moves.items()}
        for _ in range(4):
            self.sample_dram()
        slow = max(max(self._dram[kind, 1]) for kind in ("dram_read", "dram_read_ahead"))
        self.caches, self.notes = real_caches(
            self.caches, lambda n: max(self._samples("read", 1, self._huge[:n], 10)), slow
        )

    def _lay_small_pages(self) -> None:
        """Anew: how fast small pages are depends on where they happen to lie."""
        self._small = aligned_empty(len(self._huge), huge_pages=False)
        self._small[:] = PATTERN
        self._moves |= {("dram_read_4k", n): Move("read", n, self._small) for n in self.thread_counts}

    def sample_dram(self) -> None:
        """One pass of every kind."""
        for key, move in self._moves.items():
            self._dram.setdefault(key, []).append(move.n_bytes / move.run().seconds / 1e9)

    def measure_caches(self) -> None:
        """Every level by every kind of move that caches hold (non-temporal stores pass them by); `read` in small pages too.
        To be called again some seconds later: neighbours' bursts last one or two."""
        self._lay_small_pages()
        for n in self.thread_counts:
            # Half of what is a core's own: room for the rest of a process. Of L3 eight times L2 a thread: of more, neighbours
            # push some out, and 13 MB of 32 were read at 45 to 63 GB/s within a minute where 4 MB were at 69 to 76.
            sizes = {"l1": self.caches["l1"] // 2, "l2": self.caches["l2"] // 2}
            sizes["l3"] = max(2 * self.caches["l2"], min(8 * self.caches["l2"], self.caches["l3"] * 2 // 5 // n))
            for level, each in sizes.items():
                for suffix, buffer in (("", self._huge), ("_4k", self._small)):
                    for move in filter(is_supported, CACHE_MOVES if not suffix else ("read",)):
                        key = f"{level}_{move}{suffix}", n
                        self._working_set[key] = n * each
                        # Which places of a cache the lines fall on makes up to a tenth of difference: several are tried.
                        for start in self._rng.integers((len(buffer) - n * each) // 4096, size=PLACES) * 4096:
                            part = buffer[start : start + n * each]
                            found = self._samples(move, n, part, CACHE_SAMPLES // PLACES)
                            self._cached.setdefault(key, []).append(found)

    def _samples(self, move: str, n_threads: int, part: np.ndarray, n: int) -> list[float]:
        probe = Move(move, n_threads, part)
        rounds = _rounds(probe.run)
        found = [(probe.n_bytes * rounds / 1e9, probe.run(rounds)) for _ in range(n)]
        return _undisturbed(found, self.tally)

    def finish(self) -> list[Roof]:
        """All roofs. Of caches the most; of DRAM the upper quartile, since neighbours on the same memory slow many samples and
        speed none up. `dram_read` is the better of plain reads and fetching ahead; copies and triads are the better of wide and
        narrow instructions, whose many small steps some prefetchers follow more closely."""
        rates = self._rates()
        return [
            Roof(
                name=name,
                n_threads=n,
                rate=measurement(list(chain(*turns)), "GB/s", "p75" if name.startswith("dram") else "max"),
                working_set_bytes=self._working_set[name, n],
            )
            for (name, n), turns in rates.items()
        ]

    def modes(self) -> dict[str, tuple[float, float]]:
        """GB/s (upper quartiles) of the bandwidths that flip between two, by "roof, threads": where a host lets two cores share
        a memory port, or a busy cache, all that use it are slow together, for seconds."""
        rates, found = self._rates(), {}
        for level, n_threads in product(SHARED, self.thread_counts):
            kin = {key: turns for key, turns in rates.items() if key[1] == n_threads and key[0].startswith(f"{level}_")}
            medians = np.array([[np.median(turn) for turn in turns] for turns in kin.values()])
            if not kin or (fast := joint_modes(medians)) is None:
                continue
            for (name, _), turns in kin.items():
                slow, quick = (float(np.percentile([*chain(*compress(turns, which))], 75)) for which in (~fast, fast))
                if quick > (1 + JOINT_GAP) * slow:
                    found[f"{name}, {n_threads} threads"] = slow, quick
        return found

    def _rates(self) -> dict[tuple[str, int], list[list[float]]]:
        """GB/s of every kind of move and number of threads, by turn."""
        dram = dict(self._dram)
        for way in ("ahead", "narrow"):
            for name, n in [key for key in dram if key[0].endswith(f"_{way}")]:
                plain = name.removesuffix(f"_{way}"), n
                dram[plain] = [max(pair) for pair in zip(dram[plain], dram.pop((name, n)), strict=True)]
        return self._cached | {key: [[rate] for rate in rates] for key, rates in dram.items()}


def latencies(caches: dict[str, int]) -> dict[str, Measurement]:
    """Seconds of one dependent access at every level: a random cycle over lines of half of L1 or L2, of four times L2 for L3
    (more, and neighbours of the shared cache push some out), and of four times L3. As with rates, the least of caches and
    the lower quartile of DRAM: neighbours only slow."""
    sizes = {"l1": caches["l1"] // 2, "l2": caches["l2"] // 2, "l3": 4 * caches["l2"], "dram": 4 * caches["l3"]}
    return {level: _latency(n_bytes, "p25" if level == "dram" else "min") for level, n_bytes in sizes.items()}


def _latency(n_bytes: int, statistic: str) -> Measurement:
    n_lines = n_bytes // 64
    order = np.random.default_rng(0).permutation(n_lines)
    links = aligned_empty(n_lines * 64).view(np.int64)
    links[order * 8] = np.roll(order, -1) * 8
    chase = Chase(links)
    steps = 200_000
    chase.follow(max(2 * n_lines, steps) if n_bytes < 16 * MIB else steps)
    return measurement(
        [seconds_of(lambda: chase.follow(steps)) / steps for _ in range(LATENCY_SAMPLES)], "s", statistic
    )
