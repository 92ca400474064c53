"""The CUDA kernels: their sources, and CuPy's modules of them, compiled when first used.

Exactness: a row's bits depend only on its own token history. Every sum is one chain in an order fixed by the model's shape and by
absolute positions (see each .cu file), multiply-adds are written out, and no launch parameter changes what a row computes.
"""

import functools
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cuda.launches import HEAD_DIMS, TILES, Launch

KERNELS = {
    "grouped": (*(f"{name}_{tile.suffix}" for name, tiles in TILES.items() for tile in tiles), "combine"),
    "router": ("route", "token_lists"),
    "append": ("embed", "rmsnorm", "norm_rope_append"),
    "attention": (*(f"attend_{n}" for n in HEAD_DIMS), "merge"),
    "verify": ("verify",),
    "probes": ("fma_peak", "copy", "block_stream"),
}
FOLDER = files(__package__)
OPTIONS = ("--std=c++17", "--fmad=false")  # and FOLDER on the include path
WITH_WGMMA = ("grouped",)
HOPPER, HOPPER_TARGET = "90", "sm_90a"  # wgmma is of this target only, which CuPy does not compile for
# Blocks that share their weights do so on Hopper only: elsewhere the memory for it is not asked for.
MOST_SHARED_BYTES, MOST_ALONE_BYTES = (
    max(tile.shared_bytes for tiles in TILES.values() for tile in tiles if tile.blocks <= blocks) for blocks in (2, 1)
)


@functools.cache
def _functions(source: str) -> dict[str, Any]:
    try:
        import cupy
    except ImportError:
        raise MissingCapability(
            "the CUDA kernels need CuPy, which is not installed; `pip install 'specmoeoff[cuda12]'` (or cuda13) adds it."
        ) from None
    code, options = FOLDER.joinpath(f"{source}.cu").read_text(), (*OPTIONS, f"-I{FOLDER}")
    if source in WITH_WGMMA and _is_hopper():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{source}.cubin")
            path.write_bytes(_compiled(cupy.cuda.nvrtc, code, (*options, "-ftz=true", f"-arch={HOPPER_TARGET}")))
            module = cupy.RawModule(path=str(path))
            return {kernel: module.get_function(kernel) for kernel in KERNELS[source]}
    module = cupy.RawModule(code=code, options=options)
    return {kernel: module.get_function(kernel) for kernel in KERNELS[source]}


@functools.cache
def _is_hopper() -> bool:
    import cupy

    return bool(cupy.cuda.Device().compute_capability == HOPPER)


def _compiled(nvrtc: Any, code: str, options: tuple[str, ...]) -> bytes:
    """By the NVRTC that CuPy uses. Raises RuntimeError with what it says."""
    program = nvrtc.createProgram(code, "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{error}: {nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def function(kernel: str) -> Any:
    """CuPy's function of that name. Raises MissingCapability without CuPy."""
    source = next(source for source, kernels in KERNELS.items() if kernel in kernels)
    made = _functions(source)[kernel]
    if source == "grouped":
        made.max_dynamic_shared_size_bytes = MOST_SHARED_BYTES if _is_hopper() else MOST_ALONE_BYTES
    return made


def shared_bytes(launch: Launch, hopper: bool) -> int:
    """What a launch asks for, without the memory for shared weights where blocks cannot share them."""
    alone = launch.kernel in KERNELS["grouped"] and not hopper
    return min(launch.shared_bytes, MOST_ALONE_BYTES) if alone else launch.shared_bytes


def enqueue(launch: Launch) -> None:
    """On CuPy's current stream; the launch's arrays are CuPy's."""
    function(launch.kernel)(launch.grid, launch.block, launch.arguments, shared_mem=shared_bytes(launch, _is_hopper()))
