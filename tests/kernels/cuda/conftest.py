"""The kernels on a CPU."""

import shutil

import pytest

from specmoeoff.kernels.cuda.on_cpu import Host, build


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no C++ compiler here")
    return build(tmp_path_factory.mktemp("host"))
