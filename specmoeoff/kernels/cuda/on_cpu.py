"""The CUDA kernels compiled for a CPU, with threads as fibers (see shim/host.cuh): the sources and launches are the product's own."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cuda import FOLDER, KERNELS, shared_bytes
from specmoeoff.kernels.cuda.launches import Launch

LIBRARY_NAME = "on_cpu.so"
FAILURES = {1: "threads wait for ever", 2: "shared memory was overrun", 3: "no such kernel"}
MOST_SHARED_BYTES, MOST_THREADS = 99 << 10, 1024  # as every promised architecture has them
HOPPERS = "grouped"  # compiled a second time, with wgmma
FLAGS = (
    "-O1",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-w",
)
SOURCE = """#include "host.cuh"
#include "{folder}/common.cuh"
{includes}
uint4 __align__(1024) shared_memory[SHARED_BYTES / sizeof(uint4)];
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


class Host:
    """Runs launches on NumPy arrays. order 0: warps forwards, 1: backwards, above: at random by that seed."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def run(
        self,
        launches: Launch | Iterable[Launch],
        order: int = 0,
        skip_barrier: int = -1,
        skip_waits: int = 0,
        wgmma: bool = True,
    ) -> None:
        """One launch or several in turn. AssertionError where a launch is none that a GPU could run. skip_waits 1: for copies,
        2: for wgmma's products. wgmma: as on Hopper, else as on older GPUs."""
        for launch in [launches] if isinstance(launches, Launch) else launches:
            values = [np.uint64(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in launch.arguments]
            boxes = [np.array([v]) for v in values]  # a scalar's own bytes
            pointers = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
            three = ctypes.c_int * 3
            name = (
                f"hopper_{launch.kernel}" if wgmma and launch.kernel in KERNELS[HOPPERS] else launch.kernel
            ).encode()
            assert self._library.arguments_of(name) == len(boxes), f"{launch.kernel} takes another number of arguments"
            assert 0 < np.prod(launch.block) <= MOST_THREADS
            n_bytes = shared_bytes(launch, hopper=False)
            assert n_bytes <= MOST_SHARED_BYTES
            shape = (three(*launch.grid), three(*launch.block), n_bytes)
            failed = self._library.launch(name, *shape, pointers, order, skip_barrier, skip_waits)
            assert not failed, f"{launch.kernel}: {FAILURES[failed]}"


def build(folder: Path) -> Host:
    """Compile into `folder`. Raises MissingCapability without a C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise MissingCapability("no C++ compiler was found to run CUDA kernels on a CPU; install g++.")
    sources = [(f"in_{name}", name, "") for name in KERNELS] + [("on_hopper", HOPPERS, "hopper_")]
    includes = "\n".join(
        f'namespace {space} {{\n#include "{FOLDER / f"{name}.cu"}"\n}}' for space, name, prefix in sources if not prefix
    )
    renamed = "\n".join(f"#define {k} hopper_{k}" for k in KERNELS[HOPPERS])
    includes += f'\n#define WGMMA\n{renamed}\nnamespace on_hopper {{\n#include "{FOLDER / f"{HOPPERS}.cu"}"\n}}\n'
    includes += "\n".join(f"#undef {k}" for k in KERNELS[HOPPERS])
    entries = "\n".join(
        f'{{"{prefix}{k}", [](void **a) {{ call({space}::{prefix}{k}, a); }}, n_arguments({space}::{prefix}{k})}},'
        for space, name, prefix in sources
        for k in KERNELS[name]
    )
    source, library = folder / "on_cpu.cpp", folder / LIBRARY_NAME
    source.write_text(SOURCE.format(folder=FOLDER, includes=includes, entries=entries))
    command = [compiler, *FLAGS, f"-I{FOLDER / 'shim'}", "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return Host(library)
