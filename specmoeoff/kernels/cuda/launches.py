"""How each kernel is launched: grid, block, shared memory and arguments, from arrays of any library with shapes and dtypes.

bf16 is carried as uint16. Pure, so that the tests run the very same launches on a CPU.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from specmoeoff.kernels.cpu import PAGE_TOKENS

Array = Any  # of NumPy or CuPy
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
WARP, FEATURES, DEPTH, RANGE_TOKENS = 32, 16, 64, 512  # as in the .cu files
BLOCK_WARPS = 4
STAGES = 4
SHARED_WEIGHTS_BYTES = 4 * (2 * DEPTH * FEATURES * 2 + 16)  # of a warp's ring and its barriers
NULL = np.uint64(0)


class Tile(NamedTuple):
    """What a block of grouped.cu takes at once, by so many warps, or so many blocks of a cluster: those share the weights' bytes."""

    features: int
    rows: int
    warps: int
    blocks: int = 1

    @property
    def suffix(self) -> str:
        return f"{self.features}x{self.rows}"

    @property
    def shared_bytes(self) -> int:
        return STAGES * self.rows // self.blocks * DEPTH * 2 + (self.blocks > 1) * self.warps * SHARED_WEIGHTS_BYTES


# As grouped.cu has them: those of the fewest rows that take a group whole, else of MANY_ROWS and more; of these the last whose
# grid has ENOUGH_BLOCKS, else the first.
TILES = {
    "gate_up": (
        Tile(64, 8, 4),
        Tile(64, 16, 4),
        Tile(64, 32, 4),
        Tile(64, 64, 4),
        Tile(128, 128, 8),
        Tile(128, 256, 8, 2),
    ),
    "linear": (
        *(Tile(64, 8, 4), Tile(64, 16, 4), Tile(64, 32, 4), Tile(64, 64, 4)),
        *(Tile(128, 128, 8), Tile(256, 128, 8), Tile(256, 256, 8, 2)),
    ),
}
ENOUGH_BLOCKS, MANY_ROWS = 100, 128


class Launch(NamedTuple):
    """One kernel's; arguments are arrays and NumPy scalars."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[Any, ...]


def _multiple(name: str, value: int, unit: int) -> int:
    if value < 1 or value % unit:
        raise ValueError(f"{name} must be a positive multiple of {unit}, not {value}")
    return value


def _ceil(n: int, unit: int) -> int:
    return -(-n // unit)


def _i32(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(v) for v in values)


def _by_warp(kernel: str, n_warps: int, *arguments: Any) -> Launch:
    return Launch(kernel, (_ceil(n_warps, BLOCK_WARPS), 1, 1), (BLOCK_WARPS * WARP, 1, 1), 0, arguments)


def pack_linear(weight: np.ndarray) -> np.ndarray:
    """weight (n_out, n_in) bf16 -> (ceil(n_out / 16), n_in / 16, 32, 8): what each lane of a warp hands to mma.m16n8k16, in order.

    A lane owns two adjacent features and, of 16 inputs, two pairs; missing features are zero.
    """
    n_out, n_in = weight.shape
    _multiple("n_in", n_in, DEPTH)
    whole = np.zeros((_ceil(n_out, FEATURES) * FEATURES, n_in), np.uint16)
    whole[:n_out] = weight
    parts = whole.reshape(-1, 8, 2, n_in // 16, 2, 4, 2)  # tile, g, feature, step, half, q, pair
    return np.ascontiguousarray(parts.transpose(0, 3, 1, 5, 4, 2, 6)).reshape(-1, n_in // 16, WARP, 8)


def pack_expert(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """gate, up (I, H), down (H, I) bf16 -> (3 I H,): the expert as it travels to the GPU."""
    return np.concatenate([pack_linear(matrix).reshape(-1) for matrix in (gate, up, down)])


def _grid(tile: Tile, features: int, n_groups: int, most_rows: int) -> tuple[int, int, int]:
    return _ceil(most_rows, tile.rows) * tile.blocks, _ceil(features, tile.features), n_groups


def choose_tile(kernel: str, features: int, n_groups: int, most_rows: int) -> Tile:
    """See TILES."""
    if most_rows > MANY_ROWS:
        first, *others = (t for t in TILES[kernel] if t.rows >= MANY_ROWS)
    else:
        rows = next(t.rows for t in TILES[kernel] if t.rows >= most_rows)
        first, *others = (t for t in TILES[kernel] if t.rows == rows)
    large = [t for t in others if math.prod(_grid(t, features, n_groups, most_rows)) >= ENOUGH_BLOCKS]
    return large[-1] if large else first


def grouped(kernel: str, features: int, n_groups: int, most_rows: int, tile: Tile | None, *arguments: Any) -> Launch:
    """`experts`' and `linear`'s: with arguments as grouped.cu has them."""
    tile = tile or choose_tile(kernel, features, n_groups, most_rows)
    grid = _grid(tile, features, n_groups, most_rows)
    return Launch(f"{kernel}_{tile.suffix}", grid, (tile.warps * WARP, 1, 1), tile.shared_bytes, arguments)


def experts(
    x: Array,
    packed: Array,
    start: Array,
    slots: Array,
    most_rows: int,
    hidden_out: Array,
    out: Array,
    tiles: tuple[Tile | None, Tile | None] = (None, None),
) -> list[Launch]:
    """SwiGLU: x (M, H) bf16, packed (n_experts,) uint64 addresses of `pack_expert`'s, start (n_experts + 1) and slots (row *
    n_active + rank) as token_lists has them, most_rows of any expert; hidden_out (M * n_active, I) bf16 between -> out
    (M * n_active, H) float32. `tiles`, of TILES of gate_up and of linear, change speed, not a bit."""
    (m, hidden), (n_slots, intermediate) = x.shape, hidden_out.shape
    _multiple("H", hidden, DEPTH), _multiple("I", intermediate, DEPTH)
    n, offset = len(packed), np.int64(2 * hidden * intermediate // 8)
    first = (x, packed, start, slots, *_i32(hidden, intermediate, n_slots // m), hidden_out)
    second = (hidden_out, packed, offset, start, slots, *_i32(intermediate, hidden), out)
    return [
        grouped("gate_up", intermediate, n, most_rows, tiles[0], *first),
        grouped("linear", hidden, n, most_rows, tiles[1], *second),
    ]


def linear(x: Array, packed: Array, ends: Array, out: Array, tile: Tile | None = None) -> Launch:
    """x (M, n_in) bf16, packed (1,) uint64 address of `pack_linear`'s, ends (2,) int32: 0 and M -> out (M, n_out) float32."""
    (m, n_in), n_out = x.shape, out.shape[1]
    _multiple("n_in", n_in, DEPTH)
    return grouped("linear", n_out, 1, m, tile, x, packed, np.int64(0), ends, NULL, *_i32(n_in, n_out), out)


def combine(x: Array, expert_out: Array, weight: Array, index: Array = None, elsewhere: Array = None) -> Launch:
    """x (M, H) float32 += sum over ranks, in order, of weight (M, n_active) * expert_out (M * n_active, H), but those of index
    (M, n_active) that elsewhere (n_experts) int32 marks."""
    m, hidden = x.shape
    whose = (NULL, NULL) if elsewhere is None else (index, elsewhere)
    arguments = (x, expert_out, weight, *whose, *_i32(hidden, weight.shape[1]))
    return Launch("combine", (_ceil(hidden, 256), m, 1), (256, 1, 1), 0, arguments)


def route(logits: Array, n_experts: int, index: Array, weight: Array, renormalise: bool = True) -> Launch:
    """logits (M, >= n_experts) float32 -> index int32, weight float32 (M, n_active): softmax over the chosen, else over all."""
    if not 0 < index.shape[1] <= n_experts <= 1024:
        raise ValueError(f"n_experts must be {index.shape[1]} to 1024, not {n_experts}")
    m, stride = logits.shape
    numbers = _i32(m, n_experts, stride, index.shape[1], renormalise)
    return _by_warp("route", m, logits, *numbers, index, weight)


def token_lists(index: Array, start: Array, slots: Array) -> Launch:
    """index (M, n_active) -> start (n_experts + 1), slots (M * n_active): each expert's slots, ascending."""
    return Launch("token_lists", (len(start) - 1, 1, 1), (256, 1, 1), 32, (index, *_i32(index.size), start, slots))


def embed(tokens: Array, embedding: Array, x: Array) -> Launch:
    """tokens (M,) int32 of embedding (vocab, H) bf16 -> x (M, H) float32."""
    return Launch("embed", (len(tokens), 1, 1), (128, 1, 1), 0, (tokens, embedding, *_i32(x.shape[1]), x))


def rmsnorm(x: Array, weight: Array, eps: float, out: Array, rows: Array = None) -> Launch:
    """x (M, H) float32, or its rows (N,) int32 -> out (M or N, H) bf16; an empty weight: no norm, x is rounded."""
    which, scale = NULL if rows is None else rows, weight if len(weight) else NULL
    return _by_warp("rmsnorm", len(out), x, which, scale, np.float32(eps), *_i32(*out.shape), out)


def copy(source: Array, to: Array) -> Launch:
    """Of equal arrays, whole 16-byte words of them, by the GPU's own cores: it passes by what waits for the copy engines."""
    words = source.nbytes // 16
    return Launch("copy", (_ceil(words, 256), 1, 1), (256, 1, 1), 0, (source, to, np.int64(words)))


class Pages(NamedTuple):
    """Paged keys and values of one layer, as the CPU kernels have them in bf16: kv (n_pages, n_kv_heads, 2 * dim * 128), and
    table (n_requests, max_pages) int32."""

    kv: Array
    table: Array


class Rows(NamedTuple):
    """Of a ragged batch, int32: row_start (n_requests + 1), first_position (n_requests); of each row request, slot (its place in
    the request's pages), position (what it is rotated by) and end (positions below are its to see).

    In a tree of drafts slot is first_position + place, position first_position + depth, and `paths` (M, max_depth) names the
    places of a row's ancestors and itself by depth; in a chain slot is position and paths is None.
    """

    row_start: Array
    first_position: Array
    request: Array
    slot: Array
    position: Array
    end: Array
    depth: Array
    paths: Array | None
    most_rows: int
    longest: int


def chain(counts: list[int], firsts: list[int]) -> Rows:
    """counts[i] new tokens in a row after firsts[i] old ones."""
    return _rows(counts, firsts, np.concatenate([np.arange(n) for n in counts]), None)


def tree(parents: list[list[int]], firsts: list[int]) -> Rows:
    """parents[i][j] is the place of the token that token j of request i follows (before it), -1 for the first."""
    paths: list[list[int]] = []
    for request in parents:
        begin = len(paths)
        for place, parent in enumerate(request):
            paths.append([*(paths[begin + parent] if parent >= 0 else []), place])
    padded = np.zeros((len(paths), max(map(len, paths))), np.int32)
    for row, path in zip(padded, paths, strict=True):
        row[: len(path)] = path
    depths = np.array([len(path) - 1 for path in paths])
    return _rows([len(request) for request in parents], firsts, depths, padded)


def _rows(counts: list[int], firsts: list[int], depth: np.ndarray, paths: np.ndarray | None) -> Rows:
    row_start = np.concatenate([[0], np.cumsum(counts)])
    request = np.repeat(np.arange(len(counts)), counts)
    first = np.asarray(firsts)[request]
    position = first + depth
    slot = first + np.arange(len(request)) - row_start[request]
    arrays = (row_start, np.asarray(firsts), request, slot, position, position + 1, depth)
    starts, firsts_of, requests, slots, positions, ends, depths = (np.ascontiguousarray(a, np.int32) for a in arrays)
    ragged = (starts, firsts_of, requests, slots, positions, ends, depths)
    return Rows(*ragged, paths, max(counts), int(position.max()) + 1)


def norm_rope_append(
    qkv: Array,
    norms: tuple[Array, Array] | None,
    eps: float,
    rotary: tuple[Array, Array],
    rows: Rows,
    pages: Pages,
    query: Array,
    away: Array = None,
) -> Launch:
    """qkv (M, n_heads + 2 n_kv_heads, dim) float32 -> query (M, n_heads, dim) bf16, scaled, and keys and values to their pages;
    norms: weights (dim) of queries and keys; rotary: cosines and sines (n_positions, dim / 2). Where away (2, M, n_kv_heads, dim)
    float32 is given, keys and values go there."""
    m, heads, dim = qkv.shape
    n_kv_heads = pages.kv.shape[1]
    numbers = _i32(pages.table.shape[1], m, heads - 2 * n_kv_heads, n_kv_heads, dim)
    of_rows = (rows.request, rows.slot, rows.position, pages.table)
    there = NULL if away is None else away
    arguments = (qkv, *(norms or (NULL, NULL)), np.float32(eps), *rotary, *of_rows, *numbers, query, pages.kv, there)
    return _by_warp("norm_rope_append", m * heads, *arguments)


def partial_floats(n_rows: int, n_heads: int, dim: int, longest: int) -> int:
    """float32 words `attention` needs between its kernels where the longest request ends at position `longest`."""
    return _ceil(longest, RANGE_TOKENS) * n_rows * n_heads * (dim + 2)


def attention(
    query: Array,
    rows: Rows,
    pages: Pages,
    partials: Array,
    result: Array,
    window: int = 0,
    n_sinks: int = 0,
    sink_logits: Array | None = None,
) -> list[Launch]:
    """query (M, n_heads, dim) bf16, rotated and scaled, over appended pages -> result, likewise.

    A row sees positions below its end; with a window only its last `window`, and the first n_sinks. sink_logits (n_heads) float32:
    one more score in each softmax, of no value.
    """
    m, n_heads, dim = query.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, not {dim}")
    n_kv_heads = pages.kv.shape[1]
    group = n_heads // n_kv_heads
    tiles = _ceil(rows.most_rows * group, 16) if rows.paths is None else rows.most_rows * _ceil(group, 16)
    warps = min(tiles, BLOCK_WARPS)
    grid = (_ceil(tiles, warps), n_kv_heads * _ceil(rows.longest, RANGE_TOKENS), len(rows.first_position))
    paths = NULL if rows.paths is None else rows.paths
    max_depth = 0 if rows.paths is None else rows.paths.shape[1]
    numbers = _i32(max_depth, pages.table.shape[1], n_heads, n_kv_heads, window, n_sinks)
    arguments = (
        query,
        pages.kv,
        rows.row_start,
        rows.first_position,
        pages.table,
        paths,
        rows.depth,
        *numbers,
        partials,
    )
    sinks = NULL if sink_logits is None else sink_logits
    return [
        Launch(f"attend_{dim}", grid, (warps * WARP, 1, 1), 0, arguments),
        _by_warp("merge", m * n_heads, partials, rows.end, sinks, *_i32(m, n_heads, dim), result),
    ]


def verify(
    logits: Array,
    draft_logits: Array | None,
    drafted: Array,
    row_start: Array,
    first_position: Array,
    seeds: Array,
    temperature: Array,
    n_accepted: Array,
    next_token: Array,
) -> Launch:
    """Acceptance and the next token of every request; see verify.cu. logits, draft_logits (M, vocab) float32; seeds uint64,
    temperature float64, the rest int32."""
    arrays = (
        logits,
        NULL if draft_logits is None else draft_logits,
        drafted,
        row_start,
        first_position,
        seeds,
        temperature,
    )
    return Launch(
        "verify", (len(seeds), 1, 1), (256, 1, 1), 128, (*arrays, *_i32(logits.shape[1]), n_accepted, next_token)
    )


def pages_shape(n_pages: int, n_kv_heads: int, dim: int) -> tuple[int, ...]:
    """Of `Pages.kv`."""
    return n_pages, n_kv_heads, 2 * dim * PAGE_TOKENS
