"""Models of a shape with random weights, and windows of requests with random histories: what a GPU can be timed with."""

import json
import time
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import numpy as np

from specmoeoff.kernels import cpu
from specmoeoff.kernels.cuda.launches import FEATURES, WARP
from specmoeoff.runtime.gpu.device import Device
from specmoeoff.runtime.gpu.execute import GpuExecutor, Placement, Room
from specmoeoff.runtime.rows import Rows, make_rows

BLOCK = 1 << 20  # random numbers, repeated: making gigabytes of new ones would take longer than measuring
TINY = {
    "name": "tiny",
    "architecture": "mixtral",
    "n_layers": 2,
    "hidden": 64,
    "intermediate": 64,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 64,
    "vocab": 40,
    "n_experts": 4,
    "n_active": 2,
    "max_positions": 256,
    "rms_eps": 1e-5,
    "rope_theta": 1e4,
}


def shape(name: str, n_layers: int) -> Any:
    """The fields of a shipped shape, with other layers; read without pydantic, which a GPU machine may lack."""
    text = files("specmoeoff.profiles").joinpath("models", f"{name}.json").read_text() if name != "tiny" else ""
    fields = json.loads(text)["model"] if text else TINY
    heads = "head" if fields["architecture"] == "qwen3_moe" else "none"
    defaults = {"rope_head_dim": 0, "rope_scaling": None, "renormalise": True, "qk_norm": heads}
    return SimpleNamespace(**defaults | fields | {"n_layers": n_layers})


class RandomWeights:
    """See GpuWeights; as many of each as there are."""

    def __init__(self, spec: Any, seed: int = 0) -> None:
        self.spec = spec
        values = np.random.default_rng(seed).standard_normal(BLOCK).astype(np.float32) * np.float32(spec.hidden**-0.5)
        self._block = (values.view(np.uint32) >> 16).astype(np.uint16)

    def dense(self, name: str) -> np.ndarray:
        """See GpuWeights."""
        spec, part = self.spec, name.split(".")[-1]
        if part.endswith("norm"):
            return np.ones(spec.head_dim if part in ("q_norm", "k_norm") else spec.hidden, np.float32)
        if part == "embedding":
            return self._random((spec.vocab, spec.hidden))
        heads = spec.n_heads * spec.head_dim
        n_out, n_in = {
            "qkv": (heads + 2 * spec.n_kv_heads * spec.head_dim, spec.hidden),
            "o": (spec.hidden, heads),
            "router": (spec.n_experts, spec.hidden),
            "lm_head": (spec.vocab, spec.hidden),
        }[part]
        return self._random((-(-n_out // FEATURES), n_in // 16, WARP, 8), hash_of(name))

    def expert(self, layer: int, expert: int, out: np.ndarray) -> None:
        """See GpuWeights."""
        self.fill(out)

    def fill(self, out: np.ndarray) -> None:
        """With the same random numbers over and over."""
        for first in range(0, len(out), BLOCK):
            out[first : first + BLOCK] = self._block[: len(out) - first]

    def host_expert(self, layer: int, expert: int) -> np.ndarray:
        """See GpuWeights."""
        n_bytes = cpu.packed_expert_bytes(self.spec.hidden, self.spec.intermediate)
        return self._random((n_bytes // 2,), layer + expert).view(np.uint8)

    def _random(self, shape: tuple[int, ...], turn: int = 0) -> np.ndarray:
        return np.resize(np.roll(self._block, turn * 4099), shape)


def hash_of(name: str) -> int:
    """The same in every process."""
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(name))


class Synthetic:
    """A model and `batch` requests that have `context` tokens each; every window runs k + 1 new tokens of all of them, again.

    The first experts of a layer are resident, the last on the host. kv_share: of the requests, whose KV is in GPU memory. prefill:
    their history is computed; else it is random, in GPU memory whatever was there.
    """

    def __init__(
        self,
        device: Device,
        spec: Any,
        batch: int,
        context: int,
        longest: int,
        parts: int = 2,
        resident: int = 0,
        on_host: int = 0,
        on_demand: bool = False,
        n_threads: int = 1,
        kv_share: float = 0.0,
        prefill: bool = False,
    ) -> None:
        self.spec, self.batch, self.context, self.parts = spec, batch, context, parts
        n_positions = context + longest + 1
        per_request = -(-n_positions // cpu.PAGE_TOKENS)
        self._members = np.array_split(np.arange(batch), parts)
        self._n_near = [round(len(members) * kv_share) for members in self._members]
        near = np.concatenate([members[:n] for members, n in zip(self._members, self._n_near, strict=True)])
        order = np.concatenate([near, np.setdiff1d(np.arange(batch), near)])  # GPU memory's pages come first
        self._table = np.empty((batch, per_request), np.int32)
        self._table[order] = 1 + np.arange(batch * per_request, dtype=np.int32).reshape(batch, per_request)
        n_near_pages, n_far_pages = len(near) * per_request, (batch - len(near)) * per_request
        layers = (tuple(range(resident)),) * spec.n_layers
        away = (tuple(range(spec.n_experts - on_host, spec.n_experts)),) * spec.n_layers
        most = max(longest + 1, context if prefill else 0)
        room = Room(
            batch * most,
            -(-batch // parts) * most,
            batch,
            per_request,
            n_near_pages,
            n_far_pages,
            n_positions,
        )
        weights = RandomWeights(spec)
        self.runs = GpuExecutor(weights, device, Placement(layers, away, on_demand), room, parts, n_threads, timed=True)
        if prefill:
            self._run(context, 0)
        else:
            for pages in self.runs.far_pages:
                weights.fill(pages.view(np.uint16).reshape(-1))

    def window(self, k: int) -> np.ndarray:
        """The tokens chosen after each row, (batch * (k + 1),)."""
        return self._run(k + 1, self.context)

    def _run(self, n_new: int, context: int) -> np.ndarray:
        parts: list[Rows] = []
        for members, n_near in zip(self._members, self._n_near, strict=True):
            counts, first = [n_new] * len(members), parts[-1].last if parts else 0
            parts.append(make_rows(first, counts, [context] * len(members), self._table[members], n_near))
        n_rows = self.batch * n_new
        begin = time.perf_counter()
        self.runs.forward(np.arange(n_rows, dtype=np.int32) % self.spec.vocab, parts)
        self.enqueued_s = time.perf_counter() - begin  # what the host takes, on-demand loads apart
        return self.runs.choose(np.arange(n_rows))
