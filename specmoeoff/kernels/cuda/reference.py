"""What only the CUDA kernels compute, as plainly as NumPy can say it, in float64; the rest is in kernels/reference.py."""

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


def uniforms(seed: int, position: int) -> np.ndarray:
    """(2,): what acceptance and choice of the token at `position` draw, in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, position, 0, 0])).random(2)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """logits (vocab,) -> probabilities."""
    weight = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)
    return weight / weight.sum()


def verify(
    logits: np.ndarray,
    draft_logits: np.ndarray | None,
    drafted: Sequence[int],
    temperature: float,
    seed: int,
    first_position: int,
) -> tuple[int, int]:
    """How many drafted tokens stand, and the token after them (Leviathan et al. 2023, algorithm 1); greedy at temperature 0.

    logits (len(drafted) + 1, vocab); draft_logits likewise, None: the drafter was sure. Accept where u q(x) < p(x); else the
    lowest token whose cumulative max(p - q, 0) exceeds u' times its sum.
    """
    for i, row in enumerate(logits):
        token = drafted[i] if i < len(drafted) else None
        if temperature == 0:
            if token == row.argmax():
                continue
            return i, int(row.argmax())
        p, q = softmax(row, temperature), np.zeros(len(row))
        accept, choose = uniforms(seed, first_position + i)
        if token is not None:
            q[token] = 1
            if draft_logits is not None:
                q = softmax(draft_logits[i], temperature)
            if accept * q[token] < p[token]:
                continue
        cumulative = np.cumsum(np.maximum(p - q, 0))
        return i, int(np.searchsorted(cumulative, choose * cumulative[-1], side="right"))
    raise AssertionError("the last row has no drafted token to accept")
