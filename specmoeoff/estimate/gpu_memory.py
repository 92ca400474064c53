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
HEAD_ROWS, FP32_BYTES = 256, 4  # logits are made and reduced so many rows at a time
ROUNDING_BYTES = 16  # each purpose is rounded up

Tiers = dict[str, dict[str, np.ndarray]]


def largest_batch(kv_bytes: int, kv_bytes_per_token: int, request_tokens: float) -> int:
    """Requests whose KV cache fits (SpecMoEOff, section 5.3)."""
    return int(kv_bytes // (kv_bytes_per_token * request_tokens))


def split_kv(kv_bytes: int, target: ModelSpec, draft: ModelSpec) -> tuple[float, float]:
    """Bytes of target's and draft's KV where both share a budget."""
    share = draft.kv_bytes_per_token / target.kv_bytes_per_token
    return kv_bytes / (1 + share), kv_bytes * share / (1 + share)


def draft_params(head: ModelSpec) -> int:
    """Of the draft model's layers; embedding and output head are the target's."""
    return head.n_layers * (head.qkv_params + head.output_params + head.expert_params + head.other_layer_params)


def tiers(problem: Problem, choices: Choices) -> Tiers:
    """Bytes as floats, exact below 2**53. KV is reserved for the mean request: with hundreds of live requests their sum
    hardly varies, and it is by pages in use that an engine admits."""
    spec, head = problem.spec, problem.head
    k, steps = problem.of_draft(choices, "length"), problem.of_draft(choices, "steps")
    batch, n = choices.batch, len(choices)
    rows = batch * (k + 1) / choices.micro_batches
    queries, output = spec.attention_widths
    kv = batch * problem.request_tokens * spec.kv_bytes_per_token
    attention = rows * (queries + spec.kv_width + output) * BF16_BYTES
    experts = spec.n_expert_layers * spec.expert_bytes
    buffered = np.where(choices.on_demand, 1, BUFFERED_LAYERS)
    fast = {
        "dense_weights": np.full(n, float(spec.dense_params * BF16_BYTES)),
        "resident_experts": 1.0 * choices.resident * experts,
        "stream_buffers": 1.0 * problem.streamed(choices) * buffered * spec.expert_bytes,
        "kv": choices.kv_share * kv,
        "activations": batch * (k + 1) * spec.hidden * BF16_BYTES
        + attention
        + rows * spec.n_active * 2 * spec.intermediate * BF16_BYTES,
        "logits": np.full(n, float(HEAD_ROWS * spec.vocab * FP32_BYTES)),
        "margin": np.full(n, float(GPU_MARGIN_BYTES)),
    }
    host = {
        "experts": 1.0 * (spec.n_experts - choices.resident) * experts,
        "kv": (1 - choices.kv_share) * kv,
        "staging": 2 * (1 - choices.kv_share) * attention + 4 * (choices.on_host > 0) * rows * spec.hidden * BF16_BYTES,
        "margin": np.full(n, float(HOST_MARGIN_BYTES)),
    }
    if head is not None:
        draft_kv = (steps > 0) * batch * problem.request_tokens * head.kv_bytes_per_token
        fast["draft_weights"] = (steps > 0) * float(draft_params(head) * BF16_BYTES)
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
