"""What every kernel computes, as plainly as NumPy can say it, in float64. Slow on purpose."""

import numpy as np

from specmoeoff.kernels.cpu import PAGE_TOKENS, KVShape


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


def attention(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    first_position: int,
    window: int = 0,
    sinks: np.ndarray | None = None,
    tree: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Grouped-query attention of one request, scale inside query, and the log of each row's sum of e^score.

    query (n, heads, key_dim), keys and values (first_position + n, kv_heads, dim) -> (n, heads, value_dim), (n, heads).
    """
    n, n_heads, _ = query.shape
    group = n_heads // keys.shape[1]
    out, log_sums = np.empty((n, n_heads, values.shape[2])), np.empty((n, n_heads))
    position = np.arange(first_position + n)
    for token in range(n):
        own = first_position + token
        seen = position <= own
        if tree is not None:
            seen = position < first_position
            seen[first_position:] = [int(tree[token]) >> j & 1 for j in range(n)]
        if window:
            seen &= position > own - window
        for head in range(n_heads):
            scores = keys[seen, head // group] @ query[token, head]
            beside = np.concatenate([scores, [] if sinks is None else sinks[head : head + 1]])
            weights, total = np.exp(scores - beside.max()), np.exp(beside - beside.max()).sum()
            out[token, head] = weights @ values[seen, head // group] / total
            log_sums[token, head] = beside.max() + np.log(total)
    return out, log_sums


def swiglu(gate: np.ndarray, up: np.ndarray, alpha: float, limit: float, shift: float) -> np.ndarray:
    """gate * sigmoid(alpha * gate) * (up + shift) of clamped gate and up; gpt-oss: 1.702, 7, 1; SiLU: 1, infinity, 0."""
    g, u = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return g / (1 + np.exp(-alpha * g)) * (u + shift)


def expert(
    x: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    biases: np.ndarray | None = None,
    clamp: tuple[float, float, float] = (1.0, np.inf, 0.0),
    group: int = 0,
) -> np.ndarray:
    """x (M, H) bf16; gate, up (I, H), down (H, I) float64; biases (2 I + H,) of the three; clamp: of swiglu.

    Activations are rounded to bf16 between, as the kernels do; with a group, what is multiplied is rounded to int8 too.
    """
    n = len(gate)
    b = np.zeros(2 * n + len(down)) if biases is None else biases.astype(np.float64)
    x = rounded_to_int8(x, group) if group else bf16_to_f64(x)
    inner = f32_to_bf16(swiglu(x @ gate.T + b[:n], x @ up.T + b[n : 2 * n], *clamp))
    return (rounded_to_int8(inner, group) if group else bf16_to_f64(inner)) @ down.T + b[2 * n :]


def rounded_to_int8(x: np.ndarray, group: int) -> np.ndarray:
    """x (M, n) bf16 -> (M, n) multiples of each group's largest magnitude over 127; scale and codes as fp32 finds them."""
    m, n = x.shape
    n_groups = -(-n // group)
    values = np.zeros((m, n_groups * group), np.float32)
    values[:, :n] = bf16_to_f64(x)
    groups = values.reshape(m, n_groups, group)
    most = np.abs(groups).max(axis=2, keepdims=True)
    codes = np.rint(groups * np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 1e-30))
    return (codes.astype(np.float64) * (most / np.float32(127))).reshape(values.shape)[:, :n]


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpack_strips(packed: np.ndarray, format: str, n_out: int, n_in: int) -> np.ndarray:
    """packed (bytes,) uint8 -> (n_out, n_in): the weights that codes and scales stand for (the layout: experts.c)."""
    group, per_byte = {"int8": (64, 1), "int4": (64, 2), "mxfp4": (32, 2)}[format]
    n_groups = -(-n_in // 64) * 64 // group
    blocks = packed.reshape(-(-n_out // 64), n_groups, 128 + 64 * group // per_byte)
    scales = bf16_to_f64(blocks[:, :, :128].copy().view(np.uint16))  # (strips, groups, 64)
    codes = blocks[:, :, 128:].reshape(*blocks.shape[:2], -1, 64, 4)
    if per_byte == 2:
        codes = np.stack([codes & 15, codes >> 4], axis=3).reshape(*blocks.shape[:2], -1, 64, 4)
    values = 2 * E2M1[codes] if format == "mxfp4" else codes - (128.0 if format == "int8" else 8.0)
    weights = values.transpose(0, 3, 1, 2, 4).reshape(-1, n_groups, group) * scales.transpose(0, 2, 1).reshape(
        -1, n_groups, 1
    )
    return weights.reshape(len(weights), -1)[:n_out, :n_in]


def unpack_expert(
    packed: np.ndarray, format: str, hidden: int, intermediate: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gate, up (I, H) and down (H, I) of a packed expert."""
    wide = -(-intermediate // 64) * 64
    n_down = len(packed) - -(-hidden // 64) * (wide * (66 if format == "int8" else 34 if format == "int4" else 36))
    first = packed[:n_down].reshape(wide // 64, 2, -1)
    gate, up = (unpack_strips(first[:, i].reshape(-1).copy(), format, intermediate, hidden) for i in (0, 1))
    return gate, up, unpack_strips(packed[n_down:], format, hidden, wide)[:, :intermediate]


def route(logits: np.ndarray, n_active: int) -> tuple[np.ndarray, np.ndarray]:
    """Mixtral's router: softmax over all, the largest n_active, renormalised. Lowest index among equals."""
    index = np.argsort(-logits, axis=-1, kind="stable")[:, :n_active]
    chosen = np.take_along_axis(logits, index, axis=-1)
    weight = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    return index, weight / weight.sum(axis=-1, keepdims=True)


def unpack_pages(pages: np.ndarray, shape: KVShape, table: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n keys and values of a request, (n, kv_heads, key_dim) and (n, kv_heads, value_dim), from its pages."""
    dtype = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32, "int8": np.int8}[shape.format]
    per_step, size = 2 if shape.format == "bf16" else 1, np.dtype(dtype).itemsize
    key_bytes, value_bytes = (dim * PAGE_TOKENS * size for dim in (shape.key_dim, shape.value_dim))
    heads = np.ascontiguousarray(pages[table]).reshape(len(table), shape.n_kv_heads, -1)
    widen = bf16_to_f64 if shape.format == "bf16" else lambda x: x.astype(np.float64)

    def strip(raw: np.ndarray, columns: int) -> np.ndarray:
        """(pages, heads, bytes) of one strip -> (pages, heads, summed dimension, columns)."""
        found = np.ascontiguousarray(raw).view(dtype).reshape(*raw.shape[:2], -1, columns, per_step)
        return widen(found.transpose(0, 1, 2, 4, 3).reshape(*raw.shape[:2], -1, columns))

    halves = np.split(heads[..., :key_bytes], PAGE_TOKENS // 64, axis=-1)
    keys = np.concatenate([strip(half, 64) for half in halves], axis=-1).swapaxes(2, 3)
    values = []
    for first in range(0, shape.value_dim, 64):
        columns = min(64, shape.value_dim - first)
        begin = key_bytes + first * PAGE_TOKENS * size
        values.append(strip(heads[..., begin : begin + columns * PAGE_TOKENS * size], columns))
    found = [keys, np.concatenate(values, axis=-1)]
    if shape.format == "int8":
        scales = np.ascontiguousarray(heads[..., key_bytes + value_bytes :]).view(np.float32)
        found = [x * scales[..., i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS, None] for i, x in enumerate(found)]
    k, v = (x.swapaxes(1, 2).reshape(-1, shape.n_kv_heads, x.shape[-1])[:n] for x in found)
    return k, v
