"""What every kernel computes, as plainly as NumPy can say it, in float64. Slow on purpose."""

import numpy as np


def bf16_to_f64(x: np.ndarray) -> np.ndarray:
    """bf16 carried as uint16, exactly."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (M, n_in) bf16, weight (n_out, n_in) bf16 -> (M, n_out)."""
    return bf16_to_f64(x) @ bf16_to_f64(weight).T


def rmsnorm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x (M, H) -> (M, H)."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """Rotary embedding by halves: x (M, heads, dim), cosines and sines (M, dim / 2)."""
    low, high = np.split(x, 2, axis=-1)
    c, s = cosines[:, None], sines[:, None]
    return np.concatenate([low * c - high * s, high * c + low * s], axis=-1)


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray, first_position: int) -> np.ndarray:
    """Causal grouped-query attention of one request, scale inside query.

    query (n, heads, dim), keys and values (first_position + n, kv_heads, dim) -> (n, heads, dim).
    """
    n, n_heads, _ = query.shape
    group = n_heads // keys.shape[1]
    out = np.empty(query.shape)
    for token in range(n):
        seen = first_position + token + 1
        for head in range(n_heads):
            scores = keys[:seen, head // group] @ query[token, head]
            weights = np.exp(scores - scores.max())
            out[token, head] = weights @ values[:seen, head // group] / weights.sum()
    return out


def expert(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """SwiGLU of x (M, H) bf16; gate, up (I, H), down (H, I) bf16. Activations are rounded to bf16 between, as the kernels do."""
    g, u = linear(x, gate), linear(x, up)
    return linear(f32_to_bf16(g / (1 + np.exp(-g)) * u), down)


def route(logits: np.ndarray, n_active: int) -> tuple[np.ndarray, np.ndarray]:
    """Mixtral's router: softmax over all, the largest n_active, renormalised. Lowest index among equals."""
    index = np.argsort(-logits, axis=-1, kind="stable")[:, :n_active]
    chosen = np.take_along_axis(logits, index, axis=-1)
    weight = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    return index, weight / weight.sum(axis=-1, keepdims=True)


def unpack_pages(k_pages: np.ndarray, v_pages: np.ndarray, pages: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n keys and values of a request, each (n, kv_heads, dim), from its pages."""
    keys, values = k_pages[pages], v_pages[pages]  # (p, heads, dim/2, 64, 2), (p, heads, 32, dim, 2)
    heads = keys.shape[1]
    k = keys.transpose(0, 3, 1, 2, 4).reshape(-1, heads, keys.shape[2] * 2)
    v = values.transpose(0, 2, 4, 1, 3).reshape(-1, heads, values.shape[3])
    return bf16_to_f64(k[:n]), bf16_to_f64(v[:n])
