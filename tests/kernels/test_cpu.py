"""Every CPU kernel against the NumPy reference, for every instruction set, and bit for bit against itself."""

import itertools
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.errors import MissingCapability
from specmoeoff.kernels import cpu, reference

ISAS = ("amxbf16", "avx512bf16", "avx2", "scalar")
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
            exact = reference.expert(x[part // n_active], *map(reference.bf16_to_f64, weight))
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


def make_layer(
    heads: int, kv_heads: int, dim: int, hidden: int, n_experts: int, n_active: int, intermediate: int = 64
) -> Layer:
    rng = np.random.default_rng(heads * dim)
    shape = cpu.LayerShape(hidden, heads, kv_heads, dim, intermediate, n_experts, n_active, 1e-5)
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


def new_pages(shape: cpu.LayerShape, n_pages: int) -> np.ndarray:
    """Pages full of NaN: whatever was never written must not matter."""
    return np.full((n_pages, shape.kv.page_bytes), 255, np.uint8)


def run_block(
    kernels: cpu.Kernels,
    layer: Layer,
    x: np.ndarray,
    counts: list[int],
    firsts: list[int],
    table: np.ndarray,
    pages: np.ndarray,
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
    kernels.attention_block(layer.weights, batch, x, pages, normed, index, weight)
    return x, normed, index, weight


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "hidden", "n_experts", "n_active"),
    [
        (6, 2, 16, 48, 8, 2),
        (9, 3, 64, 96, 4, 1),
        (4, 4, 128, 64, 5, 2),
        (8, 1, 80, 32, 1, 1),
        (2, 1, 256, 64, 130, 8),
    ],
)
def test_attention_block_matches_float64(
    isa: str, heads: int, kv_heads: int, dim: int, hidden: int, n_experts: int, n_active: int
) -> None:
    layer = make_layer(heads, kv_heads, dim, hidden, n_experts, n_active)
    rng = np.random.default_rng(3)
    kernels, pages = cpu.Kernels(2, isa), new_pages(layer.shape, 9)
    table = np.array([[3, 1, 5], [7, 2, 4]])
    prompt = rng.standard_normal((127 + 258, hidden)).astype(np.float32)
    run_block(kernels, layer, prompt, [127, 258], [0, 0], table, pages)
    x = rng.standard_normal((5, hidden)).astype(np.float32)
    after, normed, index, weight = run_block(kernels, layer, x, [2, 3], [127, 258], table, pages)

    p = layer.plain
    q_width = heads * dim
    qkv = reference.linear(reference.f32_to_bf16(reference.rmsnorm(x, p["input_norm"], 1e-5)), p["qkv"])
    positions = np.array([127, 128, 258, 259, 260])
    query = reference.rotate(
        qkv[:, :q_width].reshape(5, heads, dim), p["cosines"][positions], p["sines"][positions]
    ) / np.sqrt(dim)
    query = reference.bf16_to_f64(reference.f32_to_bf16(query))
    exact = []
    for request, (rows, first) in enumerate(((slice(0, 2), 127), (slice(2, 5), 258))):
        n = rows.stop - rows.start
        keys, values = reference.unpack_pages(pages, layer.shape.kv, table[request], first + n)
        exact.append(reference.attention(query[rows], keys, values, first)[0].reshape(n, -1))
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
    length, n_others = int(rng.integers(129, 290)), int(rng.integers(1, 4))
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


def make_experts(hidden: int, intermediate: int, n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    experts = []
    for _ in range(n):
        gate, up = (bf16(rng, intermediate, hidden, scale=0.2) for _ in range(2))
        experts.append(cpu.aligned_empty(cpu.packed_expert_bytes(hidden, intermediate)))
        cpu.pack_expert(gate, up, bf16(rng, hidden, intermediate, scale=0.2), experts[-1])
    return experts


def row_space(shape: cpu.LayerShape, n: int) -> tuple[np.ndarray, ...]:
    """normed, expert_index, expert_weight, expert_out, slots."""
    rows, slots = (n, shape.n_active), n * shape.n_active
    index, weight = np.empty(rows, np.int32), np.empty(rows, np.float32)
    out = np.full((slots, shape.hidden), np.nan, np.float32)
    return np.empty((n, shape.hidden), np.uint16), index, weight, out, np.empty(slots, np.int32)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("n_experts", "n_active"), [(1, 1), (5, 2)])
def test_a_run_of_layers_is_its_operators_one_by_one(isa: str, threads: int, n_experts: int, n_active: int) -> None:
    rng, n_layers = np.random.default_rng(threads), 3
    layers = [make_layer(6, 2, 16, 48, n_experts, n_active, 72) for _ in range(n_layers)]
    experts = make_experts(48, 72, n_experts)
    biases = [rng.standard_normal(2 * 72 + 48).astype(np.float32) for _ in experts]
    shape, kernels = layers[0].shape, cpu.Kernels(threads, isa)
    parts, tables = [[5, 1], [9]], [[[3], [0]], [[2]]]
    x = rng.standard_normal((15, 48)).astype(np.float32)
    together = np.stack([new_pages(shape, 4) for _ in layers])
    one_by_one, pages, chosen = x.copy(), together.copy(), []
    for i, layer in enumerate(layers):
        normed, index, weight, out, _ = row_space(shape, 15)
        for rows, counts, table in zip((slice(0, 6), slice(6, 15)), parts, tables, strict=True):
            one_by_one[rows], normed[rows], index[rows], weight[rows] = run_block(
                kernels, layer, one_by_one[rows], counts, [0] * len(counts), np.array(table), pages[i]
            )
        if i == 1:  # whose rows take no experts
            chosen.append([0] * n_experts)
            continue
        slots = [np.flatnonzero(index.reshape(-1) == e).astype(np.int32) for e in range(n_experts)]
        chosen.append([len(s) for s in slots])
        kernels.experts(normed, experts, slots, out, 72, biases=biases)
        kernels.combine(one_by_one, out, weight)

    held = cpu.ExpertTable(shape, experts, biases=biases)
    stack = cpu.LayerStack([layer.weights for layer in layers], [held, None, held])
    batches = [
        cpu.Batch(np.cumsum([0, *counts]).astype(np.int32), np.zeros(len(counts), np.int32), np.array(table, np.int32))
        for counts, table in zip(parts, tables, strict=True)
    ]
    in_two_calls, their_pages = x.copy(), together.copy()
    begin_s = time.perf_counter()
    counts_of, clock = kernels.layers(stack, batches, x, together, *row_space(shape, 15))
    end_s = time.perf_counter()
    assert np.array_equal(x, one_by_one)
    assert np.array_equal(together, pages)
    assert counts_of.tolist() == chosen
    assert clock.shape == (n_layers, 3, 2)
    assert np.array_equal(clock.reshape(-1, 2)[1:, 0], clock.reshape(-1, 2)[:-1, 1])
    assert (np.diff([begin_s, *clock.reshape(-1, 2)[:, 1], end_s]) >= 0).all()

    kernels.layers(stack.part(0, 1), batches, in_two_calls, their_pages[:1], *row_space(shape, 15))
    kernels.layers(stack.part(1, 3), batches, in_two_calls, their_pages[1:], *row_space(shape, 15))
    assert np.array_equal(in_two_calls, one_by_one)
    assert np.array_equal(their_pages, pages)


@pytest.mark.parametrize("held", [(), (1, 4), (0, 1, 2, 3, 4)])
def test_a_layer_computes_the_experts_in_memory_and_tells_the_others_slots(isa: str, held: Collection[int]) -> None:
    rng, layer, experts = np.random.default_rng(7), make_layer(6, 2, 16, 48, 5, 2, 72), make_experts(48, 72, 5)
    shape, kernels = layer.shape, cpu.Kernels(2, isa)
    normed, _, _, out, slots = row_space(shape, 11)
    normed[:] = bf16(rng, 11, 48)
    index = np.argsort(rng.random((11, 4)), axis=1)[:, :2].astype(np.int32)  # nobody chooses the last
    weight, x = rng.random((11, 2)).astype(np.float32), rng.standard_normal((11, 48)).astype(np.float32)
    table = cpu.ExpertTable(shape, [e if i in held else None for i, e in enumerate(experts)])
    found = x.copy()
    used, start = kernels.feed_forward(table, normed, index, weight, found, out, slots)
    assert used == [*[e for e in held if e < 4], *[e for e in range(4) if e not in held]]
    of_each = [slots[a:b] for a, b in itertools.pairwise(start)]
    for expert, own in zip(used, of_each, strict=True):
        assert own.tolist() == np.flatnonzero(index.reshape(-1) == expert).tolist()

    wanted = np.full_like(out, np.nan)
    present = [(e, own) for e, own in zip(used, of_each, strict=True) if e in held]
    kernels.experts(normed, [experts[e] for e, _ in present], [own for _, own in present], wanted, 72)
    assert np.array_equal(out, wanted, equal_nan=True)
    if len(held) == 5:
        kernels.combine(x, wanted, weight)
    assert np.array_equal(found, x)
    incomplete = cpu.LayerStack([layer.weights], [cpu.ExpertTable(shape, [None] * 5)])
    batch = cpu.Batch(np.array([0, 11], np.int32), np.zeros(1, np.int32), np.zeros((1, 1), np.int32))
    with pytest.raises(ValueError, match="stack: experts are not in memory"):
        kernels.layers(incomplete, [batch], x, new_pages(shape, 1)[None], *row_space(shape, 11))


@settings(max_examples=int(os.environ.get("SPECMOEOFF_EXAMPLES", "25")), deadline=None)
@given(m=st.integers(1, 60), half=st.integers(1, 70), threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_expert_and_head_rows_do_not_know_their_neighbours(m: int, half: int, threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, intermediate = bf16(rng, m, 48), 2 * half
    gate, up = (bf16(rng, intermediate, 48, scale=0.2) for _ in range(2))
    expert = cpu.aligned_empty(cpu.packed_expert_bytes(48, intermediate))
    cpu.pack_expert(gate, up, bf16(rng, 48, intermediate, scale=0.2), expert)
    states, head = rng.standard_normal((m, 48)).astype(np.float32), packed(bf16(rng, 130, 48))
    ones, row = np.ones(48, np.float32), m - 1
    for isa in cpu.supported_isas():
        many, one = cpu.Kernels(threads, isa), cpu.Kernels(1, isa)
        together, alone = np.empty((m, 48), np.float32), np.empty((1, 48), np.float32)
        many.experts(x, [expert], [np.arange(m, dtype=np.int32)], together, intermediate)
        one.experts(x[row:].copy(), [expert], [np.zeros(1, np.int32)], alone, intermediate)
        assert np.array_equal(together[row], alone[0])
        all_logits, its = np.empty((m, 130), np.float32), np.empty((1, 130), np.float32)
        many.head_argmax(states, ones, 1e-5, head, 130, np.empty(m, np.int32), all_logits)
        one.head_argmax(states[row:].copy(), ones, 1e-5, head, 130, np.empty(1, np.int32), its)
        assert np.array_equal(all_logits[row], its[0])


def test_the_highest_logit_of_several_strips_is_the_lowest_of_equals(isa: str) -> None:
    weight = np.zeros((200, 16), np.uint16)
    weight[[70, 71, 150, 199]] = 0x3F80  # ones: all four logits are equal, and above the others'
    x, out = np.ones((3, 16), np.float32), np.empty(3, np.int32)
    for threads in (1, 2, 3):
        cpu.Kernels(threads, isa).head_argmax(x, np.ones(16, np.float32), 1e-5, packed(weight), 200, out)
        assert out.tolist() == [70] * 3


def test_calling_a_kernel_leaves_the_callers_cpus_as_they_were() -> None:
    before = os.sched_getaffinity(0)
    cpu.Kernels(2).rmsnorm(np.ones((4, 16), np.float32), np.ones(16, np.float32), 1e-5, np.empty((4, 16), np.uint16))
    assert os.sched_getaffinity(0) == before


def test_memory_is_private_and_in_huge_pages_where_there_are_any() -> None:
    array = cpu.aligned_empty(cpu.HUGE_PAGE * 2)
    assert array.ctypes.data % cpu.HUGE_PAGE == 0
    assert not array.any()
    address = array.ctypes.data
    mappings = Path("/proc/self/smaps").read_text().splitlines()
    header = next(i for i, line in enumerate(mappings) if "-" in line.split()[0] and _holds(line, address))
    assert mappings[header].split()[1].endswith("p")


def _holds(line: str, address: int) -> bool:
    first, _, last = line.split()[0].partition("-")
    try:
        return int(first, 16) <= address < int(last, 16)
    except ValueError:
        return False


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
        cpu.Batch(np.array([0, 1], np.int32), np.array([cpu.PAGE_TOKENS], np.int32), np.zeros((1, 1), np.int32))
    with pytest.raises(ValueError, match="x: the row length must be a positive multiple of 16, not 20"):
        kernels.combine(np.zeros((1, 20), np.float32), np.zeros((1, 20), np.float32), np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match="x: the row length must be a positive multiple of 16, not 18"):
        kernels.head_argmax(
            np.zeros((1, 18), np.float32), np.ones(18, np.float32), 1e-5, weight, 3, np.zeros(1, np.int32)
        )
    fixed = np.zeros((2, 3), np.float32)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="out: must be aligned and writeable"):
        kernels.linear(x, weight, 3, fixed)
    expert = cpu.aligned_empty(cpu.packed_expert_bytes(64, 2))
    with pytest.raises(ValueError, match="row_slots: a slot occurs twice"):
        kernels.experts(x, [expert], [np.array([1, 1], np.int32)], np.zeros((2, 64), np.float32), 2)
    with pytest.raises(ValueError, match="row_slots"):
        kernels.experts(x, [expert], [np.array([2], np.int32)], np.zeros((2, 64), np.float32), 2)


def test_an_instruction_set_is_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, "mmx")
    with pytest.raises(MissingCapability, match="no such instruction set"):
        cpu.default_isa()
    monkeypatch.setenv(cpu.ISA_VARIABLE, "scalar")
    assert cpu.Kernels(1).isa == "scalar"
