"""Every CUDA kernel, run on a CPU (see shim/host.cuh), against the references, and bit for bit against itself."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
from scipy import stats

from specmoeoff.kernels import cpu, reference
from specmoeoff.kernels.cuda import FOLDER, launches
from specmoeoff.kernels.cuda import reference as cuda_reference
from specmoeoff.kernels.cuda.launches import Pages, Rows
from specmoeoff.runtime import sampling, verify

Host = Any  # of conftest.py
BF16_EPS = 2.0**-8
ORDERS = range(6)
NAN = 0x7FC1


def bf16(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return reference.f32_to_bf16(rng.standard_normal(shape) * scale)


def f32(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def close(found: np.ndarray, exact: np.ndarray, eps: float) -> None:
    assert np.abs(found - exact).max() <= eps * (np.abs(exact).max() + 1e-6)


def addresses(*arrays: np.ndarray) -> np.ndarray:
    return np.array([a.ctypes.data for a in arrays], np.uint64)


TILES = list(zip_longest(*launches.TILES.values(), fillvalue=launches.TILES["gate_up"][-1]))
WAYS = pytest.mark.parametrize("wgmma", [True, False], ids=["wgmma", "mma"])  # a GPU has its own


class Experts:
    """Some experts, and rows that go to them very unevenly: to one of them none."""

    def __init__(
        self, m: int, hidden: int = 64, intermediate: int = 128, n_experts: int = 4, n_active: int = 2
    ) -> None:
        rng = np.random.default_rng(m)
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        self.plain = [[bf16(rng, *shape, scale=0.2) for shape in shapes] for _ in range(n_experts)]
        self.packed = [launches.pack_expert(*matrices) for matrices in self.plain]
        self.x, self.intermediate, self.n_active = bf16(rng, m, hidden), intermediate, n_active
        self.index = np.array([rng.permutation(n_experts - 1)[:n_active] for _ in range(m)], np.int32)

    def run(self, host: Host, index: np.ndarray, x: np.ndarray, tiles: Any = (None, None), **how: Any) -> np.ndarray:
        start, slots = np.full(len(self.plain) + 1, -1, np.int32), np.full(index.size, -1, np.int32)
        host.run(launches.token_lists(index, start, slots), **how)
        hidden_out = np.full((index.size, self.intermediate), NAN, np.uint16)
        out = np.full((index.size, x.shape[1]), np.nan, np.float32)
        most = int(np.bincount(index.reshape(-1)).max())
        host.run(launches.experts(x, addresses(*self.packed), start, slots, most, hidden_out, out, tiles), **how)
        return out


@WAYS
@pytest.mark.parametrize("m", [1, 7, 33, 90])
def test_experts_match_float64(host: Host, m: int, wgmma: bool) -> None:
    case = Experts(m)
    out = case.run(host, case.index, case.x, wgmma=wgmma)
    for slot, expert in enumerate(case.index.reshape(-1)):
        row = slot // case.n_active
        close(
            out[slot],
            reference.expert(case.x[row : row + 1], *map(reference.bf16_to_f64, case.plain[expert]))[0],
            2 * BF16_EPS,
        )


@WAYS
@pytest.mark.parametrize("tiles", TILES)
def test_an_experts_row_does_not_know_its_tile_or_its_neighbours(host: Host, tiles: Any, wgmma: bool) -> None:
    case, how = Experts(43, hidden=320, intermediate=192), {"wgmma": wgmma}
    together = case.run(host, case.index, case.x, tiles, **how)
    for row in (0, 20, 42):
        alone = case.run(host, case.index[row : row + 1], case.x[row : row + 1], TILES[0], **how)
        assert np.array_equal(together[2 * row : 2 * row + 2], alone)
    order = np.random.default_rng(0).permutation(43)
    mixed, x = np.ascontiguousarray(case.index[order]), np.ascontiguousarray(case.x[order])
    shuffled = case.run(host, mixed, x, tiles, **how)
    assert np.array_equal(shuffled.reshape(43, -1), together.reshape(43, -1)[order])


@pytest.mark.parametrize(("m", "n_in", "n_out"), [(1, 64, 1), (9, 128, 17), (70, 192, 100), (13, 64, 65)])
@WAYS
def test_linear_matches_float64_and_the_cpus_layout_free_reference(
    host: Host, m: int, n_in: int, n_out: int, wgmma: bool
) -> None:
    rng = np.random.default_rng(m)
    x, weight = bf16(rng, m, n_in), bf16(rng, n_out, n_in)
    packed, out = launches.pack_linear(weight), np.full((m, n_out), np.nan, np.float32)
    host.run(launches.linear(x, addresses(packed), np.array([0, m], np.int32), out), wgmma=wgmma)
    close(out, reference.linear(x, weight), 2.0**-22 * n_in)


@WAYS
@pytest.mark.parametrize("tile", launches.TILES["linear"])
def test_groups_of_any_size_are_multiplied_whole(host: Host, tile: launches.Tile, wgmma: bool) -> None:
    """As `linear` of experts has them: rows of all groups in some order, and of features not a multiple of the tile's."""
    rng, counts, n_in, n_out = np.random.default_rng(1), [0, 1, 7, 63, 64, 65, 129, 300], 192, 88
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    m = int(start[-1])
    slots, x = rng.permutation(m).astype(np.int32), bf16(rng, m, n_in)
    weights = [bf16(rng, n_out, n_in) for _ in counts]
    packed, out = [launches.pack_linear(w) for w in weights], np.full((m, n_out), np.nan, np.float32)
    numbers = (np.int32(n_in), np.int32(n_out))
    arguments = (x, addresses(*packed), np.int64(0), start, slots, *numbers, out)
    host.run(launches.grouped("linear", n_out, len(counts), max(counts), tile, *arguments), wgmma=wgmma)
    for group, weight in enumerate(weights):
        mine = slots[start[group] : start[group + 1]]
        if len(mine):
            close(out[mine], reference.linear(x[mine], weight), 2.0**-22 * n_in)


def test_combine_adds_in_rank_order(host: Host) -> None:
    rng = np.random.default_rng(0)
    x, out, weight = f32(rng, 5, 300), f32(rng, 15, 300), f32(rng, 5, 3)
    expected = x.copy()
    for rank in range(3):
        expected += weight[:, rank, None] * out[rank::3]
    host.run(launches.combine(x, out, weight))
    assert np.array_equal(x, expected)


def test_what_is_computed_elsewhere_is_neither_computed_nor_added(host: Host) -> None:
    case = Experts(11)
    packed, elsewhere = addresses(*case.packed), np.array([0, 1, 0, 0], np.int32)
    packed[1] = 0
    start, slots = np.full(5, -1, np.int32), np.full(case.index.size, -1, np.int32)
    host.run(launches.token_lists(case.index, start, slots))
    hidden_out = np.full((case.index.size, case.intermediate), NAN, np.uint16)
    out = np.full((case.index.size, 64), np.nan, np.float32)
    host.run(launches.experts(case.x, packed, start, slots, 11, hidden_out, out))
    assert np.array_equal(np.isnan(out).all(axis=1), case.index.reshape(-1) == 1)
    x, weight = np.zeros((11, 64), np.float32), np.ones((11, 2), np.float32)
    host.run(launches.combine(x, out, weight, case.index, elsewhere))
    assert np.array_equal(x, np.nansum(out.reshape(11, 2, 64), axis=1))


def test_embedding_is_looked_up(host: Host) -> None:
    rng = np.random.default_rng(0)
    table, tokens, x = bf16(rng, 9, 72), np.array([8, 0, 8], np.int32), np.full((3, 72), np.nan, np.float32)
    host.run(launches.embed(tokens, table, x))
    assert np.array_equal(x, reference.bf16_to_f64(table)[tokens])


@pytest.mark.parametrize(("m", "n_experts", "n_active"), [(1, 1, 1), (9, 8, 2), (5, 33, 4), (3, 128, 8), (2, 1024, 3)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_the_router_takes_the_largest_and_the_lowest_of_equals(
    host: Host, m: int, n_experts: int, n_active: int, renormalise: bool
) -> None:
    rng = np.random.default_rng(n_experts)
    logits = f32(rng, m, n_experts + 3)
    logits[0, :n_experts:2] = logits[0, :n_experts].max()
    index, weight = np.full((m, n_active), -1, np.int32), np.full((m, n_active), np.nan, np.float32)
    host.run(launches.route(logits, n_experts, index, weight, renormalise))
    exact = (reference if renormalise else cuda_reference).route(logits[:, :n_experts].astype(np.float64), n_active)
    assert np.array_equal(index, exact[0])
    close(weight, exact[1], 2.0**-20)


def test_rows_of_nan_choose_something_that_exists(host: Host) -> None:
    logits = np.full((3, 40), np.nan, np.float32)
    logits[0, 7] = 1
    index, weight = np.full((3, 4), -1, np.int32), np.zeros((3, 4), np.float32)
    host.run(launches.route(logits, 40, index, weight))
    assert index.tolist() == [[7, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    case = Drafts([1, 1], 40, 0.0, True)
    case.logits[:] = np.nan
    assert case.run(host).tolist() == [[case.drafted[0] == 0, 0], [case.drafted[2] == 0, 0]]


@pytest.mark.parametrize(("n_slots", "n_experts"), [(1, 3), (256, 5), (257, 128), (700, 2)])
def test_token_lists_are_a_stable_sort(host: Host, n_slots: int, n_experts: int) -> None:
    index = np.random.default_rng(n_slots).integers(0, n_experts, n_slots).astype(np.int32)
    start, slots = np.full(n_experts + 1, -1, np.int32), np.full(n_slots, -1, np.int32)
    host.run(launches.token_lists(index, start, slots))
    assert np.array_equal(slots, np.argsort(index, kind="stable"))
    assert np.array_equal(start, np.searchsorted(np.sort(index), np.arange(n_experts + 1)))


def test_rmsnorm_matches_float64(host: Host) -> None:
    rng = np.random.default_rng(0)
    x, weight, out = f32(rng, 7, 100), f32(rng, 100), np.full((7, 100), NAN, np.uint16)
    host.run(launches.rmsnorm(x, weight, 1e-5, out))
    close(reference.bf16_to_f64(out), reference.rmsnorm(x, weight, 1e-5), BF16_EPS)
    some, rows = np.full((2, 100), NAN, np.uint16), np.array([5, 2], np.int32)
    host.run(launches.rmsnorm(x, weight, 1e-5, some, rows))
    assert np.array_equal(some, out[rows])
    host.run(launches.rmsnorm(x, weight[:0], 1e-5, some, rows))
    close(reference.bf16_to_f64(some), x[rows], BF16_EPS)


class Cache:
    """Requests with old and new tokens, their pages full of NaN but for what was appended."""

    def __init__(self, rows: Rows, heads: int, kv_heads: int, dim: int, seed: int = 0, norms: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.rows, self.heads, self.kv_heads, self.dim = rows, heads, kv_heads, dim
        counts = np.diff(rows.row_start)
        self.ends = [int(f + n) for f, n in zip(rows.first_position, counts, strict=True)]
        per_request = -(-max(self.ends) // cpu.PAGE_TOKENS)
        table = 1 + rng.permutation(len(counts) * per_request).astype(np.int32).reshape(len(counts), -1)
        self.shape = cpu.KVShape(heads, kv_heads, dim, dim)
        kv = np.full(launches.pages_shape(1 + table.size, kv_heads, dim), NAN, np.uint16)
        self.pages = Pages(kv, table)
        self.bytes = kv.view(np.uint8).reshape(1 + table.size, -1)  # as the CPU's kernels take them
        angles = np.outer(np.arange(max(self.ends)), 0.9 ** np.arange(dim // 2)).astype(np.float32)
        self.rotary = (np.cos(angles), np.sin(angles))
        self.norms = (rng.random(dim).astype(np.float32), rng.random(dim).astype(np.float32)) if norms else None
        width = heads + 2 * kv_heads
        # One token's numbers depend on its request and slot alone, as if a model had made them.
        self.tokens = [f32(np.random.default_rng([seed, r]), end, width, dim) for r, end in enumerate(self.ends)]

    def append(self, host: Host, **how: Any) -> np.ndarray:
        """Old tokens first, then the rows; their queries."""
        firsts = [int(f) for f in self.rows.first_position]
        if any(firsts):
            # A request without old tokens joins in with its first new one, which the rows overwrite.
            self._append(host, launches.chain([max(f, 1) for f in firsts], [0] * len(firsts)), **how)
        return self._append(host, self.rows, **how)

    def _append(self, host: Host, rows: Rows, **how: Any) -> np.ndarray:
        qkv = np.stack([self.tokens[r][s] for r, s in zip(rows.request, rows.slot, strict=True)])
        query = np.full((len(qkv), self.heads, self.dim), NAN, np.uint16)
        host.run(launches.norm_rope_append(qkv, self.norms, 1e-5, self.rotary, rows, self.pages, query), **how)
        return query

    def attend(self, host: Host, query: np.ndarray, how: dict[str, Any] | None = None, **masks: Any) -> np.ndarray:
        n = launches.partial_floats(len(query), self.heads, self.dim, self.rows.longest)
        partials, result = np.full(n, np.nan, np.float32), np.full(query.shape, NAN, np.uint16)
        host.run(launches.attention(query, self.rows, self.pages, partials, result, **masks), **(how or {}))
        return result

    def close(self, found: np.ndarray, query: np.ndarray, **masks: Any) -> None:
        """Probabilities are rounded to bf16: the error is relative to the values, not to their mean."""
        largest = max(np.abs(tokens[:, self.heads + self.kv_heads :]).max() for tokens in self.tokens)
        assert np.abs(reference.bf16_to_f64(found) - self.exact(query, **masks)).max() <= BF16_EPS * largest

    def exact(self, query: np.ndarray, **masks: Any) -> np.ndarray:
        out = []
        for r, end in enumerate(self.ends):
            keys, values = reference.unpack_pages(self.bytes, self.shape, self.pages.table[r], end)
            first = int(self.rows.first_position[r])
            mine = slice(self.rows.row_start[r], self.rows.row_start[r + 1])
            seen = [
                np.arange(p + 1) if self.rows.paths is None else np.r_[:first, first + self.rows.paths[i, : d + 1]]
                for i, (p, d) in enumerate(
                    zip(self.rows.position[mine], self.rows.depth[mine], strict=True), mine.start
                )
            ]
            out.append(cuda_reference.attention(reference.bf16_to_f64(query[mine]), keys, values, seen, **masks))
        return np.concatenate(out)


@pytest.mark.parametrize("norms", [False, True])
def test_append_normalises_rotates_and_stores_as_the_cpu_lays_pages_out(host: Host, norms: bool) -> None:
    cache = Cache(launches.chain([3, 1, 66], [64, 0, 5]), 4, 2, 80, norms=norms)
    query = cache.append(host)
    for r, end in enumerate(cache.ends):
        q, k, v = np.split(cache.tokens[r].astype(np.float64), [4, 6], axis=1)
        if cache.norms:
            q, k = (reference.rmsnorm(x, w, 1e-5) for x, w in zip((q, k), cache.norms, strict=True))
        q, k = (reference.rotate(x, *(t[:end] for t in cache.rotary)) for x in (q, k))
        keys, values = reference.unpack_pages(cache.bytes, cache.shape, cache.pages.table[r], end)
        close(keys, k, BF16_EPS)
        close(values, v, BF16_EPS)
        mine = slice(cache.rows.row_start[r], cache.rows.row_start[r + 1])
        close(reference.bf16_to_f64(query[mine]), q[cache.rows.first_position[r] :] / np.sqrt(80), BF16_EPS)
        if end % 2:  # the CPU's kernel multiplies the other half of the last pair by 0
            after = reference.unpack_pages(cache.bytes, cache.shape, cache.pages.table[r], end + 1)[1][-1]
            assert not after.any()


def test_keys_and_values_of_pages_elsewhere_are_those_that_pages_here_get(host: Host) -> None:
    cache = Cache(launches.chain([3, 2], [0, 0]), 4, 2, 64, norms=True)
    query = cache.append(host)
    qkv = np.stack([cache.tokens[r][s] for r, s in zip(cache.rows.request, cache.rows.slot, strict=True)])
    again, away = np.full_like(query, NAN), np.full((2, 5, 2, 64), np.nan, np.float32)
    nowhere = Pages(cache.pages.kv[:0], cache.pages.table)
    host.run(launches.norm_rope_append(qkv, cache.norms, 1e-5, cache.rotary, cache.rows, nowhere, again, away))
    assert np.array_equal(again, query)
    for r, end in enumerate(cache.ends):
        keys, values = reference.unpack_pages(cache.bytes, cache.shape, cache.pages.table[r], end)
        mine = reference.bf16_to_f64(reference.f32_to_bf16(away[:, cache.rows.request == r]))
        assert np.array_equal(mine, [keys, values])


SHAPES = [(4, 4, 64), (9, 3, 80), (8, 1, 96), (4, 2, 112), (20, 1, 128), (2, 1, 192), (2, 2, 256)]
RAGGED = ([1, 7, 2, 5], [0, 1, 63, 130])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_attention_matches_float64(host: Host, heads: int, kv_heads: int, dim: int) -> None:
    cache = Cache(launches.chain(*RAGGED), heads, kv_heads, dim)
    query = cache.append(host)
    cache.close(cache.attend(host, query), query)


@pytest.mark.parametrize(
    "masks",
    [{"window": 1}, {"window": 70}, {"window": 70, "n_sinks": 4}, {"sink_logits": np.float32([0.5, -3.0, 30.0, 2.0])}],
    ids=["self", "window", "window-and-sinks", "learned-sinks"],
)
@pytest.mark.parametrize("drafts", ["chain", "tree"])
def test_attention_obeys_windows_and_sinks(host: Host, masks: dict[str, Any], drafts: str) -> None:
    tree = [[-1, 0, 0, 1, 2, 2], [-1, 0]]
    rows = launches.tree(tree, [600, 31]) if drafts == "tree" else launches.chain([6, 2], [600, 31])
    cache = Cache(rows, 4, 2, 64)
    query = cache.append(host)
    cache.close(cache.attend(host, query, **masks), query, **masks)


def test_attention_agrees_with_the_cpus_kernel_over_the_same_pages(host: Host) -> None:
    cache = Cache(launches.chain(*RAGGED), 9, 3, 64)
    query = cache.append(host)
    batch = cpu.Batch(cache.rows.row_start, cache.rows.first_position, cache.pages.table)
    out = np.empty((len(query), 9 * 64), np.uint16)
    cpu.Kernels(1).verify_attention(cache.shape, batch, cache.bytes, query.reshape(len(query), -1), out)
    found = reference.bf16_to_f64(cache.attend(host, query)).reshape(len(query), -1)
    close(found, reference.bf16_to_f64(out), 2 * BF16_EPS)


@pytest.mark.parametrize("masks", [{}, {"window": 40, "n_sinks": 2}], ids=["full", "window"])
def test_attentions_row_does_not_know_its_chunk_or_its_neighbours(host: Host, masks: dict[str, Any]) -> None:
    """From 505 to 520, over the edge of a range, at once; and token by token beside another request."""
    together = Cache(launches.chain([15], [505]), 4, 2, 64)
    rows = together.attend(host, together.append(host), **masks)
    for i in (0, 6, 7, 14):
        alone = Cache(launches.chain([1, 3], [505 + i, 50]), 4, 2, 64)
        assert np.array_equal(alone.attend(host, alone.append(host), **masks)[0], rows[i])


def test_a_path_through_a_tree_of_drafts_has_the_bits_of_a_chain(host: Host) -> None:
    """Places 0, 2, 4 form a path; whatever lies between, they are as the chain's first three."""
    tree, chain = Cache(launches.tree([[-1, 0, 0, 1, 2]], [60]), 4, 2, 64), Cache(launches.chain([3], [60]), 4, 2, 64)
    for depth, place in enumerate((0, 2, 4)):
        chain.tokens[0][60 + depth] = tree.tokens[0][60 + place]
    branch = tree.attend(host, tree.append(host))
    assert np.array_equal(branch[[0, 2, 4]], chain.attend(host, chain.append(host)))


class Drafts:
    """Random requests that each drafted some tokens."""

    def __init__(self, counts: list[int], vocab: int, temperature: float, sure: bool, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        m = sum(counts) + len(counts)
        self.vocab, self.temperature = vocab, temperature
        self.row_start = np.concatenate([[0], np.cumsum(np.array(counts) + 1)]).astype(np.int32)
        self.logits = f32(rng, m, vocab) * 2
        self.logits[:, 1::3] = -np.inf  # as filters leave them
        self.draft_logits = None if sure else self.logits + f32(rng, m, vocab)
        best = self.logits.argmax(axis=1).astype(np.int32)
        self.drafted = np.where(rng.random(m) < 0.8, best, (best + 2) % vocab).astype(np.int32)
        self.first = rng.integers(0, 1000, len(counts)).astype(np.int32)
        self.seeds = rng.integers(0, 2**63, len(counts)).astype(np.uint64)

    def run(self, host: Host, **how: Any) -> np.ndarray:
        """(n_requests, 2): accepted, next token."""
        n = len(self.seeds)
        accepted, token = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
        heat = np.full(n, self.temperature)
        arrays = (self.drafted, self.row_start, self.first, self.seeds, heat, accepted, token)
        host.run(launches.verify(self.logits, self.draft_logits, *arrays), **how)
        return np.stack([accepted, token], axis=1)

    def exact(self) -> np.ndarray:
        """As the engine does it on the CPU."""
        found = []
        for r, (first, last) in enumerate(zip(self.row_start, self.row_start[1:], strict=False)):
            logits, drafted = self.logits[first:last], self.drafted[first : last - 1]
            if self.temperature == 0:
                chosen = logits.argmax(axis=1).tolist()
                n = verify.accept(drafted.tolist(), chosen)
                found.append((n, chosen[n]))
                continue
            heated = sampling.Sampling(self.temperature)
            q = None
            if self.draft_logits is not None and len(drafted):
                q = sampling.distribution(self.draft_logits[first : last - 1], heated)
            uniform = sampling.uniforms(int(self.seeds[r]), int(self.first[r]), len(logits))
            found.append(verify.verify_sampled(sampling.distribution(logits, heated), q, drafted, uniform))
        return np.array(found)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("sure", [True, False])
@pytest.mark.parametrize("vocab", [3, 257, 1001])
def test_verification_makes_the_cpu_engines_choices_from_its_draws(
    host: Host, temperature: float, sure: bool, vocab: int
) -> None:
    case = Drafts([0, 1, 4, 7, 2, 3, 5, 6] * 4, vocab, temperature, sure)
    assert np.array_equal(case.run(host), case.exact())


def test_a_rejected_token_that_leaves_nothing_is_replaced_by_one_of_the_targets(host: Host) -> None:
    case = Drafts([1] * 30, 40, 1.0, False)
    case.draft_logits = case.logits  # nothing of the target's is left when the draft's is taken away
    case.drafted[:] = 1  # which neither would choose
    assert np.array_equal(case.run(host), case.exact())
    assert len(set(case.exact()[:, 1])) > 5


@pytest.mark.parametrize("sure", [True, False])
def test_what_verification_emits_is_distributed_as_the_target(host: Host, sure: bool) -> None:
    """1500 requests with one drafted token: the first token emitted, against the target's probabilities."""
    rng, n, vocab = np.random.default_rng(1), 1500, 6
    case = Drafts([1] * n, vocab, 1.0, sure)
    target, draft = f32(rng, vocab), f32(rng, vocab)
    case.logits = np.tile(target, (2 * n, 1))
    case.draft_logits = None if sure else np.tile(draft, (2 * n, 1))
    case.drafted[:] = 2 if sure else rng.choice(vocab, 2 * n, p=sampling.softmax(draft))
    accepted, token = case.run(host).T
    emitted = np.where(accepted > 0, case.drafted[::2], token)
    expected = sampling.softmax(target) * n
    assert stats.chisquare(np.bincount(emitted, minlength=vocab), expected).pvalue > 0.001


def test_draws_are_the_cpu_engines(host: Host) -> None:
    """Which shows where a draw decides between two equally likely tokens."""
    case = Drafts([0] * 40, 2, 1.0, True)
    case.logits[:] = 0
    draws = [sampling.uniforms(int(s), int(p), 1)[0] for s, p in zip(case.seeds, case.first, strict=True)]
    assert np.array_equal(case.run(host)[:, 1], np.array(draws)[:, sampling.Purpose.CHOOSE] >= 0.5)


def test_probes_do_what_they_are_timed_for(host: Host) -> None:
    source, target = np.arange(4000, dtype=np.uint32), np.zeros(4000, np.uint32)
    host.run(launches.Launch("copy", (3, 1, 1), (64, 1, 1), 0, (source, target, np.int64(1000))))
    assert np.array_equal(source, target)
    out, flag = np.zeros(1, np.float32), np.zeros(1, np.int32)
    host.run(launches.Launch("fma_peak", (1, 1, 1), (32, 1, 1), 0, (out, np.float32(0.999), np.int32(4))))
    host.run(launches.Launch("block_stream", (1, 1, 1), (1, 1, 1), 0, (flag, np.uint64(50))))
    assert not out.any()


# ---- barriers -----------------------------------------------------------------------------------------------------------------


def _experts(host: Host, how: dict[str, Any]) -> np.ndarray:
    case = Experts(11, hidden=256)
    tiles = (TILES[0], TILES[-1])
    return np.stack([case.run(host, case.index, case.x, t, **{"wgmma": False} | how) for t in tiles])


def _experts_on_hopper(host: Host, how: dict[str, Any]) -> np.ndarray:
    return _experts(host, {"wgmma": True} | how)


def _lists(host: Host, how: dict[str, Any]) -> np.ndarray:
    index = np.random.default_rng(0).integers(0, 3, 1100).astype(np.int32)
    start, memory = np.full(4, -1, np.int32), np.full(1 << 16, -1, np.int32)
    slots = memory[1 << 15 :][:1100]  # where a barrier is left out, a list may begin anywhere
    host.run(launches.token_lists(index, start, slots), **how)
    return np.concatenate([start, slots])


def _verify(host: Host, how: dict[str, Any]) -> np.ndarray:
    cases = [Drafts([5] * 8, 900, heat, sure, seed) for heat in (0.0, 0.7) for sure in (True, False) for seed in (1, 2)]
    return np.stack([case.run(host, **how) for case in cases])


SYNCHRONISED: dict[str, Callable[[Host, dict[str, Any]], np.ndarray]] = {
    "grouped": _experts,
    "grouped with wgmma": _experts_on_hopper,
    "router": _lists,
    "verify": _verify,
}
BARRIERS = [
    (name, number)
    for name in ("grouped", "router", "append", "attention", "verify", "probes", "grouped with wgmma")
    for number, line in enumerate((FOLDER / f"{name.split()[0]}.cu").read_text().splitlines(), 1)
    if "__syncthreads()" in line
]


@pytest.mark.parametrize("name", SYNCHRONISED)
def test_no_result_depends_on_the_order_of_threads(host: Host, name: str) -> None:
    forwards, *others = (SYNCHRONISED[name](host, {"order": order}) for order in ORDERS)
    for other in others:
        assert np.array_equal(forwards, other)


@pytest.mark.parametrize("site", range(len(BARRIERS)), ids=[f"{name}-{line}" for name, line in BARRIERS])
def test_every_barrier_is_needed_and_missed(host: Host, site: int) -> None:
    """A barrier left out changes the result under some order of the threads."""
    run = SYNCHRONISED[BARRIERS[site][0]]
    right = run(host, {})
    assert any(not np.array_equal(run(host, {"order": order, "skip_barrier": site}), right) for order in ORDERS)


@pytest.mark.parametrize(
    ("wgmma", "what"), [(False, 1), (True, 1), (True, 2)], ids=["copies", "its-copies", "products"]
)
def test_copies_and_products_are_waited_for(host: Host, wgmma: bool, what: int) -> None:
    right, hasty = (_experts(host, {"wgmma": wgmma, "skip_waits": waits}) for waits in (0, what))
    for of_tile, in_haste in zip(right, hasty, strict=True):
        assert not np.array_equal(of_tile, in_haste)
