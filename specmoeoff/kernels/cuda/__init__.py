"""The CUDA kernels: their sources, and CuPy's modules of them, compiled when first used.

Exactness: a row's bits depend only on its own token history. Every sum is one chain in an order fixed by the model's shape and by
absolute positions (see each .cu file), multiply-adds are written out, and no launch parameter changes what a row computes.
"""

import functools
from importlib.resources import files
from typing import Any

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cuda.launches import HEAD_DIMS, ROW_TILES, Launch

KERNELS = {
    "grouped": (*(f"{name}_{n}" for name in ("gate_up", "linear") for n in ROW_TILES), "combine"),
    "router": ("route", "token_lists"),
    "append": ("embed", "rmsnorm", "norm_rope_append"),
    "attention": (*(f"attend_{n}" for n in HEAD_DIMS), "merge"),
    "verify": ("verify",),
    "probes": ("fma_peak", "copy", "block_stream"),
}
FOLDER = files(__package__)
OPTIONS = ("--std=c++17", "--fmad=false")  # and FOLDER on the include path


@functools.cache
def _module(name: str) -> Any:
    try:
        import cupy
    except ImportError:
        raise MissingCapability(
            "the CUDA kernels need CuPy, which is not installed; `pip install 'specmoeoff[cuda12]'` (or cuda13) adds it."
        ) from None
    return cupy.RawModule(code=FOLDER.joinpath(f"{name}.cu").read_text(), options=(*OPTIONS, f"-I{FOLDER}"))


@functools.cache
def function(kernel: str) -> Any:
    """CuPy's function of that name. Raises MissingCapability without CuPy."""
    return _module(next(name for name, kernels in KERNELS.items() if kernel in kernels)).get_function(kernel)


def enqueue(launch: Launch) -> None:
    """On CuPy's current stream; the launch's arrays are CuPy's."""
    function(launch.kernel)(launch.grid, launch.block, launch.arguments, shared_mem=launch.shared_bytes)
