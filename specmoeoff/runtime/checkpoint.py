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
from typing import Any, Literal, Self

import ml_dtypes
import numpy as np
from pydantic import ValidationError

from specmoeoff.errors import BadInput
from specmoeoff.files import cache_dir, load_json, read_text, sha256_text, write_atomic
from specmoeoff.kernels.cpu import MAX_HEAD_DIM
from specmoeoff.specs.model import ModelSpec

SUPPORTED: dict[str, Literal["mixtral", "llama"]] = {"MixtralForCausalLM": "mixtral", "LlamaForCausalLM": "llama"}
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SAMPLE_BYTES = 4096
MAX_HEADER_BYTES = 100_000_000
MAX_ALL_EXPERTS = 1_000_000
DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


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


def _refuse_what_the_kernels_lack(config: dict[str, Any], path: Path) -> None:
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "of unknown method")
        raise BadInput(
            f"{path}: quantization_config ({method}) is not supported; use the bf16, fp16 or fp32 checkpoint."
        )
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise BadInput(
            f"{path}: rope_scaling of type {rope_type!r} is not supported; use a model with plain rotary positions."
        )
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise BadInput(f"{path}: partial_rotary_factor must be 1; use a model that rotates whole heads.")
    window = config.get("sliding_window")
    if window is not None and window < config.get("max_position_embeddings", 0):
        raise BadInput(
            f"{path}: sliding_window {window} is smaller than max_position_embeddings; only full attention is"
            " supported: lower max_position_embeddings to the window or use another model."
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise BadInput(f"{path}: hidden_act {config['hidden_act']!r} is not supported; use a model with silu.")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise BadInput(f"{path}: {field} is set, and biases are not supported; use a model without them.")


def _rope_theta(config: dict[str, Any], architecture: str) -> Any:
    default = 1e6 if architecture == "mixtral" else 1e4
    return config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", default))


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
    names = config.get("architectures") or ["none"]
    name = names[0] if isinstance(names, list) else names
    name = name.removesuffix("Eagle") if isinstance(name, str) else name  # SGLang's name of EAGLE heads
    if not isinstance(name, str) or name not in SUPPORTED:
        raise BadInput(f"{path}: architecture {name} is not supported; use a checkpoint of {' or '.join(SUPPORTED)}.")
    architecture = SUPPORTED[name]
    try:
        _refuse_what_the_kernels_lack(config, path)
        rope_theta = _rope_theta(config, architecture)
    except (TypeError, AttributeError):
        raise BadInput(f"{path}: a field has the wrong type; download the file again.") from None

    def count(field: str, default: int | None = None) -> int:
        value = config.get(field)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadInput(f"{path}: {field} is {value!r}, a whole number above 0 is expected; correct the file.")
        return value

    hidden, n_heads = count("hidden_size"), count("num_attention_heads")
    try:
        spec = ModelSpec(
            name=folder.resolve().name,
            architecture=architecture,
            n_layers=count("num_hidden_layers"),
            hidden=hidden,
            intermediate=count("intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=count("num_key_value_heads", n_heads),
            head_dim=count("head_dim", hidden // n_heads),
            vocab=count("vocab_size"),
            n_experts=count("num_local_experts") if architecture == "mixtral" else 1,
            n_active=count("num_experts_per_tok") if architecture == "mixtral" else 1,
            max_positions=count("max_position_embeddings"),
            rms_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            tie_embeddings=config.get("tie_word_embeddings", False),
            eos_token_ids=_eos_token_ids(folder, config),
            fingerprint="",
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; correct the file.") from None
    if spec.rms_eps < 0 or spec.rope_theta <= 0:
        raise BadInput(f"{path}: rms_norm_eps or rope_theta is negative; download the file again.")
    if spec.n_all_experts > MAX_ALL_EXPERTS:
        raise BadInput(f"{path}: {spec.n_all_experts:,} experts are more than a model has; download the file again.")
    if spec.n_active > spec.n_experts:
        raise BadInput(f"{path}: num_experts_per_tok {spec.n_active} exceeds num_local_experts {spec.n_experts}.")
    if spec.n_heads % spec.n_kv_heads:
        raise BadInput(
            f"{path}: num_attention_heads {spec.n_heads} is not a multiple of num_key_value_heads {spec.n_kv_heads}."
        )
    for field, value, multiple in (
        ("hidden_size", spec.hidden, 16),
        ("head_dim", spec.head_dim, 16),
        ("intermediate_size", spec.intermediate, 2),
    ):
        if value % multiple:
            raise BadInput(f"{path}: {field} {value} is not a multiple of {multiple}, which the kernels need.")
    if spec.head_dim > MAX_HEAD_DIM:
        raise BadInput(f"{path}: head_dim {spec.head_dim} exceeds {MAX_HEAD_DIM}, the kernels' limit.")
    return spec


# --- tensor names ----------------------------------------------------------------------------------------------


def expert_tensor_names(spec: ModelSpec, layer: int, expert: int) -> tuple[str, str, str]:
    """Names of one expert's gate, up and down projections; a dense layer's FFN is its only expert."""
    prefix = f"model.layers.{layer}."
    if spec.architecture == "llama":
        return (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight", f"{prefix}mlp.down_proj.weight")
    prefix += f"block_sparse_moe.experts.{expert}."
    return f"{prefix}w1.weight", f"{prefix}w3.weight", f"{prefix}w2.weight"


def router_name(layer: int) -> str:
    """Name of a Mixtral layer's router weight, (n_experts, hidden)."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this spec must hold, with its (out, in) shape."""
    hidden, q, kv = spec.hidden, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tie_embeddings:
        shapes["lm_head.weight"] = (spec.vocab, hidden)
    for layer in range(spec.n_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}self_attn.q_proj.weight"] = (q, hidden)
        shapes[f"{prefix}self_attn.k_proj.weight"] = (kv, hidden)
        shapes[f"{prefix}self_attn.v_proj.weight"] = (kv, hidden)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, q)
        if spec.architecture == "mixtral":
            shapes[router_name(layer)] = (spec.n_experts, hidden)
        for expert in range(spec.n_experts):
            gate, up, down = expert_tensor_names(spec, layer, expert)
            shapes[gate] = shapes[up] = (spec.intermediate, hidden)
            shapes[down] = (hidden, spec.intermediate)
    return shapes


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
        self.spec = spec.model_copy(update={"fingerprint": self._fingerprint(spec)})

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

    def tensor_bf16(self, name: str) -> np.ndarray:
        """One weight as bf16 carried in uint16, of the checkpoint's shape."""
        values = self._read(name)
        return values if values.dtype == np.uint16 else to_bf16(values)

    def tensor_f32(self, name: str) -> np.ndarray:
        """One weight as float32, of the checkpoint's shape; exact."""
        values = self._read(name)
        return from_bf16(values) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)

    def _expected(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return expected_shapes(spec)

    def _check_tensors(self, spec: ModelSpec) -> None:
        expected = self._expected(spec)
        for name, shape in expected.items():
            place = self.places.get(name)
            if place is None:
                raise BadInput(f"{self.folder}: tensor {name} is missing; download the checkpoint again.")
            where = f"{self.folder / place.shard}: {name}"
            if place.shape != shape:
                raise BadInput(f"{where} has shape {place.shape}, config.json asks for {shape}; correct one of them.")
            if place.dtype not in DTYPES:
                raise BadInput(f"{where} is stored as {place.dtype}; BF16, F16 or F32 weights are supported.")
        ignored = re.compile(r"lm_head\.weight|.*rotary_emb\.inv_freq")
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

    def _read(self, name: str) -> np.ndarray:
        place = self.places[name]
        values = np.empty(place.shape, DTYPES[place.dtype])
        view = values.data.cast("B")
        done = 0
        while done < place.n_bytes:
            n_read = os.preadv(self._descriptor(place.shard), [view[done:]], place.start + done)
            if n_read == 0:
                raise BadInput(f"{self.folder / place.shard}: the shard became shorter while it was read.")
            done += n_read
        return values

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


def read_model_spec(folder: Path | str) -> ModelSpec:
    """The spec of a checkpoint folder, fingerprint included, after checking that all its weights are there."""
    with Checkpoint(folder) as checkpoint:
        return checkpoint.spec


# --- names people give -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """Folders of a target and of the draft that comes with it, if one does."""

    target: Path
    draft: Path | None


def resolve_model(name_or_path: str | Path) -> ModelPaths:
    """`demo` builds or finds the demo pair; a folder is itself; anything else is BadInput with the remedy."""
    if str(name_or_path) == "demo":
        from specmoeoff.demo.builder import build_demo

        demo = build_demo()
        return ModelPaths(demo.target, demo.draft)
    try:
        path = Path(name_or_path).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a folder closed to us, a name too long, ~ of an unknown user
        raise BadInput(f"model {name_or_path}: {error}; give a checkpoint folder or `demo`.") from None
    if is_folder:
        return ModelPaths(path, None)
    if is_there:
        raise BadInput(f"{path}: is a file; give the folder that holds config.json and the safetensors files.")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name_or_path)):
        raise BadInput(
            f"model {name_or_path}: no such folder; if it is a Hugging Face name, download it first with"
            f" `hf download {name_or_path} --local-dir FOLDER` (pip install huggingface_hub) and give FOLDER."
        )
    raise BadInput(f"model {name_or_path}: no such folder; give a checkpoint folder or `demo`.")
