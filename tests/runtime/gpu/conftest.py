"""A tiny Mixtral with heads that the CUDA kernels can take, on a GPU played by a CPU."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cuda.on_cpu import Host, build
from specmoeoff.runtime.gpu.device import CupyDevice, Device
from specmoeoff.runtime.gpu.rehearsal import RehearsalDevice


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no C++ compiler here")
    return build(tmp_path_factory.mktemp("host"))


@pytest.fixture
def mixtral_for_gpu(save_model: Callable[..., Path]) -> Path:
    return save_model("mixtral", head_dim=64)


@pytest.fixture
def qwen3_for_gpu(save_model: Callable[..., Path]) -> Path:
    return save_model("qwen3_moe", head_dim=64, moe_intermediate_size=64)


@pytest.fixture(params=["mixtral_for_gpu", "qwen3_for_gpu"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["played", pytest.param("gpu", marks=pytest.mark.gpu)])
def make_device(request: pytest.FixtureRequest) -> Callable[[int], Device]:
    """make_device(seed): a GPU played by a CPU, whose order of work the seed decides, or the real one."""
    if request.param == "played":
        host = request.getfixturevalue("host")
        return lambda seed: RehearsalDevice(host, seed)
    try:
        CupyDevice()
    except MissingCapability as error:
        pytest.skip(str(error))
    return lambda seed: CupyDevice()
