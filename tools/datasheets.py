"""Writes the shipped datasheet profiles into specmoeoff/profiles/machines: `python tools/datasheets.py`.

All facts are here: what vendors state of a GPU, and of the processor and disk of one host it is typically found in. GPU
rates are dense, without sparsity; tensor rates accumulate in fp32. Comments name a page that repeats the vendor's numbers;
"not found" precedes those no page was found for; of no processor were FLOPs a cycle.
"""

from pathlib import Path
from typing import NamedTuple

from specmoeoff.specs.profile import (
    PCIE_LANE_GB_PER_S,
    DiskLink,
    HardwareProfile,
    LinkCurve,
    Machine,
    Measurement,
    Roof,
)

TARGET = Path(__file__).parents[1] / "specmoeoff" / "profiles" / "machines"
MIB, GIB = 1 << 20, 1 << 30
N_LANES = 16
UNMEASURED = "a datasheet states none; run `specmoeoff profile --model` on the machine itself"


class Cpu(NamedTuple):
    """`flops_per_cycle` of a core in fp32, at the base clock; one socket with all channels filled."""

    name: str
    n_cores: int
    base_ghz: float
    flops_per_cycle: int
    isa: str
    l3_mib: float
    n_channels: int
    mt_per_s: int


class Disk(NamedTuple):
    """Sequential reads, and random reads of 4 KiB one at a time."""

    name: str
    read_gb_per_s: float
    reads_per_s: int


class Gpu(NamedTuple):
    """TFLOP/s (TOP/s of int8) and GB/s; None where the GPU has no such units."""

    name: str
    fp32: float
    bf16: float | None
    fp16: float
    int8: float
    gb_per_s: float
    pcie: int


CPUS = {
    # Not found.
    "6230": Cpu("Intel Xeon Gold 6230", 20, 2.1, 64, "avx2", 27.5, 6, 2933),
    # technical.city/en/cpu/Xeon-Gold-6256-vs-Xeon-Gold-6426Y; not found: memory speed.
    "6426Y": Cpu("Intel Xeon Gold 6426Y", 16, 2.5, 64, "avx512bf16", 37.5, 8, 4800),
    # Not found.
    "5418Y": Cpu("Intel Xeon Gold 5418Y", 24, 2.0, 64, "avx512bf16", 45, 8, 4400),
    # servethehome.com/intel-xeon-max-9480-deep-dive (cores, channels), wccftech.com (DDR5-4800); not found: clock, cache.
    "8480+": Cpu("Intel Xeon Platinum 8480+", 56, 2.0, 64, "avx512bf16", 105, 8, 4800),
    # techgage.com/article/amd-epyc-milan-launch-performance and AnandTech's review of Milan, both.
    "7443": Cpu("AMD EPYC 7443", 24, 2.85, 32, "avx2", 128, 8, 3200),
    "7763": Cpu("AMD EPYC 7763", 64, 2.45, 32, "avx2", 256, 8, 3200),
    # Not found.
    "5950X": Cpu("AMD Ryzen 9 5950X", 16, 3.4, 32, "avx2", 64, 2, 3200),
    # web-autoai.com/articles/amd-ryzen-9-7950x-16-core-32-thread-high-end-cpu
    "7950X": Cpu("AMD Ryzen 9 7950X", 16, 4.5, 32, "avx512bf16", 64, 2, 5200),
    # timdobbs.substack.com/p/the-amd-ryzen-9-9950x-cpu, but for the base clock (4.4 there; 4.3 not found).
    "9950X": Cpu("AMD Ryzen 9 9950X", 16, 4.3, 64, "avx512bf16", 64, 2, 5600),
}
# digit.in/reviews/general/samsung-970-evo-plus-nvme-m-2-ssd-250-gb-review-177943.html
GEN3 = Disk("Samsung 970 EVO Plus (NVMe, PCIe 3.0 x4)", 3.5, 19_000)
# digitec.ch/en/s1/product/samsung-990-pro-2000-gb-m2; not found: random reads at depth 1.
GEN4 = Disk("Samsung 990 PRO (NVMe, PCIe 4.0 x4)", 7.45, 22_000)
# The first two hosts are those of the SpecMoEOff paper, their memory included.
HOSTS = {
    # Tensor rate and bandwidth: the paper's Table 1; not found: fp32, int8.
    "a30": (Gpu("NVIDIA A30", 10.3, 165, 165, 330, 933, 4), "6426Y", 250, GEN4),
    # hmc-tech.com/gpu/nvidia-geforce-rtx-4090-d
    "4090d": (Gpu("NVIDIA GeForce RTX 4090 D", 73.5, 147, 147, 588, 1008, 4), "5418Y", 190, GEN4),
    # geektopia.es (2018-09-13, NVIDIA's announcement) and sysrqmts.com/en/gpus/nvidia/tesla/t4 (bandwidth, PCIe)
    "t4": (Gpu("NVIDIA T4", 8.1, None, 65, 130, 320, 3), "6230", 192, GEN3),
    # store.sourcecode.com (int8 485 with sparsity, bandwidth) and fpsbench.com (fp32, PCIe); not found: bf16, fp16.
    "l4": (Gpu("NVIDIA L4", 30.3, 121, 121, 242.5, 300, 4), "7443", 256, GEN4),
    # glennklockwood.com/garden/processors/A100 and thundercompute.com/blog/nvidia-a100-specs-full-guide (bandwidth)
    "a100": (Gpu("NVIDIA A100 80GB PCIe", 19.5, 312, 312, 624, 1935, 4), "7763", 512, GEN4),
    # archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html (with sparsity) and NVIDIA's product brief PB-11133 (bandwidth)
    "h100": (Gpu("NVIDIA H100 PCIe", 51, 756, 756, 1513, 2000, 5), "8480+", 512, GEN4),
    # glennklockwood.com/garden/processors/h100 and itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html
    "h200": (Gpu("NVIDIA H200 SXM", 67, 989, 989, 1979, 4800, 5), "8480+", 1024, GEN4),
    # holynerdvana.blogspot.com/2022/10 (fp16 accumulating in fp16, twice ours); not found: int8.
    "3090": (Gpu("NVIDIA GeForce RTX 3090", 35.6, 71, 71, 284, 936, 4), "5950X", 64, GEN4),
    # waredb.com/processor/nvidia-geforce-rtx-4090
    "4090": (Gpu("NVIDIA GeForce RTX 4090", 82.6, 165, 165, 660, 1008, 4), "7950X", 64, GEN4),
    # fpsbench.com (fp32, bandwidth) and spheron.network/blog/nvidia-rtx-5090-specs; not found: int8, fp16 in fp32.
    "5090": (Gpu("NVIDIA GeForce RTX 5090", 104.8, 209.5, 209.5, 838, 1792, 5), "9950X", 128, GEN4),
}


def profile(name: str) -> HardwareProfile:
    """The profile of one of HOSTS."""
    gpu, cpu_name, ram_gib, disk = HOSTS[name]
    cpu, waived = CPUS[cpu_name], {"operators": UNMEASURED, "link latency": UNMEASURED, "process memory": UNMEASURED}
    peaks = [_cpu_peak(cpu)]
    for row, tera in (
        ("fp32_fma", gpu.fp32),
        ("bf16_gemm", gpu.bf16),
        ("fp16_gemm", gpu.fp16),
        ("int8_gemm", gpu.int8),
    ):
        if tera is None:
            waived[f"gpu_{row}"] = f"the {gpu.name} has no {row[:4]} tensor cores; plan with fp16"
            continue
        unit = "GOP/s" if row.startswith("int8") else "GFLOP/s"
        rate = _stated(1e3 * tera, unit, f"{gpu.name} datasheet (NVIDIA), dense")
        peaks.append(Roof(name=row, n_threads=0, rate=rate, device="gpu"))
    gpu_memory = _stated(gpu.gb_per_s, "GB/s", f"{gpu.name} datasheet (NVIDIA)")
    return HardwareProfile(
        kind="datasheet",
        name=f"{gpu.name} with {cpu.name} (datasheet)",
        machine=_machine(name, cpu, gpu, ram_gib),
        created="2026-11-25T00:00:00+00:00",
        tool_version="tools/datasheets.py",
        duration_s=0.0,
        peaks=tuple(peaks),
        memory=(_dram(cpu), Roof(name="memory_read", n_threads=0, rate=gpu_memory, device="gpu")),
        disk=_disk(disk),
        links=tuple(_link(gpu.pcie, direction) for direction in ("h2d", "d2h")),
        operators=(),
        process_bytes=0,
        waived=waived,
    )


def _stated(value: float, unit: str, note: str) -> Measurement:
    value = round(value, 9)
    return Measurement(
        value=value, unit=unit, statistic="max", samples=(value,), provenance="datasheet", note=f"source: {note}"
    )


def _machine(name: str, cpu: Cpu, gpu: Gpu, ram_gib: int) -> Machine:
    isas = ("avx512bf16", "avx2", "scalar")
    return Machine(
        cpu=cpu.name,
        n_cores=cpu.n_cores,
        isa=cpu.isa,
        isas=isas[isas.index(cpu.isa) :],
        l3_bytes=int(cpu.l3_mib * MIB),
        ram_bytes=ram_gib * GIB,
        gpu=gpu.name,
        system="datasheet",
        fingerprint=f"datasheet-{name}",
    )


def _cpu_peak(cpu: Cpu) -> Roof:
    note = f"{cpu.name} datasheet, {cpu.n_cores} cores x {cpu.base_ghz} GHz base clock x {cpu.flops_per_cycle} FLOP"
    rate = _stated(cpu.n_cores * cpu.base_ghz * cpu.flops_per_cycle, "GFLOP/s", note)
    return Roof(name="fp32_fma", n_threads=cpu.n_cores, rate=rate)


def _dram(cpu: Cpu) -> Roof:
    note = f"{cpu.name} datasheet, {cpu.n_channels} channels x {cpu.mt_per_s} MT/s x 8 bytes"
    rate = _stated(cpu.n_channels * cpu.mt_per_s * 8 / 1e3, "GB/s", note)
    return Roof(name="dram_read", n_threads=cpu.n_cores, rate=rate)


def _disk(disk: Disk) -> DiskLink:
    """Chunks and readers are ours: with them such a disk is read near its sequential rate."""
    return DiskLink(
        read_gb_per_s=_stated(disk.read_gb_per_s, "GB/s", f"{disk.name} datasheet, sequential read"),
        latency_s=_stated(1 / disk.reads_per_s, "s", f"{disk.name} datasheet, 1 / random reads a second at depth 1"),
        chunk_bytes=MIB,
        n_readers=4,
        modes_gb_per_s=(disk.read_gb_per_s,),
        fit_error=0.0,
    )


def _link(generation: int, direction: str) -> LinkCurve:
    """The rate of sixteen lanes. No curve: nobody states one."""
    return LinkCurve(
        direction=direction,
        host_memory="pinned",
        beside="nothing",
        latency_s=None,
        gb_per_s=round(PCIE_LANE_GB_PER_S[generation] * N_LANES, 3),
        pcie_generation=generation,
        pcie_width=N_LANES,
        provenance="datasheet",
    )


if __name__ == "__main__":
    for host in HOSTS:
        profile(host).save(TARGET / f"{host}.json")
