"""What the best library reaches on the same CPU: matrix products by torch, the second ceiling of the roofline."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from specmoeoff.kernels.cpu import allowed_cpus
from specmoeoff.roofline.timing import measurement, sample
from specmoeoff.specs.profile import Roof

SIZE, SMALL = 1024, 256  # a product's, and where the library has no fast way, which takes seconds for the large one
SECONDS, SLOW_FLOPS = 0.25, 10e9


def gemm_peaks(thread_counts: list[int]) -> tuple[list[Roof], dict[str, str]]:
    """Rates of square products in GFLOP/s, and why others are missing."""
    try:
        import torch
    except ImportError:
        reason = "torch is not installed: `pip install torch` adds the library's ceiling"
        return [], {"fp32_gemm": reason, "bf16_gemm": reason}
    result, before = [], torch.get_num_threads()
    for name, dtype in (("fp32_gemm", torch.float32), ("bf16_gemm", torch.bfloat16)):
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        few = min(sample(lambda x=a[:SMALL, :SMALL], y=b[:SMALL, :SMALL]: x @ y, 0.0, 2))  # type: ignore[misc]
        size = SIZE if 2 * SMALL**3 / few > SLOW_FLOPS else SMALL
        a, b = (matrix[:size, :size].contiguous() for matrix in (a, b))
        for n_threads in thread_counts:
            torch.set_num_threads(n_threads)
            with _on_the_first_cpu(), torch.inference_mode():
                seconds = sample(lambda x=a, y=b: x @ y, SECONDS, 10)  # type: ignore[misc]
            rate = measurement([2e-9 * size**3 / s for s in seconds], "GFLOP/s", "max", f"torch {torch.__version__}")
            result.append(Roof(name=name, n_threads=n_threads, rate=rate))
    torch.set_num_threads(before)
    return result, {}


@contextmanager
def _on_the_first_cpu() -> Iterator[None]:
    """The probes' threads, which torch shares, are bound to the other CPUs."""
    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {allowed_cpus()[0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mask)
