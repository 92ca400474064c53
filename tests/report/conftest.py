"""Machines to draw: the shipped one with a plan, and made-up ones that are awkward to label."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from specmoeoff.profiles import find
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile, LinkCurve, Measurement, Roof
from specmoeoff.tuner.tune import TuneRequest, tune


@pytest.fixture(scope="session")
def shipped() -> HardwareProfile:
    return HardwareProfile.load(find("machines", "epyc-zen5-2c"))


@pytest.fixture(scope="session")
def plan(shipped: HardwareProfile, made_up_request: TuneRequest) -> Plan:
    """Of the shipped machine, its disk capped as in the demo."""
    return tune(replace(made_up_request, profile=shipped, disk_limit_gb_per_s=1.0))


@pytest.fixture(scope="session")
def roof() -> Callable[..., Roof]:
    def roof(name: str, rate: float, unit: str = "GB/s", device: str = "cpu", n_threads: int = 2) -> Roof:
        measured = Measurement(value=rate, unit=unit, statistic="max", samples=(rate,))
        return Roof(name=name, n_threads=0 if device == "gpu" else n_threads, rate=measured, device=device)

    return roof


@pytest.fixture(scope="session")
def machines(shipped: HardwareProfile, roof: Callable[..., Roof]) -> dict[str, HardwareProfile]:
    gflop = "GFLOP/s"
    link = LinkCurve(
        direction="h2d",
        host_memory="pinned",
        beside="nothing",
        latency_s=8e-6,
        latency_interval_s=(7.9e-6, 8.1e-6),
        gb_per_s=25.3,
        interval_gb_per_s=(25.1, 25.5),
        fit_error=0.01,
        pcie_generation=4,
        pcie_width=16,
    )
    gpu_peaks = (
        roof("bf16_gemm", 165_000.0, gflop, "gpu"),
        roof("fp32_fma", 10_300.0, gflop, "gpu"),
        roof("fp16_gemm", 164_000.0, gflop, "gpu"),
    )
    gpu_memory = (roof("l2_read", 4300.0, device="gpu"), roof("memory_copy", 870.0, device="gpu"))
    more = (roof("int8_dot", 924.0, "GOP/s"), roof("fp32_gemm", 209.0, gflop), roof("bf16_gemm", 458.0, gflop))
    own = (roof("fp32_fma", 231.0, gflop), roof("bf16_dot", 462.0, gflop), *more)
    twins = tuple(roof(f"{name}_read", rate) for name, rate in (("l1", 401.0), ("l2", 398.0), ("l3", 395.0)))
    return {
        "shipped": shipped,
        "no disk": shipped.model_copy(update={"disk": None}),
        "every kind of roof": shipped.model_copy(update={"peaks": own}),
        "GPU": shipped.model_copy(
            update={
                "peaks": own + gpu_peaks,
                "memory": shipped.memory + gpu_memory,
                "links": (link,),
            }
        ),
        "roofs within two percent": shipped.model_copy(
            update={
                "peaks": (
                    roof("bf16_dot", 462.0, gflop),
                    roof("fp32_fma", 455.0, gflop),
                    roof("fp32_gemm", 454.0, gflop),
                ),
                "memory": (*twins, roof("dram_read", 392.0)),
            }
        ),
        "peaks alone": shipped.model_copy(update={"memory": (), "disk": None}),
        "nothing": shipped.model_copy(update={"peaks": (), "memory": (), "disk": None, "operators": ()}),
    }
