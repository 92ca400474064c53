"""CupyDevice with a stand-in for CuPy (see conftest.py)."""

import gc
import types

import pytest

from specmoeoff.errors import MissingCapability
from specmoeoff.runtime.gpu.device import CupyDevice, find_gpu


def test_what_a_host_function_raises_is_raised_where_it_is_waited_for(cupy: types.ModuleType) -> None:
    device = CupyDevice()
    stream = device.stream()

    def fail() -> None:
        raise ZeroDivisionError("of the CPU's kernel")

    device.host(stream, fail, [], [])
    with pytest.raises(ZeroDivisionError, match="kernel"):
        device.synchronize(device.record(stream))
    assert device.seconds(device.record(stream), device.record(stream)) == 2.0


def test_no_garbage_is_collected_where_cuda_may_not_be_called(cupy: types.ModuleType) -> None:
    device, seen = CupyDevice(), []
    stream = device.stream()
    device.host(stream, lambda: seen.append(gc.isenabled()), [], [])
    device.synchronize(device.record(stream))
    assert seen == [False]
    assert gc.isenabled()


def test_a_driver_that_fails_is_told_in_its_words(cupy: types.ModuleType) -> None:
    def fail() -> int:
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    cupy.cuda.runtime.getDeviceCount = fail
    with pytest.raises(MissingCapability, match=r"no CUDA-capable device.*driver"):
        find_gpu()
