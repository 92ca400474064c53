"""What a Hugging Face config.json says of a model's shape, and what its tensors are called."""

import math
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from specmoeoff.errors import BadInput
from specmoeoff.kernels.cpu import MAX_EXPERTS, MAX_HEAD_DIM
from specmoeoff.specs.model import Architecture, ModelSpec, RopeScaling

SUPPORTED: dict[str, Architecture] = {
    "MixtralForCausalLM": "mixtral",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "GptOssForCausalLM": "gpt_oss",
}
DENSE = ("llama", "qwen2", "qwen3")
DEEPSEEK = ("deepseek_v2", "deepseek_v3")
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # by model and version of transformers
ROPE_THETA = {"mixtral": 1e6, "gpt_oss": 1.5e5}
GPT_OSS_ACTIVATION = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
MAX_ALL_EXPERTS = 1_000_000


class Config:
    """The fields of a config.json; what is missing or of another type gets its sentence."""

    def __init__(self, fields: dict[str, Any], path: Path) -> None:
        self.fields, self.path = fields, path

    def refuse(self, what: str) -> BadInput:
        return BadInput(f"{self.path}: {what}")

    def count(self, field: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, the default where the field is missing or null."""
        value = self.fields.get(field)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.refuse(f"{field} is {value!r}, a whole number above {least - 1} is expected; correct the file.")
        return value

    def require(self, field: str, *allowed: Any) -> None:
        """Refuse values of a field that this runtime does not compute."""
        value = self.fields.get(field)
        if value not in (None, *allowed):
            raise self.refuse(f"{field} {value!r} is not supported; use a model with {allowed[0]!r}.")


def spec_of(fields: dict[str, Any], path: Path, name: str, eos_token_ids: Any) -> ModelSpec:
    """The spec without its fingerprint. Raises BadInput for what the runtime cannot compute."""
    config = Config(fields, path)
    names = fields.get("architectures") or ["none"]
    found = names[0] if isinstance(names, list) else names
    found = found.removesuffix("Eagle") if isinstance(found, str) else found  # SGLang's name of EAGLE heads
    if not isinstance(found, str) or found not in SUPPORTED:
        raise config.refuse(f"architecture {found} is not supported; use a checkpoint of {' or '.join(SUPPORTED)}.")
    architecture = SUPPORTED[found]
    try:
        _refuse_what_the_kernels_lack(config, architecture)
        rope, theta = _rope(config, architecture)
    except (TypeError, AttributeError):
        raise config.refuse("a field has the wrong type; download the file again.") from None
    hidden, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    try:
        spec = ModelSpec(
            **{
                "name": name,
                "architecture": architecture,
                "n_layers": config.count("num_hidden_layers"),
                "hidden": hidden,
                "intermediate": config.count("intermediate_size"),
                "n_heads": n_heads,
                "n_kv_heads": config.count("num_key_value_heads", n_heads),
                "head_dim": 0 if architecture in DEEPSEEK else config.count("head_dim", hidden // n_heads),
                "vocab": config.count("vocab_size"),
                "n_experts": 1,
                "n_active": 1,
                "max_positions": config.count("max_position_embeddings"),
                "rms_eps": fields.get("rms_norm_eps", 1e-6),
                "rope_theta": theta,
                "rope_scaling": rope,
                "tie_embeddings": fields.get("tie_word_embeddings", False),
                "eos_token_ids": eos_token_ids,
                "fingerprint": "",
                "qkv_bias": fields.get("attention_bias") or architecture == "qwen2",
                "o_bias": fields.get("attention_bias") or False,
            }
            | _moe_fields(config, architecture)
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise config.refuse(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; correct the file.") from None
    spec = spec.model_copy(update={"other_layer_params": _other_layer_params(spec)})
    _check_sizes(spec, config)
    return spec


def _expert_count(config: Config) -> str:
    return next((field for field in EXPERT_COUNTS if field in config.fields), EXPERT_COUNTS[0])


def _moe_fields(config: Config, architecture: Architecture) -> dict[str, Any]:
    if architecture in DENSE:
        return {}
    fields = config.fields
    found: dict[str, Any] = {
        "n_experts": config.count(_expert_count(config)),
        "n_active": config.count("num_experts_per_tok"),
    }
    if architecture not in ("mixtral", "gpt_oss"):
        found["renormalise"] = fields.get("norm_topk_prob", architecture == "deepseek_v3")
    if "moe_intermediate_size" in fields:
        found["intermediate"] = config.count("moe_intermediate_size")
    if architecture == "olmoe":
        found["clip_qkv"] = fields.get("clip_qkv") or 0.0
    if architecture == "qwen2_moe":
        shared = config.count("shared_expert_intermediate_size")
        if shared % found["intermediate"]:
            raise config.refuse(
                f"shared_expert_intermediate_size {shared} is no multiple of moe_intermediate_size; use another model."
            )
        qkv_bias = fields.get("qkv_bias", True)
        found |= {"n_shared_experts": shared // found["intermediate"], "qkv_bias": qkv_bias}
    if architecture == "gpt_oss":
        n_layers = config.count("num_hidden_layers")
        every_other = [("sliding", "full")[i % 2] + "_attention" for i in range(n_layers)]
        config.require("layer_types", every_other)
        found |= {"n_sliding_layers": -(-n_layers // 2), "sliding_window": config.count("sliding_window", 128)}
        found |= {"expert_bias": True}
    if architecture in DEEPSEEK:
        found |= _deepseek_fields(config, architecture)
    return found


def _deepseek_fields(config: Config, architecture: Architecture) -> dict[str, Any]:
    fields = config.fields
    grouped = architecture == "deepseek_v3" or fields.get("topk_method") == "group_limited_greedy"
    # V2's routers do not renormalise, whatever norm_topk_prob says: transformers and the published weights agree on that.
    return {
        "renormalise": architecture == "deepseek_v3" and fields.get("norm_topk_prob", True),
        "head_dim": config.count("qk_nope_head_dim"),
        "rope_head_dim": config.count("qk_rope_head_dim"),
        "v_head_dim": config.count("v_head_dim"),
        "kv_latent": config.count("kv_lora_rank"),
        "q_latent": config.count("q_lora_rank", 0, least=0),
        "n_shared_experts": config.count("n_shared_experts", 0, least=0),
        "n_dense_layers": config.count("first_k_dense_replace", 0, least=0),
        "dense_intermediate": config.count("intermediate_size"),
        "routed_scale": fields.get("routed_scaling_factor", 1.0),
        "n_groups": config.count("n_group") if grouped else 0,
        "n_active_groups": config.count("topk_group") if grouped else 0,
    }


def _rope(config: Config, architecture: Architecture) -> tuple[dict[str, Any] | None, Any]:
    """Fields of RopeScaling, and the base."""
    fields = config.fields
    rope = {**(fields.get("rope_parameters") or {}), **(fields.get("rope_scaling") or {})}
    theta = fields.get("rope_theta", rope.get("rope_theta", ROPE_THETA.get(architecture, 1e4)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None, theta
    if kind not in ("linear", "llama3", "yarn"):
        raise config.refuse(f"rope_scaling of type {kind!r} is not supported; use linear, llama3, yarn or none.")
    known = {name: rope[name] for name in RopeScaling.model_fields if rope.get(name) is not None}
    original = rope.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
    return {**known, "kind": kind, "original_positions": original}, theta


def _refuse_what_the_kernels_lack(config: Config, architecture: Architecture) -> None:
    fields, refuse = config.fields, config.refuse
    quantization = fields.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "of unknown method")
        if (architecture, method) != ("gpt_oss", "mxfp4"):
            raise refuse(f"quantization_config ({method}) is not supported; use the bf16, fp16 or fp32 checkpoint.")
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", fields.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise refuse("partial_rotary_factor must be 1; use a model that rotates whole heads.")
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    if architecture != "gpt_oss" and window is not None and window < fields.get("max_position_embeddings", 0):
        raise refuse(
            f"sliding_window {window} is smaller than max_position_embeddings; only full attention is"
            " supported: lower max_position_embeddings to the window or use another model."
        )
    config.require("hidden_act", "silu", "swish")
    config.require("decoder_sparse_step", 1)
    config.require("mlp_only_layers", [])
    config.require("rope_interleave", True)
    config.require("topk_method", "greedy", "group_limited_greedy", "noaux_tc")
    config.require("moe_layer_freq", 1)
    if architecture == "gpt_oss":
        for field, value in GPT_OSS_ACTIVATION.items():
            config.require(field, value)
    biased = (
        ("mlp_bias",) if architecture in ("gpt_oss", "llama", "qwen3", "qwen3_moe") else ("mlp_bias", "attention_bias")
    )
    for field in biased:
        if fields.get(field):
            raise refuse(f"{field} is set, and such biases are not supported; use a model without them.")


def _other_layer_params(spec: ModelSpec) -> int:
    kept = re.compile(
        r".*((?<!correction_)bias|sinks|[qk]_norm\.weight|_a_layernorm\.weight|shared_expert_gate\.weight)"
    )
    layer = layer_tensors(spec, spec.n_layers - 1).values()
    return sum(math.prod(shape) for name, shape in layer if kept.fullmatch(name))


def _check_sizes(spec: ModelSpec, config: Config) -> None:
    refuse = config.refuse
    if spec.rms_eps < 0 or spec.rope_theta <= 0:
        raise refuse("rms_norm_eps or rope_theta is negative; download the file again.")
    if spec.rope_scaling and (spec.rope_scaling.factor <= 0 or spec.rope_scaling.original_positions < 1):
        raise refuse("rope_scaling: factor and original_max_position_embeddings must be positive; correct the file.")
    if spec.n_all_experts > MAX_ALL_EXPERTS or spec.n_experts > MAX_EXPERTS:
        raise refuse(f"{spec.n_all_experts:,} experts are more than a model has; download the file again.")
    if spec.n_active > spec.n_experts:
        raise refuse(f"num_experts_per_tok {spec.n_active} exceeds {_expert_count(config)} {spec.n_experts}.")
    if spec.n_dense_layers >= spec.n_layers:
        raise refuse(f"first_k_dense_replace {spec.n_dense_layers} leaves no layer with experts; correct the file.")
    if spec.n_heads % spec.n_kv_heads:
        raise refuse(f"num_attention_heads {spec.n_heads} is not a multiple of num_key_value_heads {spec.n_kv_heads}.")
    head_dim = spec.head_dim + spec.rope_head_dim
    v_head_dim = spec.v_head_dim or head_dim
    for field, value, multiple in (
        ("hidden_size", spec.hidden, 16),
        ("head_dim", head_dim, 16),
        ("v_head_dim", v_head_dim, 16),
        ("kv_lora_rank", spec.kv_latent, 16),
        ("q_lora_rank", spec.q_latent, 16),
        ("intermediate_size of the dense layers", spec.dense_intermediate if spec.n_dense_layers else 0, 16),
        ("intermediate_size", spec.intermediate, 16 if spec.n_shared_experts else 2),
    ):
        if value % multiple:
            raise refuse(f"{field} {value} is not a multiple of {multiple}, which the kernels need.")
    if max(head_dim, v_head_dim) > MAX_HEAD_DIM:
        raise refuse(f"head_dim {max(head_dim, v_head_dim)} exceeds {MAX_HEAD_DIM}, the kernels' limit.")


# --- tensor names ----------------------------------------------------------------------------------------------

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def expert_tensor_names(spec: ModelSpec, layer: int, expert: int) -> tuple[str, str, str]:
    """Names of one expert's gate, up and down projections; a dense model's FFN is its only expert."""
    prefix = f"model.layers.{layer}."
    if spec.architecture == "mixtral":
        w1, w3, w2 = (f"{prefix}block_sparse_moe.experts.{expert}.w{i}.weight" for i in (1, 3, 2))
        return w1, w3, w2
    prefix += "mlp." if spec.architecture in DENSE else f"mlp.experts.{expert}."
    return f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight", f"{prefix}down_proj.weight"


def stacked_expert_name(layer: int, part: str) -> str:
    """Name of a gpt-oss layer's `gate_up_proj` or `down_proj` of all experts."""
    return f"model.layers.{layer}.mlp.experts.{part}"


def router_name(spec: ModelSpec, layer: int) -> str:
    """Name of a layer's router weight, (n_experts, hidden)."""
    block = {"mixtral": "block_sparse_moe.gate", "gpt_oss": "mlp.router"}.get(spec.architecture, "mlp.gate")
    return f"model.layers.{layer}.{block}.weight"


def layer_tensors(spec: ModelSpec, layer: int) -> Tensors:
    """{what it is: (name, shape)} of every tensor of a layer but its routed experts'; matrices are (out, in)."""
    hidden, rope, latent = spec.hidden, spec.rope_head_dim, spec.kv_latent
    q, kv = spec.n_heads * (spec.head_dim + rope), spec.n_kv_heads * spec.head_dim
    prefix, attention = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
    tensors: Tensors = {
        "input_norm": (f"{prefix}input_layernorm.weight", (hidden,)),
        "post_norm": (f"{prefix}post_attention_layernorm.weight", (hidden,)),
        "o": (f"{attention}o_proj.weight", (hidden, spec.n_heads * (spec.v_head_dim or spec.head_dim))),
    }
    if latent:
        kv_up = spec.n_heads * (spec.head_dim + spec.v_head_dim)
        if spec.q_latent:
            tensors["q_down"] = (f"{attention}q_a_proj.weight", (spec.q_latent, hidden))
            tensors["q_latent_norm"] = (f"{attention}q_a_layernorm.weight", (spec.q_latent,))
        tensors["q_up"] = (f"{attention}q_{'b_' * bool(spec.q_latent)}proj.weight", (q, spec.q_latent or hidden))
        tensors["kv_down"] = (f"{attention}kv_a_proj_with_mqa.weight", (latent + rope, hidden))
        tensors["kv_latent_norm"] = (f"{attention}kv_a_layernorm.weight", (latent,))
        tensors["kv_up"] = (f"{attention}kv_b_proj.weight", (kv_up, latent))
    else:
        for part, n_out in (("q", q), ("k", kv), ("v", kv)):
            tensors[part] = (f"{attention}{part}_proj.weight", (n_out, hidden))
            if spec.qkv_bias:
                tensors[f"{part}_bias"] = (f"{attention}{part}_proj.bias", (n_out,))
            if part != "v" and spec.qk_norm != "none":
                width = spec.head_dim if spec.qk_norm == "head" else n_out
                tensors[f"{part}_norm"] = (f"{attention}{part}_norm.weight", (width,))
    if spec.o_bias:
        tensors["o_bias"] = (f"{attention}o_proj.bias", (hidden,))
    if spec.has_sinks:
        tensors["sinks"] = (f"{attention}sinks", (spec.n_heads,))
    return tensors | _feed_forward_tensors(spec, layer)


def _feed_forward_tensors(spec: ModelSpec, layer: int) -> Tensors:
    """The router's, and what every row takes: shared experts, or a dense layer's feed-forward."""
    mlp, hidden, tensors = f"model.layers.{layer}.mlp.", spec.hidden, Tensors()
    width = spec.n_shared_experts * spec.intermediate
    shared = mlp + ("shared_expert." if spec.architecture == "qwen2_moe" else "shared_experts.")
    if layer < spec.n_dense_layers:
        width, shared = spec.dense_intermediate, mlp
    elif spec.n_experts > 1:
        router = router_name(spec, layer)
        tensors["router"] = (router, (spec.n_experts, hidden))
        if spec.architecture == "gpt_oss":
            tensors["router_bias"] = (router.replace("weight", "bias"), (spec.n_experts,))
        if spec.architecture == "deepseek_v3":
            tensors["choice_bias"] = (f"{mlp}gate.e_score_correction_bias", (spec.n_experts,))
    if width:
        tensors["shared_gate"] = (f"{shared}gate_proj.weight", (width, hidden))
        tensors["shared_up"] = (f"{shared}up_proj.weight", (width, hidden))
        tensors["shared_down"] = (f"{shared}down_proj.weight", (hidden, width))
    if spec.architecture == "qwen2_moe":
        tensors["shared_weight"] = (f"{mlp}shared_expert_gate.weight", (1, hidden))
    return tensors


def expected_shapes(spec: ModelSpec, mxfp4: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this spec must hold, with its shape; gpt-oss experts in MXFP4 or not."""
    hidden, inner, n = spec.hidden, spec.intermediate, spec.n_experts
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tie_embeddings:
        shapes["lm_head.weight"] = (spec.vocab, hidden)
    for layer in range(spec.n_layers):
        shapes |= dict(layer_tensors(spec, layer).values())
        if spec.architecture == "gpt_oss":
            for part, n_out, n_in in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
                stacked = stacked_expert_name(layer, part)
                shapes[f"{stacked}_bias"] = (n, n_out)
                if mxfp4:
                    shapes[f"{stacked}_blocks"] = (n, n_out, n_in // 32, 16)
                    shapes[f"{stacked}_scales"] = (n, n_out, n_in // 32)
                else:
                    shapes[stacked] = (n, n_in, n_out)
            continue
        for expert in range(spec.n_experts_of(layer)):
            gate, up, down = expert_tensor_names(spec, layer, expert)
            shapes[gate] = shapes[up] = (inner, hidden)
            shapes[down] = (hidden, inner)
    return shapes


def ignored_tensors(spec: ModelSpec) -> re.Pattern[str]:
    """Tensors that may be there and do not matter: a tied head, rotary tables, DeepSeek's layer for predicting further tokens."""
    further = rf"|model\.layers\.{spec.n_layers}\..*" if spec.architecture == "deepseek_v3" else ""
    return re.compile(r"lm_head\.weight|.*rotary_emb\.inv_freq" + further)
