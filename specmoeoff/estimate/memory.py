"""Bytes by tier of a plan, exact to the allocation: what the runtime will take, and what to change where it is too much."""

from functools import cache

from specmoeoff.kernels.cpu import (
    HALVES,
    PAGE_TOKENS,
    SILU,
    LayerShape,
    Swiglu,
    packed_expert_bytes,
    packed_linear_bytes,
    scratch_bytes,
)
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import PlanDecode, PlanMemory

GPT_OSS_SWIGLU = Swiglu(alpha=1.702, limit=7.0, shift=1.0)


def expert_stride(spec: ModelSpec) -> int:
    """Bytes between experts in the packed file: whole disk blocks."""
    return -(-packed_expert_bytes(spec.hidden, spec.intermediate, spec.packed_format) // 4096) * 4096


def layer_shape(spec: ModelSpec, layer: int = -1) -> LayerShape:
    """A layer as the kernels see it; without a number, one with experts that sees all tokens."""
    dense = 0 <= layer < spec.n_dense_layers
    return LayerShape(
        hidden=spec.hidden,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim + spec.rope_head_dim,
        v_head_dim=spec.v_head_dim or spec.head_dim,
        rotary_dim=spec.rope_head_dim,
        q_latent=spec.q_latent,
        kv_latent=spec.kv_latent,
        intermediate=spec.intermediate,
        shared_intermediate=spec.dense_intermediate if dense else spec.n_shared_experts * spec.intermediate,
        n_experts=spec.n_experts,
        n_active=spec.n_active,
        window=spec.window_of(layer) if layer >= 0 else 0,
        norm_heads=spec.qk_norm != "all",
        sigmoid_router=spec.architecture == "deepseek_v3",
        renormalise=spec.renormalise,
        n_groups=spec.n_groups,
        n_active_groups=spec.n_active_groups,
        group_best=2 if spec.architecture == "deepseek_v3" else 1,
        rms_eps=spec.rms_eps,
        attention_scale=spec.attention_scale,
        routed_scale=spec.routed_scale,
        clip_qkv=spec.clip_qkv,
        precision=spec.precision,
    )


def layer_arrays(spec: ModelSpec, layer: int) -> list[str]:
    """Names of a layer's dense arrays, as kernels.cpu.LayerWeights takes them."""
    routed = layer >= spec.n_dense_layers and spec.n_experts > 1
    has = {
        "router": routed,
        "router_bias": routed and spec.architecture == "gpt_oss",
        "choice_bias": routed and spec.architecture == "deepseek_v3",
        "shared_weight": spec.architecture == "qwen2_moe",
        "qkv_bias": spec.qkv_bias,
        "o_bias": spec.o_bias,
        "q_norm": spec.qk_norm != "none",
        "k_norm": spec.qk_norm != "none",
        "sinks": spec.has_sinks,
    }
    shape = layer_shape(spec, layer)
    return [name for name in (*shape.vectors, *shape.matrices) if has.get(name, True)]


def expert_activation(spec: ModelSpec) -> Swiglu:
    """Of a routed expert."""
    return GPT_OSS_SWIGLU if spec.architecture == "gpt_oss" else SILU


@cache
def dense_bytes(spec: ModelSpec) -> int:
    """Embedding, head, norms, attention projections, routers and shared feed-forwards as packed."""
    embedding = 2 * HALVES[spec.precision] * spec.vocab * spec.hidden
    head = packed_linear_bytes(spec.vocab, spec.hidden, spec.precision)
    return embedding + head + 4 * spec.hidden + _layers_bytes(spec)


def _layers_bytes(spec: ModelSpec) -> int:
    n_bytes = 0
    for layer in range(spec.n_layers):
        shape = layer_shape(spec, layer)
        for name in layer_arrays(spec, layer):
            matrix = shape.matrices.get(name)
            size = packed_linear_bytes(*matrix, spec.precision) if matrix else 4 * shape.vectors[name]
            n_bytes += -(-size // 64) * 64
        n_bytes += -(-4 * spec.n_experts_of(layer) * spec.expert_bias_params // 64) * 64
    return n_bytes


@cache
def eagle_bytes(head: ModelSpec) -> int:
    """An EAGLE head's layer and linear map; embedding and output matrix are the target's."""
    linear = packed_linear_bytes(head.hidden, 2 * head.hidden, head.precision)
    return _layers_bytes(head) + packed_expert_bytes(head.hidden, head.intermediate, head.precision) + linear


def _n_pages(decode: PlanDecode) -> int:
    """For `kv_tokens`, or for `batch` requests of `context_tokens`, and the spare page."""
    whole = decode.batch * -(-decode.context_tokens // PAGE_TOKENS)
    return 1 + (-(-decode.kv_tokens // PAGE_TOKENS) if decode.kv_tokens else whole)


def kv_bytes(spec: ModelSpec, decode: PlanDecode) -> int:
    """Of all pages."""
    return spec.n_layers * _n_pages(decode) * layer_shape(spec).kv.page_bytes


def workspace_bytes(spec: ModelSpec, max_rows: int, n_positions: int) -> int:
    """Activations of a pass and the rotary tables."""
    activations = max_rows * (spec.hidden * (4 + 2 * HALVES[spec.precision]) + spec.n_active * (12 + spec.hidden * 4))
    return activations + n_positions * (spec.rope_head_dim or spec.head_dim) * 4


def max_rows(decode: PlanDecode) -> int:
    """The most tokens of one window."""
    return decode.batch * (decode.draft_length + 1) + decode.prefill_chunk_tokens


def plan_memory(
    spec: ModelSpec,
    draft: ModelSpec | None,
    decode: PlanDecode,
    n_resident: int,
    stream_slots: int,
    n_threads: int,
    process_bytes: int,
) -> PlanMemory:
    """Bytes by tier and purpose. `draft` counts only where the plan drafts with it."""
    stride, rows = expert_stride(spec), max_rows(decode)
    workspace = workspace_bytes(spec, rows, decode.context_tokens) + scratch_bytes(
        layer_shape(spec), rows, decode.context_tokens, n_threads, spec.packed_format
    )
    host = {
        "process": process_bytes,
        "dense_weights": dense_bytes(spec),
        "kv": kv_bytes(spec, decode),
    }
    if draft is not None and decode.drafter in ("model", "eagle"):
        host["draft_kv"] = kv_bytes(draft, decode)
        if decode.drafter == "eagle":
            host["draft_weights"] = eagle_bytes(draft)
            host["draft_features"] = _n_pages(decode) * PAGE_TOKENS * draft.hidden * 2 * HALVES[draft.precision]
        else:
            host["draft_weights"] = dense_bytes(draft) + draft.n_all_experts * expert_stride(draft)
        workspace += workspace_bytes(draft, rows, decode.context_tokens)
    host["workspace"] = workspace
    fast = {"resident_experts": n_resident * stride, "stream_slots": stream_slots * stride}
    return PlanMemory(fast=fast, host=host, disk={"experts_file": spec.n_all_experts * stride})


def in_mib(n_bytes: int) -> str:
    """Rounded up, for people."""
    return f"{-(-n_bytes // (1 << 20)):,} MiB"
