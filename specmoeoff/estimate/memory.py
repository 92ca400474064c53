"""Bytes by tier of a plan, exact to the allocation: what the runtime will take, and what to change where it is too much."""

from specmoeoff.kernels.cpu import PAGE_TOKENS, LayerShape, packed_expert_bytes, packed_linear_bytes, scratch_bytes
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import PlanDecode, PlanMemory


def expert_stride(spec: ModelSpec) -> int:
    """Bytes between experts in the packed file: whole disk blocks."""
    return -(-packed_expert_bytes(spec.hidden, spec.intermediate) // 4096) * 4096


def layer_shape(spec: ModelSpec) -> LayerShape:
    """A model's layer as the kernels see it."""
    return LayerShape(
        hidden=spec.hidden,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        intermediate=spec.intermediate,
        n_experts=spec.n_experts,
        n_active=spec.n_active,
        rms_eps=spec.rms_eps,
    )


def dense_bytes(spec: ModelSpec) -> int:
    """Embedding, head, norms, attention projections and routers as packed."""
    shape = layer_shape(spec)
    router = packed_linear_bytes(spec.n_experts, spec.hidden) if spec.n_experts > 1 else 0
    layer = (
        packed_linear_bytes(shape.qkv_width, spec.hidden)
        + packed_linear_bytes(spec.hidden, spec.n_heads * spec.head_dim)
        + router
        + 8 * spec.hidden
    )
    head = packed_linear_bytes(spec.vocab, spec.hidden)
    return 2 * spec.vocab * spec.hidden + head + 4 * spec.hidden + spec.n_layers * layer


def kv_bytes(spec: ModelSpec, decode: PlanDecode) -> int:
    """Pages for `kv_tokens`, or for `batch` requests of `context_tokens`, and the spare page."""
    whole = decode.batch * -(-decode.context_tokens // PAGE_TOKENS)
    n_pages = 1 + (-(-decode.kv_tokens // PAGE_TOKENS) if decode.kv_tokens else whole)
    return n_pages * PAGE_TOKENS * spec.kv_bytes_per_token


def workspace_bytes(spec: ModelSpec, max_rows: int, n_positions: int) -> int:
    """Activations of a pass and the rotary tables."""
    activations = max_rows * (spec.hidden * 6 + spec.n_active * (8 + spec.hidden * 4))
    return activations + n_positions * spec.head_dim * 4


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
        layer_shape(spec), rows, decode.context_tokens, n_threads
    )
    host = {
        "process": process_bytes,
        "dense_weights": dense_bytes(spec),
        "kv": kv_bytes(spec, decode),
    }
    if draft is not None and decode.drafter == "model":
        host["draft_weights"] = dense_bytes(draft) + draft.n_all_experts * expert_stride(draft)
        host["draft_kv"] = kv_bytes(draft, decode)
        workspace += workspace_bytes(draft, rows, decode.context_tokens)
    host["workspace"] = workspace
    fast = {"resident_experts": n_resident * stride, "stream_slots": stream_slots * stride}
    return PlanMemory(fast=fast, host=host, disk={"experts_file": spec.n_all_experts * stride})


def in_mib(n_bytes: int) -> str:
    """Rounded up, for people."""
    return f"{-(-n_bytes // (1 << 20)):,} MiB"
