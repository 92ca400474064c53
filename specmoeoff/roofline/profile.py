"""Puts the probes together into a hardware profile."""

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path

from specmoeoff import __version__
from specmoeoff.errors import AnswerIsNo, SpecMoEOffError
from specmoeoff.kernels.cpu import default_isa, supported_isas
from specmoeoff.roofline.probes import cpu as cpu_probes
from specmoeoff.roofline.probes.disk import measure_disk, test_file
from specmoeoff.roofline.probes.operators import measure_operators, slowdown_beside_disk
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile, Machine, OperatorTable, Roof

GIB = 1 << 30
BUSY_PRESSURE = 20.0
RUNTIME_IMPORTS = (
    "import specmoeoff.cli, specmoeoff.runtime.validate, specmoeoff.runtime.batch_run, rich.progress, jinja2"
)
Progress = Callable[[str, float], None]


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _gpu_name() -> str | None:
    """As the driver tells it, without loading any library into this process."""
    folders = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for path in folders:
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.split(":", 1)[1].strip()
    return None


@cache
def machine() -> Machine:
    """Who we are; asked once."""
    ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n_cores, isa, name, gpu = len(os.sched_getaffinity(0)), default_isa(), _cpu_name(), _gpu_name()
    l3_bytes = cpu_probes.cache_bytes()["l3"]
    identity = f"{name}|{n_cores}|{isa}|{l3_bytes}|{round(ram_bytes / GIB)}|{gpu}"
    return Machine(
        cpu=name,
        n_cores=n_cores,
        isa=isa,
        isas=supported_isas(),
        l3_bytes=l3_bytes,
        ram_bytes=ram_bytes,
        gpu=gpu,
        system=f"{platform.system()} {platform.release()}",
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16],
    )


def runtime_process_bytes(checkpoint: Path | None) -> int:
    """Peak memory of a process that has imported what a run imports and opened the tokenizer, and done nothing."""
    use = f"specmoeoff.runtime.tokenizer.Tokenizer({str(checkpoint)!r}).encode('a')" if checkpoint else "0"
    code = f"{RUNTIME_IMPORTS}\nkept = {use}\nfrom specmoeoff.runtime.process import peak_rss_bytes\nprint(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _pressure() -> float | None:
    """Share of the last ten seconds in which some task waited for a CPU, in percent."""
    try:
        return float(Path("/proc/pressure/cpu").read_text().split("avg10=")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None


def _quality(memory: Sequence[Roof], pressure: float | None) -> list[str]:
    notes = []
    if pressure is not None and pressure > BUSY_PRESSURE:
        notes.append(f"the CPU was busy with other work ({pressure:.0f} % pressure): rates may be too low")
    levels = ("l1_read", "l2_read", "l3_read", "dram_read")
    for n_threads in sorted({r.n_threads for r in memory}):
        rates = [r.rate.value for level in levels for r in memory if (r.name, r.n_threads) == (level, n_threads)]
        if any(inner < outer for inner, outer in pairwise(rates)):
            notes.append(
                f"memory levels are out of order with {n_threads} threads: {', '.join(f'{r:.0f}' for r in rates)} GB/s"
            )
    return notes


def measure_profile(
    models: Sequence[ModelSpec],
    budget_s: float = 60.0,
    disk_file: Path | None = None,
    progress: Progress = lambda what, share: None,
    strict: bool = False,
    checkpoint: Path | None = None,
) -> HardwareProfile:
    """Measure for about `budget_s` seconds. Without models only the machine itself is measured.

    `disk_file` is read if given; `checkpoint` is a folder whose tokenizer counts as part of a running process.
    """
    begun = time.perf_counter()
    me, waived, pressure = machine(), {}, _pressure()
    counts = sorted({1, me.n_cores})
    progress("arithmetic peaks", 0.0)
    peaks = cpu_probes.peaks(counts, 0.004 * budget_s)
    progress("memory", 0.05)
    memory = cpu_probes.memory(counts, 0.006 * budget_s)
    latency = cpu_probes.dram_latency()
    progress("disk", 0.25)
    disk = slowdown = None
    try:
        with test_file(disk_file) as file:
            disk = measure_disk(file, 0.15 * budget_s)
            progress("compute beside the disk", 0.4)
            if models:
                slowdown = slowdown_beside_disk(models[0], me.n_cores, file, disk.n_readers, disk.chunk_bytes)
    except (SpecMoEOffError, OSError) as error:
        waived["disk"] = str(error)
    tables: list[OperatorTable] = []
    todo = [(spec, n) for n in reversed(counts) for spec in models]
    for i, (spec, n_threads) in enumerate(todo):
        progress(f"operators of {spec.name}, {n_threads} threads", 0.45 + 0.55 * i / len(todo))
        few = n_threads != me.n_cores
        tables += measure_operators(spec, n_threads, 0.5 * budget_s / len(todo), rounds=3 if few else 9)
        memory = [cpu_probes.dram_read_again(r) if r.name == "dram_read" else r for r in memory]
    if me.gpu is None:
        waived["gpu"] = "no NVIDIA driver; experts are streamed from disk into memory instead"
    notes = _quality(memory, pressure)
    if strict and notes:
        raise AnswerIsNo(f"the machine could not be measured well: {'; '.join(notes)}.")
    return HardwareProfile(
        name=f"{me.cpu}, {me.n_cores} cores",
        machine=me,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=__version__,
        duration_s=time.perf_counter() - begun,
        peaks=tuple(peaks),
        memory=tuple(memory),
        dram_latency_s=latency,
        disk=disk,
        operators=tuple(tables),
        cpu_slowdown_beside_disk=slowdown,
        process_bytes=runtime_process_bytes(checkpoint),
        waived=waived,
        quality=tuple(notes),
    )
