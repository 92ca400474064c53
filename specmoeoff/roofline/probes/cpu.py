"""Arithmetic peaks, and the bandwidth and latency of each memory level."""

from pathlib import Path

import numpy as np

from specmoeoff.kernels.cpu import Kernels, aligned_empty
from specmoeoff.roofline.timing import measurement, sample, seconds_of
from specmoeoff.specs.profile import Measurement, Roof

KIB, MIB = 1 << 10, 1 << 20
DEFAULT_CACHES = {"l1": 32 * KIB, "l2": 1 * MIB, "l3": 32 * MIB}


def cache_bytes() -> dict[str, int]:
    """Data cache sizes by level as the system tells them, the usual ones where it does not."""
    sizes = dict(DEFAULT_CACHES)
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, level = (folder / "type").read_text().strip(), (folder / "level").read_text().strip()
            text = (folder / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction" and f"l{level}" in sizes:
            sizes[f"l{level}"] = int(text.rstrip("KM")) * (KIB if text.endswith("K") else MIB)
    return sizes


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
    caches = cache_bytes()
    dram_bytes = max(4 * caches["l3"], 256 * MIB)
    buffer = aligned_empty(dram_bytes)
    result = []
    for n_threads in thread_counts:
        kernels = Kernels(n_threads)
        sizes = {
            "l1_read": n_threads * caches["l1"] // 2,
            "l2_read": n_threads * caches["l2"] // 2,
            "l3_read": caches["l3"] // 4,
            "dram_read": dram_bytes,
            "dram_write": dram_bytes,
            "dram_copy": dram_bytes,
        }
        for name, n_bytes in sizes.items():
            kind, part = name.split("_")[1], buffer[:n_bytes]
            repeats = max(1, (16 * MIB if kind == "read" and n_bytes < 64 * MIB else 0) // n_bytes)
            moved = kernels.probe_memory(kind, part, repeats)
            times = sample(lambda k=kernels, kd=kind, p=part, r=repeats: k.probe_memory(kd, p, r), budget_s, 8)  # type: ignore[misc]
            statistic = "median" if name.startswith("dram") else "max"
            rate = measurement([moved / t / 1e9 for t in times], "GB/s", statistic, f"{n_bytes:,} bytes")
            result.append(Roof(name=name, n_threads=n_threads, rate=rate))
    return result


def dram_latency() -> Measurement:
    """Seconds of one dependent access: a random cycle over four times the last cache, a line each."""
    n_lines = 4 * cache_bytes()["l3"] // 64
    order = np.random.default_rng(0).permutation(n_lines)
    links = aligned_empty(n_lines * 64).view(np.int64)
    links[order * 8] = np.roll(order, -1) * 8
    kernels, steps = Kernels(1), 50_000
    samples = [seconds_of(lambda: kernels.probe_chase(links, steps)) for _ in range(7)]
    # Checking the links once a call costs a pass over them; time only what grows with the steps.
    overhead = min(seconds_of(lambda: kernels.probe_chase(links, 0)) for _ in range(3))
    return measurement([max(0.0, s - overhead) / steps for s in samples], "s")
