"""GGUF files as checkpoints: llama.cpp's metadata and tensors in Hugging Face's words, dequantised as they are read."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from specmoeoff.errors import BadInput, MissingCapability
from specmoeoff.precision import Precision
from specmoeoff.runtime.architectures import spec_of
from specmoeoff.runtime.checkpoint import Checkpoint, TensorPlace, to_bf16
from specmoeoff.specs.model import ModelSpec

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek2": "DeepseekV2ForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
}
# config.json's field: the metadata key after the architecture.
FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "norm_topk_prob": "expert_weights_norm",
    "clip_qkv": "attention.clamp_kqv",
    "sliding_window": "attention.sliding_window",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "kv_lora_rank": "attention.kv_lora_rank",
    "q_lora_rank": "attention.q_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
}
SIGMOID = 2  # expert_gating_func


class GgufCheckpoint(Checkpoint):
    """An opened GGUF file; `name-00001-of-0000N.gguf` opens its siblings too. Tensors go by Hugging Face's names.

    Raises BadInput where the file is damaged, a tensor is missing, or the model is one the runtime cannot compute.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        self.folder = path.parent
        self._headers: dict[str, bytes] = {}
        self._descriptors: dict[str, int] = {}
        self.places: dict[str, TensorPlace] = {}
        facts: dict[str, Any] = {}
        for part in sorted(path.parent.glob(re.sub(r"-\d{5}-of-", "-*-of-", path.name))):
            facts |= self._read_part(part)
        architecture = facts.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise BadInput(
                f"{path}: architecture {architecture} is not supported; use one of {', '.join(ARCHITECTURES)}."
            )
        if "rope_freqs.weight" in self.places:
            raise BadInput(
                f"{path}: rope_freqs is not supported; use the safetensors checkpoint, whose config.json explains it."
            )
        config = self._config(architecture, facts)
        eos = facts.get("tokenizer.ggml.eos_token_id")
        spec = spec_of(config, path, path.stem, () if eos is None else (eos,))
        self._names = self._names_of(architecture, spec)
        self._paired_rows = architecture == "llama"
        self._check_gguf(spec, path)
        self.spec = spec.model_copy(
            update={"fingerprint": self._fingerprint(spec), "expert_format": "mxfp4" if self._has_mxfp4 else "bf16"}
        )

    @property
    def _has_mxfp4(self) -> bool:
        return {p.dtype for name, p in self.places.items() if name.endswith("_exps.weight")} == {"MXFP4"}

    def _read_part(self, path: Path) -> dict[str, Any]:
        """Metadata of one file; its tensors are added to the places. `shape` there is the stored one."""
        try:
            from gguf import GGUFReader
        except ImportError:
            raise MissingCapability("GGUF files cannot be read: pip install gguf") from None
        try:
            reader = GGUFReader(path)
            facts = {
                key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.to")
            }
        except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError, OverflowError) as error:
            raise BadInput(
                f"{path}: not a whole GGUF file ({error}); download it again, or `pip install -U gguf`."
            ) from None
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            kind, start, n_bytes = tensor.tensor_type.name, int(tensor.data_offset), int(tensor.n_bytes)
            self.places[tensor.name] = TensorPlace(path.name, kind, shape, start, n_bytes)
        with path.open("rb") as stream:
            self._headers[path.name] = stream.read(int(reader.data_offset))
        return facts

    def _config(self, architecture: str, facts: dict[str, Any]) -> dict[str, Any]:
        """What config.json would say."""

        def fact(key: str) -> Any:
            return facts.get(f"{architecture}.{key}")

        config = {field: fact(key) for field, key in FIELDS.items() if fact(key) is not None}
        name = ARCHITECTURES[architecture]
        if architecture == "llama" and "num_experts" in config:
            name = "MixtralForCausalLM"
        config["vocab_size"] = self.places["token_embd.weight"].shape[0] if "token_embd.weight" in self.places else None
        config["tie_word_embeddings"] = "output.weight" not in self.places
        config["attention_bias"] = "blk.0.attn_output.bias" in self.places
        if architecture == "qwen3moe":
            config["norm_topk_prob"] = True  # of every published one; the metadata do not say
        if architecture == "deepseek2":
            name = "DeepseekV3ForCausalLM" if fact("expert_gating_func") == SIGMOID else name
            key, value = (
                fact(f"attention.{part}_length_mla") or fact(f"attention.{part}_length") for part in ("key", "value")
            )
            config |= {"num_key_value_heads": config.get("num_attention_heads"), "v_head_dim": value}
            config["qk_nope_head_dim"] = key - config.get("qk_rope_head_dim", 0)
            config["topk_method"] = "group_limited_greedy" if config.get("n_group", 1) > 1 else "greedy"
            config["num_hidden_layers"] -= fact("nextn_predict_layers") or 0
        kind = fact("rope.scaling.type")
        if kind not in (None, "none"):
            mscale = 10 * (fact("rope.scaling.yarn_log_multiplier") or 0.0)  # 0.1 is in llama.cpp's factor
            config["rope_scaling"] = {
                "rope_type": kind,
                "factor": fact("rope.scaling.factor"),
                "original_max_position_embeddings": fact("rope.scaling.original_context_length"),
                "truncate": architecture != "gpt-oss",
                "mscale": mscale,
                "mscale_all_dim": mscale,
            }
        return {"architectures": [name], **config}

    @staticmethod
    def _names_of(architecture: str, spec: ModelSpec) -> Any:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        number = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == architecture)
        return get_tensor_name_map(number, spec.n_layers)

    def _gguf_name(self, name: str) -> str:
        if name.endswith("e_score_correction_bias"):
            return f"blk.{name.split('.')[2]}.exp_probs_b.bias"
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return f"{found}.weight" if name.endswith("sinks") else str(found)

    def _check_gguf(self, spec: ModelSpec, path: Path) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        from specmoeoff.runtime.architectures import expected_shapes

        for name, place in self.places.items():
            kind = GGMLQuantizationType[place.dtype]
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise BadInput(
                    f"{path}: {name} is in {place.dtype}, which the gguf package cannot dequantise; use another quantisation."
                ) from None
        stacked = {"gate": (spec.intermediate, spec.hidden), "up": (spec.intermediate, spec.hidden)}
        stacked["down"] = (spec.hidden, spec.intermediate)
        for name, shape in expected_shapes(spec).items():
            if ".experts." in name:
                continue
            self._check_place(path, self._gguf_name(name), shape)
        for layer in range(spec.n_dense_layers, spec.n_layers if spec.n_experts > 1 else 0):
            for part, shape in stacked.items():
                self._check_place(path, f"blk.{layer}.ffn_{part}_exps.weight", (spec.n_experts, *shape))

    def _check_place(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        place = self.places.get(name)
        if place is None and name.endswith("attn_kv_b.weight"):
            return self._check_place(path, name.replace("kv_b", "k_b"), self.places[name.replace("kv_b", "k_b")].shape)
        if place is None:
            raise BadInput(f"{path}: tensor {name} is missing; download the file again.")
        if place.shape not in (shape, shape[1:] if shape[0] == 1 else shape):
            raise BadInput(f"{path}: {name} has shape {place.shape}, its metadata ask for {shape}.")

    def tensor_bf16(self, name: str) -> np.ndarray:
        return to_bf16(self.tensor_f32(name))

    def tensor_f32(self, name: str, index: int | None = None) -> np.ndarray:
        found = self._gguf_name(name)
        if found.endswith("attn_kv_b.weight") and found not in self.places:
            # Files made for the latent cache keep both halves apart, that of keys transposed.
            keys, values = (self._dequantised(found.replace("kv_b", f"{part}_b")) for part in "kv")
            return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, values.shape[-1])
        values = self._dequantised(found, index)
        if self._paired_rows and found.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp has rows that turn together side by side; Hugging Face half a head apart.
            values = (
                values.reshape(-1, self.spec.head_dim // 2, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
            )
        return values[None] if name.endswith("shared_expert_gate.weight") and values.ndim == 1 else values

    def expert(self, layer: int, expert: int, precision: Precision) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.spec.n_experts == 1:
            return super().expert(layer, expert, precision)
        rounded = to_bf16 if precision == "bf16" else np.asarray
        gate, up, down = (
            rounded(self._dequantised(f"blk.{layer}.ffn_{part}_exps.weight", expert)) for part in ("gate", "up", "down")
        )
        return gate, up, down

    def expert_biases(self, layer: int) -> np.ndarray:
        parts = (self._dequantised(f"blk.{layer}.ffn_{part}_exps.bias") for part in ("gate", "up", "down"))
        return np.concatenate(list(parts), axis=1)

    def _dequantised(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor, or its index-th part, as fp32 of its shape."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        place = self.places[name]
        shape = place.shape if index is None else place.shape[1:]
        kind = GGMLQuantizationType[place.dtype]
        data = self._read_bytes(place, place.n_bytes // (1 if index is None else place.shape[0]), index or 0)
        native = {"F32": np.float32, "F16": np.float16}.get(place.dtype)
        data = data.view(native) if native else data.reshape(*shape[:-1], -1)
        return np.ascontiguousarray(dequantize(data, kind), np.float32).reshape(shape)
