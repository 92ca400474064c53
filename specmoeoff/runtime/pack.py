"""A checkpoint in the runtime's own form: experts in one aligned file to be read with O_DIRECT, the rest in another.

Kept in the cache folder under the checkpoint's fingerprint; made once, whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from specmoeoff.errors import BadInput, MissingCapability
from specmoeoff.estimate.memory import dense_bytes, expert_stride, layer_arrays
from specmoeoff.files import cache_dir
from specmoeoff.kernels.cpu import aligned_empty, pack_expert, pack_linear, packed_expert_bytes, packed_linear_bytes
from specmoeoff.precision import ExpertFormat, Precision
from specmoeoff.runtime.architectures import layer_tensors
from specmoeoff.runtime.build_folder import build_folder
from specmoeoff.runtime.checkpoint import Checkpoint, open_checkpoint
from specmoeoff.specs.base import FileSpec, Spec
from specmoeoff.specs.model import ModelSpec

LAYOUT = 1
ALIGNMENT = 4096
EXPERTS, DENSE, MANIFEST = "experts.bin", "dense.bin", "manifest.json"
Progress = Callable[[str, int, int], None]


class DenseArray(Spec):
    """One array of dense.bin."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Manifest(FileSpec):
    """What a packed folder holds. Checksums are SHA-256 of each expert's bytes, (expert layers, experts)."""

    what: ClassVar[str] = "packed model"
    layout: int
    model: ModelSpec
    expert_stride: int
    expert_sha256: tuple[tuple[str, ...], ...]
    dense: dict[str, DenseArray]


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


class PackedModel:
    """An opened packed model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = self._manifest = Manifest.load(folder / MANIFEST)
        self.spec = manifest.model
        self.expert_path = folder / EXPERTS
        self.expert_stride = manifest.expert_stride
        self.expert_bytes = packed_expert_bytes(self.spec.hidden, self.spec.intermediate, self.spec.packed_format)

    @property
    def expert_sha256(self) -> tuple[tuple[str, ...], ...]:
        """SHA-256 of each expert with its padding, (n_layers, n_experts)."""
        return self._manifest.expert_sha256

    @property
    def dense_bytes(self) -> int:
        """Memory that `load_dense` takes."""
        return _aligned(max(a.offset + a.n_bytes for a in self._manifest.dense.values()))

    def expert_number(self, layer: int, expert: int) -> int:
        """Place of an expert among all in the expert file."""
        return (layer - self.spec.n_dense_layers) * self.spec.n_experts + expert

    def expert_offset(self, layer: int, expert: int) -> int:
        """Where an expert begins in the expert file."""
        return self.expert_number(layer, expert) * self.expert_stride

    def load_dense(self) -> dict[str, np.ndarray]:
        """All weights but the experts', by name, in memory of their own."""
        buffer = _read_direct(self.folder / DENSE, 0, self.dense_bytes)
        return {
            name: buffer[a.offset : a.offset + a.n_bytes].view(a.dtype).reshape(a.shape)
            for name, a in self._manifest.dense.items()
        }

    def load_experts(self) -> np.ndarray:
        """Every expert, (expert layers * experts, expert_bytes) uint8."""
        n = self.spec.n_all_experts
        return _read_direct(self.expert_path, 0, n * self.expert_stride).reshape(n, -1)[:, : self.expert_bytes]

    def damaged_experts(self, progress: Progress = lambda *_: None) -> list[tuple[int, int]]:
        """(layer, expert) of every expert whose bytes differ from what was packed."""
        damaged = []
        for layer, sums in enumerate(self._manifest.expert_sha256, self.spec.n_dense_layers):
            first = self.expert_offset(layer, 0)
            experts = _read_direct(self.expert_path, first, self.spec.n_experts * self.expert_stride)
            for expert, packed in enumerate(experts.reshape(self.spec.n_experts, -1)):
                if hashlib.sha256(packed.data).hexdigest() != sums[expert]:
                    damaged.append((layer, expert))
            progress("checking experts", layer + 1, self.spec.n_layers)
        return damaged


def _read_direct(path: Path, offset: int, n_bytes: int) -> np.ndarray:
    """n_bytes of a file past the page cache, so that the file does not occupy memory twice."""
    buffer = aligned_empty(n_bytes)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except FileNotFoundError:
        raise BadInput(f"{path}: is missing; delete the folder {path.parent}, it will be packed anew.") from None
    except OSError as error:
        raise MissingCapability(
            f"{path}: this file system does not allow O_DIRECT reads ({error.strerror}); "
            "set SPECMOEOFF_CACHE to a folder on a local disk."
        ) from None
    try:
        done = 0
        while done < n_bytes:
            n_read = os.preadv(descriptor, [buffer.data[done:]], offset + done)
            # A read that stops between blocks has met the end of the file.
            if n_read == 0 or n_read % ALIGNMENT:
                raise BadInput(f"{path}: ends early; delete the folder {path.parent}, it will be packed anew.")
            done += n_read
    finally:
        os.close(descriptor)
    return buffer


def pack_weight(weight: np.ndarray) -> np.ndarray:
    """(n_out, n_in) as the kernels want it, in the precision of its type."""
    precision: Precision = "fp32" if weight.dtype == np.float32 else "bf16"
    n_out, n_in = weight.shape
    out = np.empty(packed_linear_bytes(n_out, n_in, precision), np.uint8)
    pack_linear(weight, out)
    return out


def _dense_arrays(checkpoint: Checkpoint, spec: ModelSpec) -> Iterator[tuple[str, np.ndarray]]:
    embedding = checkpoint.tensor("model.embed_tokens.weight", spec.precision)
    yield "embedding", embedding
    head = embedding if spec.tie_embeddings else checkpoint.tensor("lm_head.weight", spec.precision)
    yield "lm_head", pack_weight(head)
    yield "norm", checkpoint.tensor_f32("model.norm.weight")
    for layer in range(spec.n_layers):
        for name in layer_arrays(spec, layer):
            yield f"layers.{layer}.{name}", _layer_array(checkpoint, spec, layer, name)
        if spec.expert_bias:
            yield f"layers.{layer}.expert_biases", checkpoint.expert_biases(layer)


PARTS = {
    "shared_gate_up": ("shared_gate", "shared_up"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "qkv": ("q", "k", "v"),
}


def _layer_array(checkpoint: Checkpoint, spec: ModelSpec, layer: int, name: str) -> np.ndarray:
    """One array as kernels.cpu.LayerWeights takes it: vectors fp32, matrices packed."""
    tensors = layer_tensors(spec, layer)
    parts = PARTS.get(name, (name,))
    if spec.kv_latent and name == "qkv":
        parts = ("q_down", "kv_down") if spec.q_latent else ("kv_down",)
    if len(tensors[parts[0]][1]) == 1:
        return np.concatenate([checkpoint.tensor_f32(tensors[part][0]) for part in parts])
    weights = [checkpoint.tensor(tensors[part][0], spec.precision) for part in parts]
    if spec.kv_latent and name in ("qkv", "q_up", "kv_up"):
        weights[-1] = _latent_rows(spec, name, weights[-1])
    return pack_weight(np.concatenate(weights))


def _latent_rows(spec: ModelSpec, name: str, weight: np.ndarray) -> np.ndarray:
    """A projection of latent attention with rows in the kernels' order: in every head the rotary ones first, those that turn
    together half of them apart, which DeepSeek has side by side; in kv_up all heads' keys, their rotary rows zero, then values."""
    rope, nope, heads = spec.rope_head_dim, spec.head_dim, spec.n_heads
    apart = np.concatenate([np.arange(0, rope, 2), np.arange(1, rope, 2)])
    if name == "qkv":
        return np.concatenate([weight[:-rope], weight[-rope:][apart]])
    weight = weight.reshape(heads, -1, weight.shape[-1])
    if name == "q_up":
        weight = np.concatenate([weight[:, nope:][:, apart], weight[:, :nope]], axis=1)
        return weight.reshape(-1, weight.shape[-1])
    keys = np.concatenate([np.zeros((heads, rope, weight.shape[-1]), weight.dtype), weight[:, :nope]], axis=1)
    return np.concatenate([keys.reshape(-1, weight.shape[-1]), weight[:, nope:].reshape(-1, weight.shape[-1])])


def _write_dense(checkpoint: Checkpoint, spec: ModelSpec, folder: Path) -> dict[str, DenseArray]:
    arrays, offset = {}, 0
    with (folder / DENSE).open("wb") as stream:
        for name, values in _dense_arrays(checkpoint, spec):
            arrays[name] = DenseArray(offset=offset, dtype=values.dtype.name, shape=values.shape)
            padding = -values.nbytes % 64
            stream.write(np.ascontiguousarray(values).data.cast("B"))
            stream.write(bytes(padding))
            offset += values.nbytes + padding
        stream.write(bytes(_aligned(offset) - offset))
    return arrays


def _write_experts(
    checkpoint: Checkpoint, spec: ModelSpec, folder: Path, progress: Progress
) -> tuple[tuple[str, ...], ...]:
    n_bytes = packed_expert_bytes(spec.hidden, spec.intermediate, spec.packed_format)
    buffer = np.zeros(_aligned(n_bytes), np.uint8)
    sums = []
    with (folder / EXPERTS).open("wb") as stream:
        for layer in range(spec.n_dense_layers, spec.n_layers):
            row = []
            for expert in range(spec.n_experts):
                pack_expert(*checkpoint.expert(layer, expert, spec.precision), buffer[:n_bytes], spec.packed_format)
                row.append(hashlib.sha256(buffer.data).hexdigest())
                stream.write(buffer.data)
            # Or the page cache would count hundreds of megabytes of dirty pages before the first sync.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            sums.append(tuple(row))
            progress(f"packing {spec.name}", layer + 1, spec.n_layers)
    return tuple(sums)


def pack_model(
    folder: Path | str,
    progress: Progress = lambda *_: None,
    precision: Precision = "bf16",
    experts: ExpertFormat | None = None,
) -> PackedModel:
    """The packed form of a checkpoint folder or GGUF file, made now if it is not in the cache; formats as ModelSpec.run_in."""
    with open_checkpoint(folder) as checkpoint:
        spec = checkpoint.spec.run_in(precision, experts)
        suffix = "" if spec.packed_format == "bf16" else f"-{spec.packed_format}"
        final = cache_dir() / "packed" / f"{spec.fingerprint[:16]}{suffix}"

        def fill(partial: Path) -> None:
            sums = _write_experts(checkpoint, spec, partial, progress)
            manifest = Manifest(
                layout=LAYOUT,
                model=spec,
                expert_stride=expert_stride(spec),
                expert_sha256=sums,
                dense=_write_dense(checkpoint, spec, partial),
            )
            (partial / MANIFEST).write_text(manifest.text())

        n_bytes = spec.n_all_experts * expert_stride(spec) + dense_bytes(spec)
        build_folder(final, _is_complete, n_bytes, f"packing {spec.name}", fill)
    return PackedModel(final)


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        model = manifest["model"]
        n = (model["n_layers"] - model["n_dense_layers"]) * model["n_experts"] * manifest["expert_stride"]
        return bool(manifest["layout"] == LAYOUT) and (folder / EXPERTS).stat().st_size == n
    except (OSError, ValueError, KeyError, TypeError):
        return False
