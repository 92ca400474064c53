"""Hugging Face checkpoints on disk: what model it is, and its weights as bf16, read without memory maps."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.files import cache_dir, load_json, read_text, sha256_text, write_atomic
from specmoeoff.precision import Precision
from specmoeoff.runtime.architectures import (
    expected_shapes,
    expert_tensor_names,
    ignored_tensors,
    spec_of,
    stacked_expert_name,
)
from specmoeoff.specs.model import ModelSpec

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SAMPLE_BYTES = 4096
MAX_HEADER_BYTES = 100_000_000
DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
PACKED_DTYPE = "U8"  # of MXFP4's blocks and scales
# The sixteen e2m1 numbers (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp16 or fp32 rounded to the nearest bf16 (ties to even), carried as uint16 of the same shape."""
    return values.astype(np.float32, copy=False).astype(ml_dtypes.bfloat16).view(np.uint16)


def from_bf16(values: np.ndarray) -> np.ndarray:
    """bf16 carried as uint16, as float32 of the same shape; exact."""
    return (values.astype(np.uint32) << 16).view(np.float32)


# --- config.json -----------------------------------------------------------------------------------------------


def _load_object(path: Path, what: str) -> dict[str, Any]:
    try:
        data = load_json(read_text(path, what))
    except ValueError as error:
        raise BadInput(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise BadInput(f"{path}: an object is expected.")
    return data


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        ids = _load_object(generation, "generation config").get("eos_token_id")
        eos = eos if ids is None else ids
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _spec_from_config(folder: Path) -> ModelSpec:
    """The spec without its fingerprint: config.json (and generation_config.json for the end tokens) alone."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such checkpoint folder.")
    config = _load_object(path, "model config")
    return spec_of(config, path, folder.resolve().name, _eos_token_ids(folder, config))


# --- safetensors shards ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor lies: bytes [start, start + n_bytes) of its shard."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


def _read_header(path: Path) -> tuple[bytes, dict[str, TensorPlace]]:
    """Raw header and tensor places of one shard; BadInput where the file is cut short or damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            n_header = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(n_header, MAX_HEADER_BYTES))
    except FileNotFoundError:
        raise BadInput(f"{path}: this shard is missing; download the checkpoint again.") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot read the shard: {error.strerror}.") from None
    if size < 8 or (n_header <= MAX_HEADER_BYTES and len(header) < n_header):
        raise BadInput(
            f"{path}: the shard ends within its header, {8 + max(n_header, 2) - size:,} bytes are missing;"
            " download it again."
        )
    places: dict[str, TensorPlace] = {}
    try:
        for name, entry in load_json(header).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(isinstance(n, int) for n in (begin, end, *shape)):
                raise TypeError
            places[name] = TensorPlace(path.name, str(entry["dtype"]), shape, 8 + n_header + begin, end - begin)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: not a safetensors file: its header is unreadable; download it again.") from None
    needed = max((place.start + place.n_bytes for place in places.values()), default=8 + n_header)
    if size < needed:
        raise BadInput(
            f"{path}: the shard is cut short, {needed - size:,} of {needed:,} bytes are missing; download it again."
        )
    for name, place in places.items():
        dtype = DTYPES.get(place.dtype)
        if (dtype and place.n_bytes != math.prod(place.shape) * dtype.itemsize) or place.start < 8 + n_header:
            raise BadInput(f"{path}: {name}: its bytes do not match its shape; download the shard again.")
    return header, places


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Shards in order, and the index's tensor-to-shard map (empty where there is one file)."""
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return [SINGLE_NAME], {}
        raise BadInput(
            f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there; only safetensors weights are read,"
            " convert or download them in that format."
        )
    weight_map = _load_object(index, "weight index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index}: weight_map is missing; download the index again.")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise BadInput(f"{index}: weight_map names {shard!r}, which is not a file of the folder; correct it.")
    return sorted(set(weight_map.values())), weight_map


class Checkpoint:
    """An opened checkpoint folder: every tensor known and checked, bytes read on demand with plain reads.

    No memory maps, so nothing of the weights stays in the process after `close`. Raises BadInput at opening
    when the config is not supported, a shard is missing or cut short, or a tensor is missing or misshapen.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        spec = _spec_from_config(self.folder)
        shards, weight_map = _shard_names(self.folder)
        self._headers: dict[str, bytes] = {}
        self.places: dict[str, TensorPlace] = {}
        for shard in shards:
            self._headers[shard], places = _read_header(self.folder / shard)
            self.places |= places
        for name, shard in weight_map.items():
            if name not in self.places or self.places[name].shard != shard:
                raise BadInput(
                    f"{self.folder / shard}: {name}, which {INDEX_NAME} puts here, is not in the shard;"
                    " download it again."
                )
        self._check_tensors(spec)
        self._descriptors: dict[str, int] = {}
        self.spec = spec.model_copy(
            update={"fingerprint": self._fingerprint(spec), "expert_format": "mxfp4" if self._has_mxfp4 else "bf16"}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards; reading again reopens them."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def tensor(self, name: str, precision: Precision) -> np.ndarray:
        """One weight of the checkpoint's shape, fp32 or rounded to bf16."""
        return self.tensor_f32(name) if precision == "fp32" else self.tensor_bf16(name)

    def tensor_bf16(self, name: str) -> np.ndarray:
        """One weight as bf16 carried in uint16, of the checkpoint's shape."""
        values = self._read(name)
        return values if values.dtype == np.uint16 else to_bf16(values)

    def tensor_f32(self, name: str, index: int | None = None) -> np.ndarray:
        """One weight, or its index-th part, as float32, of the checkpoint's shape; exact."""
        values = self._read(name, index)
        return from_bf16(values) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)

    def expert(self, layer: int, expert: int, precision: Precision) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """gate, up (intermediate, hidden) and down (hidden, intermediate) of an expert."""
        if self.spec.architecture != "gpt_oss":
            names = expert_tensor_names(self.spec, layer, expert)
            gate, up, down = (self.tensor(name, precision) for name in names)
            return gate, up, down
        gate_up, down = (
            self._stacked(stacked_expert_name(layer, f"{part}_proj"), expert) for part in ("gate_up", "down")
        )
        rounded = to_bf16 if precision == "bf16" else np.asarray
        gate, up, down = (np.ascontiguousarray(rounded(w)) for w in (gate_up[::2], gate_up[1::2], down))
        return gate, up, down

    def expert_biases(self, layer: int) -> np.ndarray:
        """Of gate, up and down of every expert, (n_experts, 2 * intermediate + hidden) fp32."""
        gate_up, down = (
            self.tensor_f32(stacked_expert_name(layer, f"{part}_proj_bias")) for part in ("gate_up", "down")
        )
        return np.concatenate([gate_up[:, ::2], gate_up[:, 1::2], down], axis=1)

    def _stacked(self, name: str, expert: int) -> np.ndarray:
        """One expert's matrix (out, in) of a tensor of all experts, fp32; gate and up rows alternate."""
        if name in self.places:
            return self.tensor_f32(name, expert).T
        blocks, scales = self._read(f"{name}_blocks", expert), self._read(f"{name}_scales", expert)
        values = E2M1[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*scales.shape, 32)
        return np.ldexp(values, scales[..., None].astype(np.int32) - 127).reshape(len(scales), -1)

    @property
    def _has_mxfp4(self) -> bool:
        """Whether all routed experts are stored so."""
        return f"{stacked_expert_name(0, 'down_proj')}_blocks" in self.places

    def _expected(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return expected_shapes(spec, self._has_mxfp4)

    def _check_tensors(self, spec: ModelSpec) -> None:
        expected = self._expected(spec)
        for name, shape in expected.items():
            place = self.places.get(name)
            if place is None:
                raise BadInput(f"{self.folder}: tensor {name} is missing; download the checkpoint again.")
            where = f"{self.folder / place.shard}: {name}"
            if place.shape != shape:
                raise BadInput(f"{where} has shape {place.shape}, config.json asks for {shape}; correct one of them.")
            if place.dtype not in DTYPES and not (
                place.dtype == PACKED_DTYPE and name.endswith(("_blocks", "_scales"))
            ):
                raise BadInput(f"{where} is stored as {place.dtype}; BF16, F16 or F32 weights are supported.")
        ignored = ignored_tensors(spec)
        for name in self.places.keys() - expected.keys():
            if not ignored.fullmatch(name):
                raise BadInput(
                    f"{self.folder / self.places[name].shard}: {name} is no part of a plain"
                    f" {spec.architecture} model and leaving it out would change the output; use another checkpoint."
                )

    def _descriptor(self, shard: str) -> int:
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self.folder / shard, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[shard]

    def _read(self, name: str, index: int | None = None) -> np.ndarray:
        place = self.places[name]
        shape, n_bytes = place.shape, place.n_bytes
        if index is not None:
            shape, n_bytes = shape[1:], n_bytes // shape[0]
        data = self._read_bytes(place, n_bytes, index or 0)
        return data.view(DTYPES.get(place.dtype, np.dtype(np.uint8))).reshape(shape)

    def _read_bytes(self, place: TensorPlace, n_bytes: int, index: int) -> np.ndarray:
        """The index-th n_bytes of a tensor."""
        data = np.empty(n_bytes, np.uint8)
        done = 0
        while done < n_bytes:
            n_read = os.preadv(self._descriptor(place.shard), [data.data[done:]], place.start + index * n_bytes + done)
            if n_read == 0:
                raise BadInput(f"{self.folder / place.shard}: the shard became shorter while it was read.")
            done += n_read
        return data

    def _samples(self) -> Iterator[bytes]:
        for name in sorted(self.places):
            place = self.places[name]
            last = max(0, place.n_bytes - SAMPLE_BYTES)
            for offset in sorted({0, last // 2, last}):
                n_bytes = min(SAMPLE_BYTES, place.n_bytes)
                yield os.pread(self._descriptor(place.shard), n_bytes, place.start + offset)

    def _fingerprint(self, spec: ModelSpec) -> str:
        """SHA-256 of the spec, the shard headers and 4 KiB at the start, middle and end of every tensor.

        Kept in the cache folder and taken from there while no file changed in size or time.
        """
        stats = {shard: (self.folder / shard).stat() for shard in self._headers}
        shape = spec.model_dump_json(exclude={"name", "fingerprint"}, exclude_defaults=True)
        state = json.dumps([shape, {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}])
        note = cache_dir() / "fingerprints" / f"{sha256_text(str(self.folder.resolve()))[:16]}.json"
        try:
            known = json.loads(note.read_text())
            if known["state"] == state:
                return str(known["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = hashlib.sha256(shape.encode())
        for shard in sorted(self._headers):
            digest.update(self._headers[shard])
        for sample in self._samples():
            digest.update(sample)
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(note, json.dumps({"state": state, "fingerprint": digest.hexdigest()}))
        except (OSError, BadInput):
            pass  # A cache folder that cannot be written costs a second next time, nothing else.
        self.close()
        return digest.hexdigest()


def open_checkpoint(path: Path | str) -> Checkpoint:
    """A folder of safetensors, or a GGUF file."""
    if Path(path).suffix == ".gguf":
        from specmoeoff.runtime.gguf_file import GgufCheckpoint

        return GgufCheckpoint(path)
    return Checkpoint(path)


def read_model_spec(path: Path | str) -> ModelSpec:
    """The spec of a checkpoint, fingerprint included, after checking that all its weights are there."""
    with open_checkpoint(path) as checkpoint:
        return checkpoint.spec


# --- names people give -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """Folders or GGUF files of a target and of the draft that comes with it, if one does."""

    target: Path
    draft: Path | None


def resolve_model(name_or_path: str | Path) -> ModelPaths:
    """`demo` builds or finds the demo pair; a folder or a GGUF file is itself; anything else is BadInput with the remedy."""
    if str(name_or_path) == "demo":
        from specmoeoff.demo.builder import build_demo

        demo = build_demo()
        return ModelPaths(demo.target, demo.draft)
    try:
        path = Path(name_or_path).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a folder closed to us, a name too long, ~ of an unknown user
        raise BadInput(f"model {name_or_path}: {error}; give a checkpoint folder or `demo`.") from None
    if is_folder or (is_there and path.suffix == ".gguf"):
        return ModelPaths(path, None)
    if is_there:
        raise BadInput(
            f"{path}: is a file; give the folder that holds config.json and the safetensors files, or a GGUF file."
        )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name_or_path)):
        raise BadInput(
            f"model {name_or_path}: no such folder; if it is a Hugging Face name, download it first with"
            f" `hf download {name_or_path} --local-dir FOLDER` (pip install huggingface_hub) and give FOLDER."
        )
    raise BadInput(f"model {name_or_path}: no such folder; give a checkpoint folder or `demo`.")
