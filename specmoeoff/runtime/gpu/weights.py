"""Weights as the GPU's kernels want them, and the experts the CPU computes as its kernels do."""

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels.cuda.launches import DEPTH, HEAD_DIMS, pack_expert, pack_linear

Spec = Any  # a ModelSpec, or whatever has its fields: a GPU machine's check runs without pydantic
ARCHITECTURES = ("mixtral", "qwen3_moe", "llama", "qwen3")


class GpuWeights(Protocol):
    """Where a model's weights come from."""

    @property
    def spec(self) -> Spec:
        """Its shape."""

    def dense(self, name: str) -> np.ndarray:
        """embedding (vocab, H) bf16; norms float32, empty where there is none; lm_head and layers.N.{qkv, o, router} as `pack_linear`
        has them. An EAGLE head has fc.{embedding, feature} so, and fc.bias (1, H) bf16, but neither embedding nor lm_head."""

    def expert(self, layer: int, expert: int, out: np.ndarray) -> None:
        """As `pack_expert` has it, (3 I H,) bf16."""

    def host_expert(self, layer: int, expert: int) -> np.ndarray:
        """As kernels/cpu has it, (packed_expert_bytes,) uint8."""


def check_runs_on_gpu(spec: Spec, is_head: bool = False) -> None:
    """Raises MissingCapability for what the CUDA kernels do not compute. `is_head`: an EAGLE head."""
    for holds, what in (
        (spec.architecture in ARCHITECTURES, f"{spec.architecture} models (only {' and '.join(ARCHITECTURES)})"),
        (spec.precision == "bf16", "fp32"),
        (not spec.rope_scaling, "scaled rotary positions"),
        (not spec.qkv_bias and not spec.n_sliding_layers, "biases and sliding windows"),
        (spec.head_dim in HEAD_DIMS, f"heads of {spec.head_dim} (only {', '.join(map(str, HEAD_DIMS))})"),
        (spec.hidden % DEPTH == 0 == spec.intermediate % DEPTH, f"sizes that are no multiple of {DEPTH}"),
        (spec.n_layers > 1 or is_head, "a single layer"),
    ):
        if not holds:
            raise MissingCapability(
                f"{spec.name}: the GPU lanes do not compute {what}; plan with a profile without a GPU."
            )


class CheckpointWeights:
    """Of a checkpoint folder. Use as a context manager; everything is read once, when the lanes are made."""

    def __init__(self, folder: Path | str) -> None:
        from specmoeoff.runtime.checkpoint import open_checkpoint

        self._checkpoint = open_checkpoint(folder)
        self.spec = self._checkpoint.spec
        check_runs_on_gpu(self.spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._checkpoint.close()

    def dense(self, name: str) -> np.ndarray:
        """See GpuWeights."""
        from specmoeoff.runtime.architectures import layer_tensors

        read = self._checkpoint
        if name == "embedding" or (name == "lm_head" and self.spec.tie_embeddings):
            table = read.tensor_bf16("model.embed_tokens.weight")
            return table if name == "embedding" else pack_linear(table)
        if name == "lm_head":
            return pack_linear(read.tensor_bf16("lm_head.weight"))
        if name == "norm":
            return read.tensor_f32("model.norm.weight")
        _, layer, part = name.split(".")
        if (
            part == "router" and self.spec.n_experts == 1
        ):  # a dense model: its one expert has all the weight whatever is said
            return pack_linear(np.zeros((1, self.spec.hidden), np.uint16))
        tensors = layer_tensors(self.spec, int(layer))
        if part.endswith("norm"):
            return read.tensor_f32(tensors[part][0])
        parts = ("q", "k", "v") if part == "qkv" else (part,)
        return pack_linear(np.concatenate([read.tensor_bf16(tensors[p][0]) for p in parts]))

    def expert(self, layer: int, expert: int, out: np.ndarray) -> None:
        """See GpuWeights."""
        out[:] = pack_expert(*self._checkpoint.expert(layer, expert, "bf16"))

    def host_expert(self, layer: int, expert: int) -> np.ndarray:
        """See GpuWeights."""
        from specmoeoff.kernels.cpu import pack_expert, packed_expert_bytes

        out = np.empty(packed_expert_bytes(self.spec.hidden, self.spec.intermediate), np.uint8)
        pack_expert(*self._checkpoint.expert(layer, expert, "bf16"), out)
        return out


class EagleWeights(CheckpointWeights):
    """Of an EAGLE head's folder."""

    def __init__(self, folder: Path | str) -> None:
        from specmoeoff.runtime.drafters.eagle import EagleCheckpoint

        self._checkpoint = EagleCheckpoint(folder)
        self.spec = self._checkpoint.spec
        check_runs_on_gpu(self.spec, is_head=True)

    def dense(self, name: str) -> np.ndarray:
        """See GpuWeights."""
        from specmoeoff.runtime.drafters.eagle import INPUT_NORM

        read, hidden = self._checkpoint, self.spec.hidden
        if name == "norm" or (name == "layers.0.input_norm" and INPUT_NORM not in read.places):
            return np.empty(0, np.float32)
        if name == "fc.bias":
            return read.tensor_bf16(name)[None] if name in read.places else np.zeros((1, hidden), np.uint16)
        if name.startswith("fc."):
            of_embedding, of_feature = np.split(read.tensor_bf16("fc.weight"), 2, axis=1)
            return pack_linear(of_embedding if name == "fc.embedding" else of_feature)
        return super().dense(name)
