"""What only the CUDA kernels compute, as plainly as NumPy can say it, in float64; the rest is in kernels/reference.py and in
runtime/verify.py."""

from collections.abc import Sequence

import numpy as np


def attention(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    seen: Sequence[np.ndarray],
    window: int = 0,
    n_sinks: int = 0,
    sink_logits: np.ndarray | None = None,
) -> np.ndarray:
    """Of one request: query (n, heads, dim), scaled; keys and values (slots, kv_heads, dim); seen[i]: the slots of what token i
    may see, by position, itself last. A window keeps the last `window` of them and the first n_sinks (Xiao et al. 2024,
    StreamingLLM); sink_logits (heads): a score without a value in each softmax. -> (n, heads, dim)."""
    n_heads = query.shape[1]
    group = n_heads // keys.shape[1]
    out = np.empty(query.shape)
    for token, path in enumerate(seen):
        place = np.arange(len(path))
        slots = path[(place >= len(path) - window) | (place < n_sinks)] if window else path
        for head in range(n_heads):
            scores = keys[slots, head // group] @ query[token, head]
            sink = [] if sink_logits is None else [sink_logits[head]]
            weights = np.exp(scores - max([*scores, *sink]))
            rest = sum(np.exp(sink - max([*scores, *sink])))
            out[token, head] = weights @ values[slots, head // group] / (weights.sum() + rest)
    return out


def route(logits: np.ndarray, n_active: int) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over all, the largest n_active as they are. Lowest index among equals."""
    index = np.argsort(-logits, axis=-1, kind="stable")[:, :n_active]
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return index, np.take_along_axis(weight / weight.sum(axis=-1, keepdims=True), index, axis=-1)
