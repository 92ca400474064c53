"""A tiny Mixtral with heads that the CUDA kernels can take, on a GPU played by a CPU."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from specmoeoff.kernels.cuda.on_cpu import Host, build


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no C++ compiler here")
    return build(tmp_path_factory.mktemp("host"))


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def checkpoint(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> Path:
    changes = {"moe_intermediate_size": 64} if request.param == "qwen3_moe" else {}
    return save_model(request.param, head_dim=64, num_attention_heads=4, **changes)
