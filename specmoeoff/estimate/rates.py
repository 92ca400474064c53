"""What a machine with a GPU achieves: its roofs, times an efficiency where the roof is a datasheet's.

Efficiencies are stated here once, with where each is from; SpecMoEOff's are ours to divide: what its Table 3 shows achieved
(A30, Mixtral-8x7B, 512 in, 128 out, 5 drafted, a batch of 1,820 inferred from 142.2 GiB of KV) over the datasheet's roof.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from specmoeoff.errors import BadInput
from specmoeoff.specs.profile import HardwareProfile


class Stated(NamedTuple):
    """A number and where it is from."""

    value: float
    source: str


GPU_GEMM = Stated(0.42, "SpecMoEOff Table 3: GPU MoE takes 3.53 s, 69.8 of 165 TFLOP/s")
GPU_MEMORY = Stated(0.75, "MoE-Lightning's L4 operator table: expert weights at 217 to 231 of 300 GB/s")
CPU_ATTENTION = Stated(
    0.30, "SpecMoEOff Table 3: CPU attention takes 4.29 s, 0.77 of 2.56 TFLOP/s (fp32 FMA at base clock)"
)
CPU_GEMM = Stated(0.50, "assumed")
DRAM = Stated(0.80, "assumed")
LINK = Stated(0.77, "SpecMoEOff Table 3: 84 GiB in 3.70 s, 24.4 of 31.5 GB/s")
GPU_START_S = Stated(20e-6, "assumed: a few kernel launches")
CPU_START_S = Stated(20e-6, "assumed: waking and joining a team of threads")
COPY_START_S = Stated(10e-6, "assumed: one asynchronous copy")
ASSUMPTIONS = {
    "GPU GEMM efficiency": GPU_GEMM,
    "GPU memory efficiency": GPU_MEMORY,
    "CPU attention efficiency": CPU_ATTENTION,
    "CPU GEMM efficiency": CPU_GEMM,
    "DRAM efficiency": DRAM,
    "link efficiency": LINK,
    "seconds to start GPU work": GPU_START_S,
    "seconds to start CPU work": CPU_START_S,
    "seconds to start a copy": COPY_START_S,
}


class Scale(NamedTuple):
    """Measured over predicted seconds of a kind of node, by the tokens a request brings."""

    n_tokens: tuple[float, ...]
    factor: tuple[float, ...]


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s. `scales`: of node kinds that windows of this machine and model measured; `hand_over`: those windows'
    time over the period of their own nodes, for starts and waits belong to none (gpu_refit.py)."""

    gpu_flops: float
    gpu_bytes: float
    cpu_attention_flops: float
    cpu_gemm_flops: float
    dram_bytes: float
    h2d_bytes: float
    d2h_bytes: float
    scales: Mapping[str, Scale] = field(default_factory=dict)
    hand_over: float = 1.0

    @property
    def dram_bytes_beside_link(self) -> float:
        """What the CPU's kernels have while the link reads DRAM all the time."""
        return max(self.dram_bytes - self.h2d_bytes, 0.25 * self.dram_bytes)


def rates_of(profile: HardwareProfile) -> Rates:
    """The rates of a profile with a GPU. Raises BadInput naming what the profile lacks."""
    cores = profile.machine.n_cores

    def need(value: float | None, what: str) -> float:
        if not value:
            raise BadInput(
                f"profile {profile.name}: it has no {what}; profile the machine again, or plan with a shipped one."
            )
        return value

    def roof(name: str, n_threads: int, efficiency: Stated) -> float | None:
        found = next((r for r in profile.memory if (r.name, r.n_threads) == (name, n_threads)), None)
        share = efficiency.value if found and found.rate.provenance == "datasheet" else 1.0
        return found.rate.value * share * 1e9 if found else None

    def link(direction: str) -> float:
        found = [c for c in profile.links if (c.direction, c.host_memory, c.beside) == (direction, "pinned", "nothing")]
        share = LINK.value if found and found[0].provenance == "datasheet" else 1.0
        return need(found[0].gb_per_s * share * 1e9 if found else None, f"link {direction} from pinned memory")

    gpu = need(profile.peak("bf16_gemm", 0) or profile.peak("fp16_gemm", 0), "peak bf16_gemm of the GPU") * 1e9
    cpu = need(profile.peak("fp32_fma", cores), f"peak fp32_fma of {cores} threads") * 1e9
    return Rates(
        gpu_flops=gpu * GPU_GEMM.value,
        gpu_bytes=need(roof("memory_read", 0, GPU_MEMORY), "roof memory_read of the GPU"),
        cpu_attention_flops=cpu * CPU_ATTENTION.value,
        cpu_gemm_flops=cpu * CPU_GEMM.value,
        dram_bytes=need(roof("dram_read", cores, DRAM), f"roof dram_read of {cores} threads"),
        h2d_bytes=link("h2d"),
        d2h_bytes=link("d2h"),
    )
