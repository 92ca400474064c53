"""Bytes by tier and purpose on a machine with a GPU, for arrays of configurations."""

from dataclasses import replace

import numpy as np

from specmoeoff.estimate.gpu_choices import Choices, Problem
from specmoeoff.specs.model import BF16_BYTES, ModelSpec

GIB = 1 << 30
GPU_MARGIN_BYTES = GIB  # CUDA context, library workspaces, fragmentation: as llama.cpp's fit keeps free
# The process, its CUDA context and a host copy of the dense weights: what SpecMoEOff's own numbers leave beside experts and
# KV, 250 - 84 - 160 and 190 - 84 - 100 GiB.
HOST_MARGIN_BYTES = 6 * GIB
BUFFERED_LAYERS = 2
ATTENTION_RANGE_TOKENS = 512  # as kernels/cuda/attention.cu cuts a context
HEAD_ROWS, FP32_BYTES = 256, 4  # logits are made and reduced so many rows at a time
ROUNDING_BYTES = 16  # each purpose is rounded up

Array = np.ndarray
Tiers = dict[str, dict[str, np.ndarray]]


def largest_batch(kv_bytes: int, kv_bytes_per_token: int, request_tokens: float) -> int:
    """Requests whose KV cache fits (SpecMoEOff, section 5.3)."""
    return int(kv_bytes // (kv_bytes_per_token * request_tokens))


def split_kv(kv_bytes: int, target: ModelSpec, draft: ModelSpec) -> tuple[float, float]:
    """Bytes of target's and draft's KV where both share a budget."""
    share = draft.kv_bytes_per_token / target.kv_bytes_per_token
    return kv_bytes / (1 + share), kv_bytes * share / (1 + share)


def gpu_dense_params(spec: ModelSpec) -> int:
    """All but the routed experts; the output matrix is packed, so that a tied embedding is there twice."""
    return spec.dense_params + spec.tie_embeddings * spec.vocab * spec.hidden


def draft_params(head: ModelSpec) -> int:
    """Of the draft model's layers; embedding and output head are the target's."""
    return head.n_layers * (head.qkv_params + head.output_params + head.expert_params + head.other_layer_params)


def activation_bytes(
    spec: ModelSpec, rows: Array, part_rows: Array, near: Array, far: Array, on_host: Array, context_tokens: float
) -> tuple[Array, Array]:
    """In GPU memory and in pinned host memory, as `runtime/gpu/model.py` allocates them: for all rows what outlives a node, for
    those of a micro-batch the rest. near, far, on_host: whether any KV is in GPU memory, any on the host, any expert there."""
    (queries, output), kv, hidden, active = spec.attention_widths, spec.kv_width, spec.hidden, spec.n_active
    away = BF16_BYTES * (queries + output) + FP32_BYTES * kv
    normed_and_sum = (BF16_BYTES + FP32_BYTES) * hidden
    each = normed_and_sum + BF16_BYTES * (queries + output) + 3 * 4 * active
    each = each + far * FP32_BYTES * kv + on_host * FP32_BYTES * hidden
    partial = -(-context_tokens // ATTENTION_RANGE_TOKENS) * (output + 2 * spec.n_heads)
    node = FP32_BYTES * (queries + kv + hidden + spec.n_experts + near * partial)
    node = node + active * (BF16_BYTES * spec.intermediate + FP32_BYTES * hidden)
    return rows * each + part_rows * node, rows * (far * away + on_host * (normed_and_sum + 2 * 4 * active))


def tiers(problem: Problem, choices: Choices) -> Tiers:
    """Bytes as floats, exact below 2**53. KV is reserved for the mean request: with hundreds of live requests their sum
    hardly varies, and it is by pages in use that an engine admits."""
    spec, head = problem.spec, problem.head
    k, steps = problem.of_draft(choices, "length"), problem.of_draft(choices, "steps")
    batch, n = choices.batch, len(choices)
    rows = batch * (k + 1)
    kv = batch * problem.request_tokens * spec.kv_bytes_per_token
    sides = choices.kv_share > 0, choices.kv_share < 1, choices.on_host > 0
    on_gpu, staging = activation_bytes(spec, rows, rows / choices.micro_batches, *sides, problem.request_tokens)
    experts = spec.n_expert_layers * spec.expert_bytes
    buffered = np.where(choices.on_demand, 1, BUFFERED_LAYERS)
    fast = {
        "dense_weights": np.full(n, float(gpu_dense_params(spec) * BF16_BYTES)),
        "resident_experts": 1.0 * choices.resident * experts,
        "stream_buffers": 1.0 * problem.streamed(choices) * buffered * spec.expert_bytes,
        "kv": choices.kv_share * kv,
        "activations": on_gpu,
        "logits": np.full(n, float(HEAD_ROWS * spec.vocab * FP32_BYTES)),
        "margin": np.full(n, float(GPU_MARGIN_BYTES)),
    }
    host = {
        "experts": 1.0 * (spec.n_experts - choices.resident) * experts,
        "kv": (1 - choices.kv_share) * kv,
        "staging": staging,
        "margin": np.full(n, float(HOST_MARGIN_BYTES)),
    }
    if head is not None:
        draft_kv = (steps > 0) * batch * problem.request_tokens * head.kv_bytes_per_token
        whole = any(d.drafter == "model" for d in problem.drafts)
        params = gpu_dense_params(head) + head.n_layers * head.expert_params if whole else draft_params(head)
        fast["draft_weights"] = (steps > 0) * float(params * BF16_BYTES)
        # A head too has activations and logits of its own (runtime/gpu/draft.py), and takes the target's features, which the host keeps.
        near, far = choices.draft_kv_share > 0, choices.draft_kv_share < 1
        on_gpu, staging = activation_bytes(head, rows, rows, near, far, np.zeros(n), problem.request_tokens)
        feature = (not whole) * BF16_BYTES * head.hidden
        fast["draft_activations"] = (steps > 0) * (on_gpu + rows * feature + HEAD_ROWS * head.vocab * FP32_BYTES)
        host["draft_staging"] = (steps > 0) * (staging + rows * feature)
        host["draft_features"] = (steps > 0) * batch * problem.request_tokens * feature
        fast["draft_kv"] = choices.draft_kv_share * draft_kv
        host["draft_kv"] = (1 - choices.draft_kv_share) * draft_kv
    return {"fast": fast, "host": host}


def total(purposes: dict[str, np.ndarray]) -> np.ndarray:
    """Bytes of a tier."""
    return np.sum([np.ceil(b) for b in purposes.values()], axis=0)


def fitting_batch(problem: Problem, choices: Choices, limits: dict[str, int]) -> np.ndarray:
    """The largest batch of each choice that exceeds no tier, 0 where none does: bytes are affine in the batch."""
    none, one = (tiers(problem, replace(choices, batch=np.full(len(choices), b))) for b in (0.0, 1.0))
    fits = np.full(len(choices), np.inf)
    for tier, limit in limits.items():
        fixed = sum(none[tier].values())
        each = sum(one[tier].values()) - fixed
        fits = np.minimum(fits, (limit - ROUNDING_BYTES - fixed) // np.maximum(each, 1e-9))
    return np.maximum(fits, 0.0)
