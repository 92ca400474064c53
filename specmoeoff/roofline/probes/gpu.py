"""Roofs of the GPU: matrix products by type, fused multiply-adds, and the bandwidth of its memory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cuda import function
from specmoeoff.roofline.probes.link import NO_GPU, cuda_device
from specmoeoff.roofline.timing import measurement
from specmoeoff.specs.profile import Roof

MIB = 1 << 20
GEMM_SIZE = 8192
LARGEST_BYTES = 2048 * MIB
SAMPLE_S, MIN_SAMPLES, MAX_SAMPLES = 5e-3, 9, 200
# What is measured, and why it may be missing where there is a GPU.
ROWS = {
    "fp32_gemm": "this torch cannot multiply fp32 matrices on this GPU; install a torch built for it",
    "bf16_gemm": "this GPU has no bf16 tensor cores; plan with fp16",
    "fp16_gemm": "this torch cannot multiply fp16 matrices on this GPU; install a torch built for it",
    "int8_gemm": "this torch or GPU has no int8 product (`torch._int_mm`); install a newer torch",
    "fp32_fma": "CuPy is missing or cannot compile here; `pip install 'specmoeoff[cuda12]'` adds it",
    "memory_copy": "too little GPU memory was free; stop other programs on the GPU",
    "memory_read": "too little GPU memory was free; stop other programs on the GPU",
    "memory_triad": "too little GPU memory was free; stop other programs on the GPU",
}
FMA_ROUNDS, FMA_CHAINS, FMA_BLOCK = 4096, 8, 256


class TorchStream(NamedTuple):
    """torch's stream as CuPy takes it: its own speaks the protocol only in torch's later versions."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class Work(NamedTuple):
    """Something to repeat: FLOPs or bytes of one call, and seconds of one call out of n in a row by the GPU's clock."""

    amount: float
    seconds: Callable[[int], float]


class Device(Protocol):
    """What the probe needs of a GPU."""

    def work(self, name: str) -> Work | None:
        """One of ROWS made ready; None where the GPU or a library lacks it."""


def measure_gpu(budget_s: float) -> list[Roof]:
    """Roofs of the first GPU, device "gpu", 0 threads, in about `budget_s` seconds; `waived_gpu` explains what lacks.

    GFLOP/s (GOP/s of int8) and GB/s; a copy counts reads and writes. Raises MissingCapability without a GPU.
    """
    cuda_device()
    return measure_roofs(TorchDevice(), budget_s)


def waived_gpu(roofs: list[Roof] | None = None) -> dict[str, str]:
    """Why each row is missing from these roofs; without them, because there is no GPU."""
    if roofs is None:
        return {f"gpu_{name}": NO_GPU for name in ROWS}
    found = {roof.name for roof in roofs if roof.device == "gpu"}
    return {f"gpu_{name}": reason for name, reason in ROWS.items() if name not in found}


def measure_roofs(device: Device, budget_s: float) -> list[Roof]:
    """Every row the device can do: peaks by their most, memory by its median as planners read it."""
    roofs = []
    for name in ROWS:
        work = device.work(name)
        if work is None:
            continue
        one = work.seconds(2)
        in_a_row = max(1, math.ceil(SAMPLE_S / one))
        n = min(max(int(budget_s / len(ROWS) / (one * in_a_row)), MIN_SAMPLES), MAX_SAMPLES)
        rates = [work.amount / work.seconds(in_a_row) / 1e9 for _ in range(n)]
        memory = name.startswith("memory")
        unit = "GB/s" if memory else "GOP/s" if name.startswith("int") else "GFLOP/s"
        rate = measurement(rates, unit, "median" if memory else "max")
        size = int(work.amount) if memory else None
        roofs.append(Roof(name=name, n_threads=0, rate=rate, device="gpu", working_set_bytes=size))
    return roofs


class TorchDevice:
    """The first CUDA GPU, through torch and, for the multiply-adds, CuPy."""

    def __init__(self) -> None:
        import torch

        self._torch, self._facts = torch, torch.cuda.get_device_properties(0)

    def work(self, name: str) -> Work | None:
        """Tried once, which also loads what it needs."""
        make = self._fma if name == "fp32_fma" else self._memory if name.startswith("memory") else self._gemm
        try:
            made = make(name)
            if made is None:
                return None
            amount, call = made
            call()
            self._torch.cuda.synchronize()
        except (RuntimeError, AttributeError):
            return None
        return Work(amount, lambda n: self._seconds(call, n))

    def _seconds(self, call: Callable[[], Any], n: int) -> float:
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._torch.cuda._sleep(1_000_000)  # so that the first call is enqueued before it is timed
        begin.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / n

    def _gemm(self, name: str) -> tuple[float, Callable[[], Any]] | None:
        """Random factors: a GPU clocks higher on zeros."""
        torch, n = self._torch, GEMM_SIZE
        if name == "bf16_gemm" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return None
        if name == "int8_gemm":
            a, b = (torch.randint(-128, 128, (n, n), dtype=torch.int8, device="cuda") for _ in range(2))
            return 2.0 * n**3, lambda: torch._int_mm(a, b.t())
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name[:4]]
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2.0 * n**3, lambda: torch.mm(a, b, out=out)

    def _memory(self, name: str) -> tuple[float, Callable[[], Any]]:
        """Arrays of at least four times the L2 cache each."""
        torch = self._torch
        n_bytes = min(max(4 * getattr(self._facts, "L2_cache_size", 64 * MIB), 512 * MIB), LARGEST_BYTES)
        a, b, c = (torch.ones(n_bytes // 4, device="cuda") for _ in range(3))
        return {
            "memory_copy": (2.0 * n_bytes, lambda: b.copy_(a)),
            "memory_read": (1.0 * n_bytes, lambda: torch.sum(a)),
            "memory_triad": (3.0 * n_bytes, lambda: torch.add(a, b, alpha=0.5, out=c)),
        }[name]

    def _fma(self, name: str) -> tuple[float, Callable[[], Any]] | None:
        """Eight independent chains a thread, eight blocks a multiprocessor."""
        try:
            kernel = function("fma_peak")
        except MissingCapability:
            return None
        import cupy

        out = cupy.zeros(1, cupy.float32)
        stream = cupy.cuda.Stream.from_external(TorchStream(self._torch.cuda.current_stream().cuda_stream))
        n_blocks = 8 * self._facts.multi_processor_count

        def call() -> None:
            with stream:
                kernel((n_blocks,), (FMA_BLOCK,), (out, cupy.float32(0.999), cupy.int32(FMA_ROUNDS)))

        return 2.0 * FMA_CHAINS * FMA_ROUNDS * FMA_BLOCK * n_blocks, call
