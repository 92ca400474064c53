"""Every CUDA source through NVRTC for every architecture it is meant for, without a GPU: registers, spills, and its kernels' names."""

import ctypes
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from specmoeoff.kernels.cuda import FOLDER, HOPPER_TARGET, KERNELS, OPTIONS, WITH_WGMMA

PROMISED = (80, 86, 89, 90)
# Bytes a thread may spill: the widest heads want more registers than there are, and without wgmma the largest tiles.
SPILL_BYTES = {"attend_256": 512} | dict.fromkeys(
    ("gate_up_128x128", "gate_up_128x256", "linear_256x128", "linear_256x256"), 300
)


class Usage(NamedTuple):
    """Of one kernel, as ptxas tells it."""

    registers: int
    spilled_bytes: int


@cache
def nvrtc() -> ctypes.CDLL:
    spec = find_spec("nvidia")
    found = [
        lib for root in (spec.submodule_search_locations if spec else ()) for lib in Path(root).rglob("libnvrtc.so.*")
    ]
    if not found:
        pytest.skip("NVRTC is not installed")
    return ctypes.CDLL(str(found[0]))


def newest() -> int:
    count = ctypes.c_int()
    nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc().nvrtcGetSupportedArchs(known)
    return max(known)


def compiled(name: str, target: str) -> dict[str, Usage]:
    """Usage of each kernel in a source; the compiler's own words where it refuses."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    source = (FOLDER / f"{name}.cu").read_text().encode()
    library.nvrtcCreateProgram(ctypes.byref(program), source, f"{name}.cu".encode(), 0, None, None)
    options = [*OPTIONS, f"-I{FOLDER}", f"--gpu-architecture={target}", "--ptxas-options=-v"]
    failed = library.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    )
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, text)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    log = text.value.decode()
    assert not failed, log
    assert "warning" not in log, log
    assert "serialized" not in log, log
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return {
        kernel: Usage(int(registers), int(stores) + int(loads))
        for kernel, stores, loads, registers in re.findall(pattern, log, re.DOTALL)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [80, 90, *(pytest.param(a, marks=pytest.mark.long) for a in ("newest", *PROMISED) if a not in (80, 90))],
)
@pytest.mark.parametrize("name", KERNELS)
def test_nvrtc_compiles_every_kernel_and_spills_little(name: str, architecture: int | str) -> None:
    target = f"sm_{newest() if architecture == 'newest' else architecture}"
    wgmma = target == "sm_90" and name in WITH_WGMMA
    usage = compiled(name, HOPPER_TARGET if wgmma else target)
    assert set(usage) == set(KERNELS[name])
    for kernel, used in usage.items():
        print(f"{kernel} sm_{architecture}: {used.registers} registers, {used.spilled_bytes} bytes spilled")
        assert used.spilled_bytes <= (0 if wgmma else SPILL_BYTES.get(kernel, 0)), kernel
