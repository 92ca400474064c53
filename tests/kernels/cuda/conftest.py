"""The kernels on a CPU and, where there is one, on a GPU."""

import ctypes
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cuda import enqueue
from specmoeoff.kernels.cuda.launches import Launch
from specmoeoff.kernels.cuda.on_cpu import Host, build
from specmoeoff.runtime.gpu.device import find_gpu
from specmoeoff.runtime.gpu.rehearsal import of_kernel, weight_bytes


class OnGpu:
    """Runs launches of NumPy arrays: they go to the GPU, and what was written comes back."""

    def __init__(self) -> None:
        try:
            find_gpu()
        except MissingCapability as error:
            pytest.skip(str(error))

    def run(self, launches: Launch | Iterable[Launch], skip_barrier: int = -1, skip_waits: int = 0, **_: Any) -> None:
        if skip_barrier >= 0 or skip_waits:
            pytest.skip("a GPU leaves nothing out")
        import cupy

        for launch in [launches] if isinstance(launches, Launch) else launches:
            there: list[Any] = list(launch.arguments)
            kept = []
            for i, (argument, parameter) in enumerate(zip(launch.arguments, of_kernel(launch.kernel), strict=True)):
                if not isinstance(argument, np.ndarray):
                    continue
                if parameter and parameter.addresses:
                    n_bytes = weight_bytes(launch)
                    weights = [
                        cupy.asarray(np.frombuffer(ctypes.string_at(int(a), n_bytes), np.uint8)) if a else None
                        for a in argument
                    ]
                    kept.append(weights)
                    argument = np.array([0 if w is None else w.data.ptr for w in weights], np.uint64)
                there[i] = cupy.asarray(argument)
            enqueue(launch._replace(arguments=tuple(there)))
            for argument, parameter, its in zip(launch.arguments, of_kernel(launch.kernel), there, strict=True):
                if isinstance(argument, np.ndarray) and parameter and parameter.writes:
                    argument[...] = its.get()


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host | OnGpu:
    if request.param == "gpu":
        return OnGpu()
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no C++ compiler here")
    return build(tmp_path_factory.mktemp("host"))
