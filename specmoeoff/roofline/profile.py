"""Puts the probes together into a hardware profile."""

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

from specmoeoff import __version__
from specmoeoff.errors import AnswerIsNo, SpecMoEOffError
from specmoeoff.kernels.cpu import default_isa, supported_isas
from specmoeoff.roofline.probes import cpu as cpu_probes
from specmoeoff.roofline.probes.disk import Disk, test_file
from specmoeoff.roofline.probes.gpu import measure_gpu, waived_gpu
from specmoeoff.roofline.probes.library import gemm_peaks
from specmoeoff.roofline.probes.link import COPY_BYTES, copying, cuda_device, impossible, measure_links
from specmoeoff.roofline.probes.operators import Traffic, measure_operators
from specmoeoff.roofline.timing import measurement
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import (
    DiskLink,
    HardwareProfile,
    LinkCurve,
    Machine,
    Measurement,
    OperatorTable,
    Quality,
    Roof,
)

GIB = 1 << 30
ABOVE_PEAK = 1.02
LAST_S = 5.0
SHORT_S = 20.0  # a budget no longer than this leaves no time to measure twice
FEWEST_SAMPLES = 4  # of DRAM and disk, however small the budget
GPU_SHARE = 0.4  # of the budget
LIBRARIES = ("numpy", "torch", "optuna", "scipy")
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


def _steal() -> tuple[int, int]:
    """Ticks that the host kept from this machine, and all ticks."""
    try:
        ticks = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    return ticks[7] if len(ticks) > 7 else 0, sum(ticks)


def _disorder(memory: Sequence[Roof]) -> list[str]:
    """Levels that cannot be as measured: an inner one slower than an outer one."""
    notes = []
    levels = ("l1_read", "l2_read", "l3_read", "dram_read")
    for n_threads in sorted({r.n_threads for r in memory}):
        rates = [r.rate.value for level in levels for r in memory if (r.name, r.n_threads) == (level, n_threads)]
        if any(inner < outer for inner, outer in pairwise(rates)):
            notes.append(
                f"memory levels are out of order with {n_threads} threads: {', '.join(f'{r:.0f}' for r in rates)} GB/s"
            )
    return notes


def _above_peak(peaks: Sequence[Roof]) -> list[str]:
    """Library products faster than the instructions they are made of."""
    rates = {(r.name, r.n_threads): r.rate.value for r in peaks}
    notes = []
    for (name, n_threads), rate in rates.items():
        ceilings = [rates.get((f"{name[:4]}_{kind}", n_threads), 0.0) for kind in ("fma", "dot", "amx")]
        if name.endswith("_gemm") and max(ceilings) > 0 and rate > ABOVE_PEAK * max(ceilings):
            notes.append(
                f"{name} with {n_threads} threads, {rate:.0f} GFLOP/s, is above its peak of {max(ceilings):.0f}"
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
    me, pressure, steal = machine(), _pressure(), _steal()
    gpu_s = GPU_SHARE * budget_s if me.gpu else 0.0
    until = begun + budget_s - gpu_s
    waived: dict[str, str] = {}
    counts, tally = sorted({1, me.n_cores}), cpu_probes.Tally()
    progress("arithmetic peaks", 0.0)
    clock = [cpu_probes.clock_ghz()]
    peaks, missing = cpu_probes.peaks(counts, tally)
    clock.append(cpu_probes.clock_ghz())
    products, no_products = gemm_peaks(counts)
    waived |= missing | no_products
    progress("memory", 0.1)
    memory = cpu_probes.Memory(counts, tally)
    memory.measure_caches()
    latency = cpu_probes.latencies(memory.caches)
    tables: list[OperatorTable] = []
    link: DiskLink | None = None
    with ExitStack() as stack:
        progress("disk", 0.2)
        disk = None
        try:
            disk = Disk(stack.enter_context(test_file(disk_file)), 0.05 * budget_s)
        except (SpecMoEOffError, OSError) as error:
            waived["disk"] = str(error)

        n_samples = 0

        def sample_again(deadline: float = until) -> None:
            """DRAM and disk are shared: their samples are spread over the whole of the measurement."""
            nonlocal n_samples
            if n_samples >= FEWEST_SAMPLES and time.perf_counter() > deadline:
                return
            n_samples += 1
            memory.sample_dram()
            if disk:
                disk.sample()

        for _ in range(8):
            sample_again(begun + 0.35 * (until - begun))
        lanes: dict[str, Traffic] = {"disk": disk.reading} if disk else {}
        if me.gpu and models:
            with suppress(SpecMoEOffError):  # told with the GPU's own rows
                lanes["h2d"] = partial(copying, cuda_device()(COPY_BYTES))
        todo = counts[::-1] if models else []
        for i, n_threads in enumerate(todo):
            names = ", ".join(spec.name for spec in models)
            progress(f"operators of {names}, {n_threads} threads", 0.35 + 0.6 * i / len(todo))
            share_s = (until - time.perf_counter()) / (len(todo) - i)
            rounds = 15 if n_threads == me.n_cores else 3
            tables += measure_operators(models, n_threads, share_s, rounds, sample_again, lanes)
        # Bursts of a shared machine's other guests last a second or two: all once more, or as often as is time.
        once_more = until - begun > SHORT_S
        while once_more:
            progress("peaks and caches again", 0.95)
            peaks = _merged(peaks, cpu_probes.peaks(counts, tally)[0])
            memory.measure_caches()
            again = cpu_probes.latencies(memory.caches)
            latency = {level: _pooled(seconds, again[level]) for level, seconds in latency.items()}
            products = _merged(products, gemm_peaks(counts)[0])
            for _ in range(4):
                sample_again()
            once_more = time.perf_counter() < until - LAST_S
        if disk:
            link = disk.link()
            if disk.error:
                waived["disk"] = disk.error
                tables = [t.model_copy(update={"beside": ()}) for t in tables]
    on_gpu, links, no_gpu = _gpu(me.gpu, gpu_s, progress)
    waived |= no_gpu
    clock.append(cpu_probes.clock_ghz())
    roofs = [*memory.finish(), *(r for r in on_gpu if r.rate.unit == "GB/s")]
    stolen, ticks = (now - then for now, then in zip(_steal(), steal, strict=True))
    stolen_share = stolen / ticks if ticks else 0.0
    contended = max(tally.waited_share, stolen_share) > cpu_probes.CONTENDED_SHARE
    busy = f"other work kept the CPU {tally.waited_share:.0%} of the time, and the host {stolen_share:.0%}: medians are too low"
    quality = Quality(
        contended=contended,
        pressure_percent=pressure,
        steal_percent=100 * stolen_share,
        waited_share=tally.waited_share,
        clock_ghz=tuple(clock),
        modes=memory.modes() | ({"disk": link.modes_gb_per_s} if link and len(link.modes_gb_per_s) > 1 else {}),
        notes=(
            *([busy] if contended else []),
            *memory.notes,
            *_disorder(roofs),
            *_above_peak([*peaks, *products]),
            *impossible(links),
        ),
    )
    if strict and quality.notes:
        raise AnswerIsNo(f"the machine could not be measured well: {'; '.join(quality.notes)}.")
    progress("done", 1.0)
    return HardwareProfile(
        name=f"{me.cpu}, {me.n_cores} cores",
        machine=me,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=__version__,
        duration_s=time.perf_counter() - begun,
        peaks=(*peaks, *products, *(r for r in on_gpu if r.rate.unit != "GB/s")),
        memory=tuple(roofs),
        latency_s=latency,
        disk=link,
        links=tuple(links),
        operators=tuple(tables),
        process_bytes=runtime_process_bytes(checkpoint),
        waived=waived,
        quality=quality,
        libraries=_versions(),
    )


def _versions() -> dict[str, str]:
    """Of the libraries that numbers depend on, where installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _pooled(one: Measurement, other: Measurement) -> Measurement:
    return measurement((*one.samples, *other.samples), one.unit, one.statistic, one.note)


def _merged(roofs: list[Roof], again: list[Roof]) -> list[Roof]:
    pairs = zip(roofs, again, strict=True)
    return [one.model_copy(update={"rate": _pooled(one.rate, other.rate)}) for one, other in pairs]


def _gpu(name: str | None, budget_s: float, progress: Progress) -> tuple[list[Roof], list[LinkCurve], dict[str, str]]:
    """Roofs and link of the GPU, and why what is missing is missing."""
    if name is None:
        return [], [], waived_gpu()
    progress("GPU", 0.9)
    try:
        roofs, links = measure_gpu(budget_s / 2), measure_links(budget_s / 2)
    except SpecMoEOffError as error:
        return [], [], {row: str(error) for row in waived_gpu()}
    return roofs, links, waived_gpu(roofs)
