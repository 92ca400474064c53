"""Every CPU kernel against the NumPy reference, for every instruction set, and bit for bit against itself."""

import os
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels import cpu, reference

ISAS = ("avx512bf16", "avx2", "scalar")
BF16_EPS = 2.0**-8


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in cpu.supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    return str(request.param)


def bf16(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return reference.f32_to_bf16(rng.standard_normal(shape) * scale)


def packed(weight: np.ndarray) -> np.ndarray:
    out = cpu.aligned_empty(cpu.packed_linear_bytes(*weight.shape))
    cpu.pack_linear(weight, out)
    return out


def close(found: np.ndarray, exact: np.ndarray, eps: float, scale: float | None = None) -> None:
    """Relative to the size of the numbers that were summed, not of their sum."""
    size = scale if scale is not None else float(np.abs(exact).max()) + 1e-6
    assert np.abs(found - exact).max() <= eps * size


@pytest.mark.parametrize(
    ("m", "n_in", "n_out"), [(1, 2, 1), (7, 48, 65), (6, 64, 64), (13, 130, 8), (50, 576, 192), (97, 32, 127)]
)
def test_linear_matches_float64(isa: str, m: int, n_in: int, n_out: int) -> None:
    rng = np.random.default_rng(m)
    x, weight, out = bf16(rng, m, n_in), bf16(rng, n_out, n_in), np.empty((m, n_out), np.float32)
    cpu.Kernels(2, isa).linear(x, packed(weight), n_out, out)
    # fp32 accumulation of n_in products of size about one
    close(out, reference.linear(x, weight), 2.0**-22 * n_in, 1.0 + np.sqrt(n_in))


@settings(max_examples=int(os.environ.get("SPECMOEOFF_EXAMPLES", "25")), deadline=None)
@given(m=st.integers(1, 70), pairs=st.integers(1, 60), n_out=st.integers(1, 140), threads=st.integers(1, 3))
def test_linear_rows_do_not_know_their_neighbours(m: int, pairs: int, n_out: int, threads: int) -> None:
    rng = np.random.default_rng(m * 1000 + pairs)
    x, weight = bf16(rng, m, 2 * pairs), packed(bf16(rng, n_out, 2 * pairs))
    for isa in cpu.supported_isas():
        together, alone = np.empty((m, n_out), np.float32), np.empty((1, n_out), np.float32)
        cpu.Kernels(threads, isa).linear(x, weight, n_out, together)
        row = m // 2
        cpu.Kernels(1, isa).linear(np.ascontiguousarray(x[row : row + 1]), weight, n_out, alone)
        assert np.array_equal(together[row], alone[0])


def test_rmsnorm_matches_float64(isa: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((5, 80)).astype(np.float32), rng.standard_normal(80).astype(np.float32)
    out = np.empty((5, 80), np.uint16)
    cpu.Kernels(2, isa).rmsnorm(x, weight, 1e-5, out)
    close(reference.bf16_to_f64(out), reference.rmsnorm(x, weight, 1e-5), BF16_EPS)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "n_active", "m"), [(16, 2, 1, 1), (48, 40, 2, 7), (64, 96, 2, 61), (80, 130, 3, 20)]
)
def test_experts_match_float64(isa: str, hidden: int, intermediate: int, n_active: int, m: int) -> None:
    rng = np.random.default_rng(hidden)
    x = bf16(rng, m, hidden)
    weights = [
        (
            bf16(rng, intermediate, hidden, scale=0.2),
            bf16(rng, intermediate, hidden, scale=0.2),
            bf16(rng, hidden, intermediate, scale=0.2),
        )
        for _ in range(3)
    ]
    experts = []
    for gate, up, down in weights:
        experts.append(cpu.aligned_empty(cpu.packed_expert_bytes(hidden, intermediate)))
        cpu.pack_expert(gate, up, down, experts[-1])
    slots = rng.permutation(m * n_active).astype(np.int32)
    parts = [np.sort(slots[: m // 2]), np.empty(0, np.int32), np.sort(slots[m // 2 :])]
    out = np.full((m * n_active, hidden), np.nan, np.float32)
    cpu.Kernels(2, isa).experts(x, experts, parts, out, intermediate)
    for part, weight in zip(parts, weights, strict=True):
        if len(part):
            exact = reference.expert(x[part // n_active], *weight)
            # one rounding of the activations to bf16 may fall on the other side
            close(out[part], exact, 2 * BF16_EPS)


def test_combine_adds_in_rank_order(isa: str) -> None:
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal((20, 32)).astype(np.float32), rng.standard_normal((60, 32)).astype(np.float32)
    weight = rng.random((20, 3)).astype(np.float32)
    expected = x.copy()
    for rank in range(3):
        expected += weight[:, rank, None] * out[rank::3]
    cpu.Kernels(2, isa).combine(x, out, weight)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("vocab", [5, 101, 512])
def test_head_chooses_the_highest_logit_and_the_lowest_index_on_ties(isa: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    x, norm, weight = rng.standard_normal((9, 48)).astype(np.float32), np.ones(48, np.float32), bf16(rng, vocab, 48)
    weight[vocab - 1] = weight[0]
    weight[vocab // 2] = weight[0]
    out, logits = np.empty(9, np.int32), np.empty((9, vocab), np.float32)
    cpu.Kernels(2, isa).head_argmax(x, norm, 1e-5, packed(weight), vocab, out, logits)
    assert np.array_equal(out, logits.argmax(axis=1))
    exact = reference.linear(reference.f32_to_bf16(reference.rmsnorm(x, norm, 1e-5)), weight)
    close(logits, exact, 2 * BF16_EPS)
    again = np.empty(9, np.int32)
    cpu.Kernels(1, isa).head_argmax(x, norm, 1e-5, packed(weight), vocab, again)
    assert np.array_equal(out, again)


@dataclass
class Layer:
    """A random layer with its plain weights."""

    shape: cpu.LayerShape
    weights: cpu.LayerWeights
    plain: dict[str, np.ndarray]


def make_layer(heads: int, kv_heads: int, dim: int, hidden: int, n_experts: int, n_active: int) -> Layer:
    rng = np.random.default_rng(heads * dim)
    shape = cpu.LayerShape(hidden, heads, kv_heads, dim, 64, n_experts, n_active, 1e-5)
    plain = {
        "input_norm": rng.random(hidden).astype(np.float32) + 0.5,
        "qkv": bf16(rng, shape.qkv_width, hidden, scale=0.3),
        "o": bf16(rng, hidden, heads * dim, scale=0.1),
        "post_norm": rng.random(hidden).astype(np.float32) + 0.5,
        "router": bf16(rng, n_experts, hidden, scale=0.3),
    }
    angles = rng.random((300, dim // 2)).astype(np.float32) * 6
    plain["cosines"], plain["sines"] = np.cos(angles), np.sin(angles)
    weights = cpu.LayerWeights(
        shape,
        plain["input_norm"],
        packed(plain["qkv"]),
        packed(plain["o"]),
        plain["post_norm"],
        packed(plain["router"]) if n_experts > 1 else None,
        plain["cosines"],
        plain["sines"],
    )
    return Layer(shape, weights, plain)


def new_pages(shape: cpu.LayerShape, n_pages: int) -> tuple[np.ndarray, np.ndarray]:
    """Pages full of NaN: whatever was never written must not matter."""
    heads, dim = shape.n_kv_heads, shape.head_dim
    return np.full((n_pages, heads, dim // 2, 64, 2), 0x7FC1, np.uint16), np.full(
        (n_pages, heads, 32, dim, 2), 0x7FC1, np.uint16
    )


def run_block(
    kernels: cpu.Kernels,
    layer: Layer,
    x: np.ndarray,
    counts: list[int],
    firsts: list[int],
    table: np.ndarray,
    pages: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, ...]:
    """x after the block, normed, expert_index, expert_weight."""
    rows = len(x)
    row_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    batch = cpu.Batch(row_start, np.asarray(firsts, np.int32), np.ascontiguousarray(table, np.int32))
    x = x.copy()
    shape = layer.shape
    normed = np.empty((rows, shape.hidden), np.uint16)
    index = np.empty((rows, shape.n_active), np.int32)
    weight = np.empty((rows, shape.n_active), np.float32)
    kernels.attention_block(layer.weights, batch, x, *pages, normed, index, weight)
    return x, normed, index, weight


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "hidden", "n_experts", "n_active"),
    [(6, 2, 16, 48, 8, 2), (9, 3, 64, 96, 4, 1), (4, 4, 128, 64, 5, 2), (8, 1, 80, 32, 1, 1)],
)
def test_attention_block_matches_float64(
    isa: str, heads: int, kv_heads: int, dim: int, hidden: int, n_experts: int, n_active: int
) -> None:
    layer = make_layer(heads, kv_heads, dim, hidden, n_experts, n_active)
    rng = np.random.default_rng(3)
    kernels, pages = cpu.Kernels(2, isa), new_pages(layer.shape, 9)
    table = np.array([[3, 1, 5], [7, 2, 4]])
    prompt = rng.standard_normal((63 + 130, hidden)).astype(np.float32)
    run_block(kernels, layer, prompt, [63, 130], [0, 0], table, pages)
    x = rng.standard_normal((5, hidden)).astype(np.float32)
    after, normed, index, weight = run_block(kernels, layer, x, [2, 3], [63, 130], table, pages)

    p = layer.plain
    q_width = heads * dim
    qkv = reference.linear(reference.f32_to_bf16(reference.rmsnorm(x, p["input_norm"], 1e-5)), p["qkv"])
    positions = np.array([63, 64, 130, 131, 132])
    query = reference.rotate(
        qkv[:, :q_width].reshape(5, heads, dim), p["cosines"][positions], p["sines"][positions]
    ) / np.sqrt(dim)
    query = reference.bf16_to_f64(reference.f32_to_bf16(query))
    exact = []
    for request, (rows, first) in enumerate(((slice(0, 2), 63), (slice(2, 5), 130))):
        n = rows.stop - rows.start
        keys, values = reference.unpack_pages(*pages, table[request], first + n)
        exact.append(reference.attention(query[rows], keys, values, first).reshape(n, -1))
    out = x + reference.linear(reference.f32_to_bf16(np.concatenate(exact)), p["o"])
    close(after, out, 3 * BF16_EPS)
    close(reference.bf16_to_f64(normed), reference.rmsnorm(after, p["post_norm"], 1e-5), BF16_EPS)
    if n_experts > 1:
        best, share = reference.route(reference.linear(normed, p["router"]), n_active)
        assert np.array_equal(index, best)
        assert np.abs(weight - share).max() < 1e-5
    else:
        assert (index == 0).all()
        assert (weight == 1).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_row_depends_on_its_own_history_only(isa: str, seed: int) -> None:
    """Same request alone in one call, and in chunks of any size among others, on other pages, with other threads."""
    rng = np.random.default_rng(seed)
    layer = make_layer(6, 2, 16, 48, 8, 2)
    length, n_others = int(rng.integers(65, 200)), int(rng.integers(1, 4))
    x = rng.standard_normal((length, 48)).astype(np.float32)
    alone = run_block(cpu.Kernels(1, isa), layer, x, [length], [0], np.arange(4)[None], new_pages(layer.shape, 4))

    pages = new_pages(layer.shape, 40)
    table = rng.permutation(40)[: 4 * (n_others + 1)].reshape(n_others + 1, 4)
    done, other_done = 0, [0] * n_others
    kernels = cpu.Kernels(int(rng.integers(1, 4)), isa)
    while done < length:
        count = min(int(rng.integers(1, 40)), length - done)
        counts = [int(rng.integers(1, 9)) for _ in range(n_others)]
        place = int(rng.integers(0, n_others + 1))
        counts.insert(place, count)
        firsts = [*other_done[:place], done, *other_done[place:]]
        rows = rng.standard_normal((sum(counts), 48)).astype(np.float32)
        begin = sum(counts[:place])
        rows[begin : begin + count] = x[done : done + count]
        mine = np.insert(table[1:], place, table[0], axis=0)
        found = run_block(kernels, layer, rows, counts, firsts, mine, pages)
        for a, b in zip(found, alone, strict=True):
            assert np.array_equal(a[begin : begin + count], b[done : done + count])
        done += count
        other_done = [f + c for i, (f, c) in enumerate(zip(firsts, counts, strict=True)) if i != place]


def test_rolled_back_tokens_leave_no_trace(isa: str) -> None:
    rng = np.random.default_rng(0)
    layer = make_layer(6, 2, 16, 48, 8, 2)
    kernels, pages, table = cpu.Kernels(2, isa), new_pages(layer.shape, 4), np.arange(4)[None]
    x = rng.standard_normal((70, 48)).astype(np.float32)
    run_block(kernels, layer, x[:66], [66], [0], table, pages)
    draft = rng.standard_normal((7, 48)).astype(np.float32)
    run_block(kernels, layer, draft, [7], [66], table, pages)
    found = run_block(kernels, layer, x[66:], [4], [66], table, pages)
    clean = run_block(kernels, layer, x, [70], [0], table, new_pages(layer.shape, 4))
    assert all(np.array_equal(a, b[66:]) for a, b in zip(found, clean, strict=True))


def test_wrong_arguments_are_named() -> None:
    kernels = cpu.Kernels(1)
    x, out = np.zeros((2, 64), np.uint16), np.zeros((2, 3), np.float32)
    weight = packed(np.zeros((3, 64), np.uint16))
    with pytest.raises(TypeError, match="x: uint16 array expected"):
        kernels.linear(x.astype(np.float32), weight, 3, out)
    with pytest.raises(ValueError, match=r"packed: shape"):
        kernels.linear(x, weight[1:], 3, out)
    with pytest.raises(ValueError, match="x: must be C-contiguous"):
        kernels.linear(np.zeros((2, 128), np.uint16)[:, ::2], weight, 3, out)
    with pytest.raises(ValueError, match=r"out: shape"):
        kernels.linear(x, weight, 3, out[:1])
    with pytest.raises(ValueError, match="page_table"):
        cpu.Batch(np.array([0, 1], np.int32), np.array([64], np.int32), np.zeros((1, 1), np.int32))
    expert = cpu.aligned_empty(cpu.packed_expert_bytes(64, 2))
    with pytest.raises(ValueError, match="row_slots"):
        kernels.experts(x, [expert], [np.array([2], np.int32)], np.zeros((2, 64), np.float32), 2)


def test_an_instruction_set_is_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, "mmx")
    with pytest.raises(MissingCapability, match="no such instruction set"):
        cpu.default_isa()
    monkeypatch.setenv(cpu.ISA_VARIABLE, "scalar")
    assert cpu.Kernels(1).isa == "scalar"
