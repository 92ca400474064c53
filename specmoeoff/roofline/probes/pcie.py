"""Generation and width of a GPU's PCIe link while it is in use: an idle one drops to a lower generation."""

import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

DEVICES = Path("/sys/bus/pci/devices")
PATIENCE_S = 5.0
QUERY = ["nvidia-smi", "--query-gpu=pcie.link.gen.current,pcie.link.width.current", "--format=csv,noheader"]
GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}  # by GT/s, as Linux writes it


class PcieLink(NamedTuple):
    """None where unknown."""

    generation: int | None = None
    width: int | None = None


def while_busy(copy: Callable[[], Any], bus: str) -> PcieLink:
    """The link of the GPU at a bus id such as 0000:65:00.0, asked in a thread while `copy` is repeated."""
    with ThreadPoolExecutor(1) as pool:
        copy()
        answer = pool.submit(ask, bus)
        while not answer.done():
            copy()
    return answer.result()


def ask(bus: str) -> PcieLink:
    """Of the first that knows: the driver's library, its tool, Linux. All unknown where none does."""
    for source in (_nvml, _nvidia_smi, _linux):
        with suppress(Exception):  # whatever ails a driver's library, another may know
            link = PcieLink(*source(bus))
            if link.generation in GENERATIONS.values() and link.width in (1, 2, 4, 8, 12, 16, 32):
                return link
    return PcieLink()


def _nvml(bus: str) -> tuple[int, int]:
    import pynvml

    pynvml.nvmlInit()
    try:
        gpu = pynvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
        return pynvml.nvmlDeviceGetCurrPcieLinkGeneration(gpu), pynvml.nvmlDeviceGetCurrPcieLinkWidth(gpu)
    finally:
        pynvml.nvmlShutdown()


def _nvidia_smi(bus: str) -> tuple[int, int]:
    told = subprocess.run(
        [*QUERY, f"--id={bus}"], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout
    generation, width = map(int, told.split(","))
    return generation, width


def _linux(bus: str) -> tuple[int, int]:
    speed = re.match(r"[\d.]+", (DEVICES / bus / "current_link_speed").read_text())
    return GENERATIONS[speed[0] if speed else ""], int((DEVICES / bus / "current_link_width").read_text())
