"""Arithmetic peaks, and the bandwidth and latency of each memory level."""

from pathlib import Path

import numpy as np

from specmoeoff.kernels.cpu import Chase, Kernels, aligned_empty
from specmoeoff.roofline.timing import measurement, sample, seconds_of
from specmoeoff.specs.profile import Measurement, Roof

KIB, MIB = 1 << 10, 1 << 20
DEFAULT_CACHES = {"l1": 32 * KIB, "l2": 1 * MIB, "l3": 32 * MIB}


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


def peaks(thread_counts: list[int], budget_s: float) -> list[Roof]:
    """fp32_fma and bf16_dot in GFLOP/s: the most of many samples of about a millisecond."""
    result = []
    for n_threads in thread_counts:
        kernels = Kernels(n_threads)
        for kind, name in (("fp32", "fp32_fma"), ("bf16", "bf16_dot")):
            rounds = 100_000
            operations = kernels.probe_peak(kind, rounds)
            if operations is None:
                continue
            times = sample(lambda k=kernels, kd=kind, r=rounds: k.probe_peak(kd, r), budget_s, 30)  # type: ignore[misc]
            rate = measurement([operations / t / 1e9 for t in times], "GFLOP/s", "max")
            result.append(Roof(name=name, n_threads=n_threads, rate=rate))
    return result


def memory(thread_counts: list[int], budget_s: float) -> list[Roof]:
    """Read bandwidth of every level, and write and copy of DRAM, in GB/s. Caches: the most; DRAM: the median."""
    caches, dram_bytes = cache_bytes(), _dram_bytes()
    buffer = aligned_empty(dram_bytes)
    result = []
    for n_threads in thread_counts:
        kernels = Kernels(n_threads)
        sizes = {
            "l1_read": n_threads * caches["l1"] // 2,
            "l2_read": n_threads * caches["l2"] // 2,
            "l3_read": min(max(caches["l3"] // 4, 2 * n_threads * caches["l2"]), caches["l3"] // 2),
            "dram_read": dram_bytes,
            "dram_write": dram_bytes,
            "dram_copy": dram_bytes,
        }
        for name, n_bytes in sizes.items():
            kind, part = "stream" if name == "dram_read" else name.split("_")[1], buffer[:n_bytes]
            # Long enough beside the start of the threads: tens of megabytes for each.
            repeats = max(1, (64 * MIB * n_threads if n_bytes < dram_bytes else 0) // n_bytes)
            moved = kernels.probe_memory(kind, part, repeats)
            times = sample(lambda k=kernels, kd=kind, p=part, r=repeats: k.probe_memory(kd, p, r), budget_s, 8)  # type: ignore[misc]
            statistic = "median" if name.startswith("dram") else "max"
            rate = measurement([moved / t / 1e9 for t in times], "GB/s", statistic, f"{n_bytes:,} bytes")
            result.append(Roof(name=name, n_threads=n_threads, rate=rate))
    return result


def _dram_bytes() -> int:
    return max(4 * cache_bytes()["l3"], 256 * MIB)


def dram_read_again(roof: Roof, n_samples: int = 8) -> Roof:
    """The same roof with some more samples: on a shared host DRAM changes speed within seconds."""
    kernels, buffer = Kernels(roof.n_threads), aligned_empty(_dram_bytes())
    moved = kernels.probe_memory("stream", buffer)
    times = [seconds_of(lambda: kernels.probe_memory("stream", buffer)) for _ in range(n_samples)]
    old = roof.rate
    samples = [*old.samples, *(moved / t / 1e9 for t in times)]
    return Roof(name=roof.name, n_threads=roof.n_threads, rate=measurement(samples, old.unit, old.statistic, old.note))


def dram_latency() -> Measurement:
    """Seconds of one dependent access: a random cycle over four times the last cache, a line each."""
    n_lines = 4 * cache_bytes()["l3"] // 64
    order = np.random.default_rng(0).permutation(n_lines)
    links = aligned_empty(n_lines * 64).view(np.int64)
    links[order * 8] = np.roll(order, -1) * 8
    chase, steps = Chase(links), 200_000
    chase.follow(steps)
    return measurement([seconds_of(lambda: chase.follow(steps)) / steps for _ in range(9)], "s")
