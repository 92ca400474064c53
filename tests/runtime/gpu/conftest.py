"""Tiny models with heads that the CUDA kernels can take, and GPUs: played by a CPU, by a stand-in for CuPy, and real."""

import ctypes
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels import cuda
from specmoeoff.kernels.cuda.launches import Launch
from specmoeoff.kernels.cuda.on_cpu import Host, build
from specmoeoff.runtime.gpu.device import CupyDevice, Device, find_gpu
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


@pytest.fixture
def llama_for_gpu(save_model: Callable[..., Path]) -> Path:
    return save_model("llama", head_dim=64)


def silence(tensors: dict[str, Any], *ends: str) -> None:
    """Those named so are zero."""
    for name in tensors:
        if name.endswith(ends):
            tensors[name] = tensors[name] * 0


@pytest.fixture
def idle_mixtral_for_gpu(save_model: Callable[..., Path]) -> Path:
    """The token after each is the one whose output row is most like its embedding: the layers add nothing."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = save_model("mixtral", head_dim=64, initializer_range=0.15)
    tensors = load_file(folder / "model.safetensors")
    silence(tensors, "o_proj.weight", "w2.weight")
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def head_for_gpu(llama_for_gpu: Path, tmp_path: Path) -> Callable[..., Path]:
    """make(*left out, idle=False): a head for the Mixtral, a Llama's first layer after a random linear map, without tensors that are
    optional; `idle`: its state is the token's embedding."""
    import torch
    from safetensors.torch import load_file, save_file

    def make(*left_out: str, idle: bool = False) -> Path:
        config = json.loads((llama_for_gpu / "config.json").read_text())
        hidden = config["hidden_size"]
        tensors = {n.removeprefix("model."): t for n, t in load_file(llama_for_gpu / "model.safetensors").items()}
        tensors = {n: t for n, t in tensors.items() if n.startswith("layers.0.")}
        torch.manual_seed(0)
        for name, shape in (("fc.weight", (hidden, 2 * hidden)), ("fc.bias", (hidden,))):
            tensors[name] = (torch.randn(shape) * 0.15).bfloat16()
        if idle:
            silence(tensors, "o_proj.weight", "down_proj.weight", "fc.bias")
            tensors["fc.weight"] = torch.eye(hidden, 2 * hidden).bfloat16()
        folder = tmp_path / "head"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        save_file({n: t for n, t in tensors.items() if n not in left_out}, folder / "model.safetensors")
        return folder

    return make


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
        find_gpu()
    except MissingCapability as error:
        pytest.skip(str(error))
    return lambda seed: CupyDevice()


# ---- a stand-in that has CuPy's names and does everything at once ---------------------------------------------------------------


class Array:
    """As much of cupy.ndarray as is used; no numpy.ndarray, so that nobody takes GPU memory for the host's."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.shape, self.dtype, self.nbytes, self.size = values.shape, values.dtype, values.nbytes, values.size
        self.data = types.SimpleNamespace(ptr=values.ctypes.data)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> "Array":
        return Array(self.values[key])

    def __iter__(self) -> Iterator["Array"]:
        return (Array(v) for v in self.values)

    def reshape(self, *shape: Any) -> "Array":
        return Array(self.values.reshape(*shape))

    def set(self, values: np.ndarray) -> None:
        assert values.shape == self.shape
        assert values.dtype == self.dtype
        self.values[...] = values

    def get(self) -> np.ndarray:
        return self.values.copy()


CUBIN = b"machine code"


class Event:
    def __init__(self, block: bool = False) -> None:
        assert block

    def synchronize(self) -> None:
        pass


class Stream:
    def __init__(self, non_blocking: bool = False) -> None:
        assert non_blocking
        self.ptr = 7

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, event: Event) -> Event:
        return event

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def launch_host_func(self, call: Callable[[Any], None], argument: Any) -> None:
        call(argument)


@pytest.fixture
def cupy(host: Host, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    class Function:
        num_regs = 1

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, grid: Any, block: Any, arguments: tuple[Any, ...], shared_mem: int = 0) -> None:
            assert not any(isinstance(a, (int, np.ndarray)) and not isinstance(a, np.generic) for a in arguments)
            plain = tuple(a.values if isinstance(a, Array) else a for a in arguments)
            host.run(Launch(self.name, grid, block, shared_mem, plain))

    class RawModule:
        def __init__(self, code: str = "", options: tuple[str, ...] = (), path: str = "") -> None:
            if path:
                assert Path(path).read_bytes() == CUBIN
            else:
                programs.append((code, options))
                nvrtc.compileProgram(-1, options)

        def get_function(self, name: str) -> Function:
            return Function(name)

    programs: list[tuple[str, tuple[str, ...]]] = []

    class nvrtc:
        NVRTCError = RuntimeError

        @staticmethod
        def createProgram(code: str, name: str, headers: tuple[str, ...], names: tuple[str, ...]) -> int:
            assert name.endswith(".cu")
            assert headers == names == ()
            programs.append((code, ()))
            return len(programs) - 1

        @staticmethod
        def compileProgram(program: int, options: tuple[str, ...]) -> None:
            code, _ = programs[program]
            assert "__global__" in code
            assert any(option.startswith("-I") for option in options)
            programs[program] = (code, options)

        @staticmethod
        def getCUBIN(program: int) -> bytes:
            assert "-arch=sm_90a" in programs[program][1]
            return CUBIN

        @staticmethod
        def destroyProgram(program: int) -> None:
            programs[program] = ("", ())

    def memcpy_async(to: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        assert (kind, stream) == (4, 7)
        ctypes.memmove(to, source, n_bytes)

    made = types.ModuleType("cupy")
    made.empty = lambda shape, dtype: Array(np.full(shape, 7, dtype))  # type: ignore[attr-defined]
    made.get_default_memory_pool = lambda: types.SimpleNamespace(  # type: ignore[attr-defined]
        total_bytes=lambda: 3 << 30, free_all_blocks=lambda: None
    )
    made.RawModule = RawModule  # type: ignore[attr-defined]
    made.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        Stream=Stream,
        Event=Event,
        PinnedMemory=bytearray,
        PinnedMemoryPointer=lambda memory, offset: memory[offset:],
        Device=lambda: types.SimpleNamespace(compute_capability="90"),
        nvrtc=nvrtc,
        get_elapsed_time=lambda start, end: 2000.0,
        runtime=types.SimpleNamespace(
            getDeviceCount=lambda: 1, deviceSynchronize=lambda: None, memcpyAsync=memcpy_async
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", made)
    monkeypatch.setattr(cuda, "_is_hopper", cuda._is_hopper.__wrapped__)
    monkeypatch.setattr(cuda, "_functions", cuda._functions.__wrapped__)
    monkeypatch.setattr(cuda, "function", cuda.function.__wrapped__)
    monkeypatch.setattr("specmoeoff.runtime.gpu.device.function", cuda.function)
    return made
