"""The kernels compiled for a CPU, with threads as fibers (see shim/host.h): the sources and launches are the product's own."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.kernels.cuda import FOLDER, KERNELS
from specmoeoff.kernels.cuda.launches import Launch

SHIM = Path(__file__).with_name("shim")


class Host:
    """Runs launches on NumPy arrays. order 0: warps forwards, 1: backwards, above: at random by that seed."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def run(
        self, launches: Launch | Iterable[Launch], order: int = 0, skip_barrier: int = -1, skip_waits: bool = False
    ) -> None:
        for launch in [launches] if isinstance(launches, Launch) else launches:
            values = [np.uint64(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in launch.arguments]
            boxes = [np.array([v]) for v in values]  # a scalar's own bytes
            pointers = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
            three = ctypes.c_int * 3
            name = launch.kernel.encode()
            assert self._library.arguments_of(name) == len(boxes), f"{launch.kernel} takes another number of arguments"
            assert 0 < np.prod(launch.block) <= 1024
            assert launch.shared_bytes <= 48 << 10
            failed = self._library.launch(
                name,
                three(*launch.grid),
                three(*launch.block),
                launch.shared_bytes,
                pointers,
                order,
                skip_barrier,
                skip_waits,
            )
            assert not failed, {1: "threads wait for ever", 2: "shared memory was overrun", 3: "no such kernel"}[failed]


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("host")
    includes = "\n".join(f'namespace in_{name} {{\n#include "{FOLDER / name}.cu"\n}}' for name in KERNELS)
    entries = "\n".join(
        f'{{"{k}", [](void **a) {{ call(in_{name}::{k}, a); }}, n_arguments(in_{name}::{k})}},'
        for name, kernels in KERNELS.items()
        for k in kernels
    )
    (folder / "host.cpp").write_text(
        f"""#include "host.h"
#include "{FOLDER}/common.cuh"
{includes}
uint4 shared_memory[SHARED_BYTES / sizeof(uint4)];
static const Kernel KERNELS[] = {{
{entries}
}};
extern "C" int arguments_of(const char *name)
{{
    for (const Kernel &k : KERNELS) if (!strcmp(k.name, name)) return k.n_arguments;
    return -1;
}}
extern "C" int launch(const char *name, const int *grid, const int *block, int shared_bytes, void **arguments, int order, int barrier, int waits)
{{
    skip_barrier = barrier;
    skip_waits = waits;
    for (const Kernel &k : KERNELS) if (!strcmp(k.name, name)) return run_grid(k, grid, block, shared_bytes, arguments, order);
    return 3;
}}
"""
    )
    flags = [
        "-O1",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-U_FORTIFY_SOURCE",
        "-w",
    ]
    library = folder / "host.so"
    command = [compiler, *flags, f"-I{SHIM}", "-o", str(library), str(folder / "host.cpp")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return Host(library)
