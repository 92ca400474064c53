"""Verification attention in every KV format against float64, and bit for bit against itself."""

import os
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.kernels import cpu, reference

ISAS = ("amxbf16", "avx512bf16", "avx2", "scalar")
# Of a number kept in a format; of int8, to the largest of its row.
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 0.0, "int8": 0.5001 / 127}
EXAMPLES = int(os.environ.get("SPECMOEOFF_EXAMPLES", "15"))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in cpu.supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    return str(request.param)


@pytest.fixture(params=cpu.KV_FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Found(NamedTuple):
    out: np.ndarray  # (rows, heads * value_dim)
    log_sums: np.ndarray


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def queries(rng: np.random.Generator, shape: cpu.KVShape, n: int) -> np.ndarray:
    query = floats(rng, n, shape.n_heads * shape.key_dim) * np.float32(2 * shape.key_dim**-0.5)
    return reference.f32_to_bf16(query) if shape.format == "bf16" else query


def widened(x: np.ndarray) -> np.ndarray:
    return reference.bf16_to_f64(x) if x.dtype == np.uint16 else x.astype(np.float64)


def new_pages(shape: cpu.KVShape, n_pages: int) -> np.ndarray:
    """Full of NaN: whatever was never written must not matter."""
    return np.full((n_pages, shape.page_bytes), 255, np.uint8)


def batch_of(counts: list[int], firsts: list[int], table: np.ndarray, tree: np.ndarray | None = None) -> cpu.Batch:
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return cpu.Batch(starts, np.array(firsts, np.int32), table.astype(np.int32), tree)


def attended(
    kernels: cpu.Kernels,
    shape: cpu.KVShape,
    batch: cpu.Batch,
    pages: np.ndarray,
    query: np.ndarray,
    sinks: np.ndarray | None = None,
) -> Found:
    out = np.empty((len(query), shape.n_heads * shape.value_dim), np.float32)
    log_sums = np.empty((len(query), shape.n_heads), np.float32)
    kernels.verify_attention(shape, batch, pages, query, out, sinks, log_sums)
    return Found(out, log_sums)


def close(
    found: Found,
    shape: cpu.KVShape,
    table: np.ndarray,
    pages: np.ndarray,
    query: np.ndarray,
    first: int,
    sinks: np.ndarray | None = None,
    tree: np.ndarray | None = None,
) -> None:
    """One request's rows and float64's over what its pages hold."""
    n = len(query)
    keys, values = reference.unpack_pages(pages, shape, table, first + n)
    plain = widened(query).reshape(n, shape.n_heads, -1)
    exact, log_sums = reference.attention(plain, keys, values, first, shape.window, sinks, tree)
    eps = 2.0**-8 if shape.format == "bf16" else 1e-5  # probabilities are bf16 or fp32
    assert np.abs(found.out - exact.reshape(n, -1)).max() <= eps * np.abs(values).max()
    assert np.abs(found.log_sums - log_sums).max() <= (1e-3 if shape.format == "bf16" else 1e-5) * (
        1 + np.abs(log_sums).max()
    )


COUNTS, FIRSTS = [1, 7, 127, 128, 129, 1, 3], [0, 0, 0, 0, 0, 128, 254]


@pytest.mark.parametrize("window", [0, 1, 100])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_any_counts_and_contexts_match_float64(isa: str, format: str, window: int, with_sinks: bool) -> None:
    rng = np.random.default_rng(window)
    shape = cpu.KVShape(6, 2, 32, 32, format, window)
    kernels, pages = cpu.Kernels(2, isa), new_pages(shape, 3 * len(COUNTS))
    table = rng.permutation(3 * len(COUNTS)).reshape(-1, 3)
    sinks = floats(rng, 6) + 2 if with_sinks else None
    old = [i for i, first in enumerate(FIRSTS) if first]
    for counts, firsts, its in (
        ([FIRSTS[i] for i in old], [0] * len(old), table[old]),
        (COUNTS, FIRSTS, table),
    ):
        n = sum(counts)
        kernels.append_kv(shape, batch_of(counts, firsts, its), pages, floats(rng, n, 64), floats(rng, n, 64))
    query, first = queries(rng, shape, sum(COUNTS)), 0
    found = attended(kernels, shape, batch_of(COUNTS, FIRSTS, table), pages, query, sinks)
    for i, n in enumerate(COUNTS):
        rows = slice(first, first + n)
        mine = Found(found.out[rows], found.log_sums[rows])
        close(mine, shape, table[i], pages, query[rows], FIRSTS[i], sinks)
        first += n


DIMS = [(64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 192), (256, 256), (192, 128), (576, 512)]


@pytest.mark.parametrize(("key_dim", "value_dim"), DIMS)
def test_any_dimensions_match_float64(isa: str, format: str, key_dim: int, value_dim: int) -> None:
    rng = np.random.default_rng(key_dim)
    shape = cpu.KVShape(4, 1 if key_dim == 576 else 2, key_dim, value_dim, format)
    kernels, pages, table = cpu.Kernels(2, isa), new_pages(shape, 3), np.array([[2, 0]])
    heads = shape.n_kv_heads
    keys, values = floats(rng, 135, heads * key_dim), floats(rng, 135, heads * value_dim)
    kernels.append_kv(shape, batch_of([135], [0], table), pages, keys, values)
    for found, kept in zip(reference.unpack_pages(pages, shape, table[0], 135), (keys, values), strict=True):
        exact = kept.reshape(found.shape)
        size = np.abs(exact).max(axis=2, keepdims=True) if format == "int8" else np.abs(exact)
        assert (np.abs(found - exact) <= ROUNDING[format] * size + 2.0**-25).all()  # fp16 has no smaller ones
    query = queries(rng, shape, 5)
    batch = batch_of([5], [130], table)
    found = attended(kernels, shape, batch, pages, query)
    close(found, shape, table[0], pages, query, 130)
    out = np.empty(found.out.shape, np.uint16)
    kernels.verify_attention(shape, batch, pages, query, out)
    assert np.array_equal(out, reference.f32_to_bf16(found.out))


@pytest.mark.parametrize("first", [0, 5, 126, 4090])
def test_trees_match_float64(isa: str, format: str, first: int) -> None:
    """Random trees of 13 and 64 tokens, and with a window."""
    rng = np.random.default_rng(first)
    for n, window in ((13, 0), (64, 0), (13, 9)):
        shape = cpu.KVShape(2, 1, 16, 16, format, window)
        n_pages = -(-(first + n) // cpu.PAGE_TOKENS)
        kernels, pages, table = cpu.Kernels(2, isa), new_pages(shape, n_pages), rng.permutation(n_pages)[None]
        kv = floats(rng, 2, first + n, 16)
        kernels.append_kv(shape, batch_of([first + n], [0], table), pages, *kv)
        tree = np.zeros(n, np.uint64)
        for token in range(n):
            parent = int(rng.integers(-1, token)) if token else -1
            tree[token] = np.uint64(1 << token) | (tree[parent] if parent >= 0 else np.uint64(0))
        query = queries(rng, shape, n)
        found = attended(kernels, shape, batch_of([n], [first], table, tree), pages, query)
        close(found, shape, table[0], pages, query, first, tree=tree)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "n"), [(4, 2, 64, 3), (3, 1, 16, 17), (2, 2, 128, 1)])
def test_ranges_of_a_long_context_are_merged_to_what_float64_finds(
    isa: str, format: str, heads: int, kv_heads: int, dim: int, n: int
) -> None:
    """Requests that end just before, at, just after a range's end, and in the third range."""
    rng, ends = np.random.default_rng(heads), [4095, 4096, 4097, 4100, 8200]
    shape = cpu.KVShape(heads, kv_heads, dim, dim, format)
    pages, table = filled(rng, shape, 40), np.array([rng.permutation(40)[np.arange(65) % 40] for _ in ends])
    for i, end in enumerate(ends):  # a page may not serve twice at once, so over copies of the 40
        copies = np.concatenate([pages, pages])
        its = np.where(np.arange(65) < 40, table[i], table[i] + 40)
        query = queries(rng, shape, n)
        found = attended(cpu.Kernels(2, isa), shape, batch_of([n], [end - n], its[None]), copies, query)
        close(found, shape, its, copies, query, end - n)


def filled(rng: np.random.Generator, shape: cpu.KVShape, n_pages: int) -> np.ndarray:
    """Pages whose every token was appended."""
    pages, n = new_pages(shape, n_pages), n_pages * cpu.PAGE_TOKENS
    keys = floats(rng, n, shape.n_kv_heads * shape.key_dim)
    values = floats(rng, n, shape.n_kv_heads * shape.value_dim)
    cpu.Kernels(2).append_kv(shape, batch_of([n], [0], np.arange(n_pages)[None]), pages, keys, values)
    return pages


SHAPES = [(4, 2, 32, 32), (3, 3, 16, 48), (8, 1, 48, 16)]


@pytest.mark.parametrize("window", [0, 70])
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    format=st.sampled_from(cpu.KV_FORMATS),
    n=st.integers(1, 30),
    end=st.integers(4060, 4200),
    others=st.integers(0, 9),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_rows_do_not_know_how_the_work_is_split(
    window: int, format: str, n: int, end: int, others: int, threads: int, seed: int
) -> None:
    """Alone or in a batch, in a chunk or by itself, as a chain of a tree, with any number of threads, around a range's end."""
    rng = np.random.default_rng(seed)
    shape = cpu.KVShape(*SHAPES[seed % 3], format, window)
    width = -(-4288 // cpu.PAGE_TOKENS)
    pages = np.resize(filled(rng, shape, width), ((others + 1) * width, shape.page_bytes))
    table = rng.permutation(len(pages)).reshape(-1, width)
    query, sinks = queries(rng, shape, (others + 1) * n), floats(rng, shape.n_heads)
    firsts = [end - n, *(int(e) - n for e in rng.integers(n, 4288, others))]
    batch, row = batch_of([n] * (others + 1), firsts, table), int(rng.integers(n))
    chain = np.array([(2 << i) - 1 for i in range(n)], np.uint64)
    for isa in cpu.supported_isas():
        one, many = cpu.Kernels(1, isa), cpu.Kernels(threads, isa)
        together = attended(many, shape, batch, pages, query, sinks)
        alone = attended(
            one, shape, batch_of([1], [end - n + row], table[:1]), pages, query[row : row + 1].copy(), sinks
        )
        tree = attended(one, shape, batch_of([n], [end - n], table[:1], chain), pages, query[:n].copy(), sinks)
        for its, mine, in_tree in zip(together, alone, tree, strict=True):
            assert np.array_equal(its[row], mine[0])
            assert np.array_equal(its[:n], in_tree)


def test_appending_in_pieces_is_appending_at_once(isa: str, format: str) -> None:
    rng = np.random.default_rng(0)
    shape, table = cpu.KVShape(4, 2, 32, 48, format), np.array([[1, 0], [2, 3]])
    keys, values = floats(rng, 200, 64), floats(rng, 200, 96)
    once, pieces = new_pages(shape, 4), new_pages(shape, 4)
    cpu.Kernels(2, isa).append_kv(shape, batch_of([200], [0], table[:1]), once, keys, values)
    done = 0
    for n in (1, 3, 123, 2, 71):
        rows = slice(done, done + n)
        both = [np.concatenate([x[rows], floats(rng, 2, x.shape[1])]) for x in (keys, values)]
        cpu.Kernels(3, isa).append_kv(shape, batch_of([n, 2], [done, 0], table), pieces, *both)
        done += n
    assert np.array_equal(once[:2], pieces[:2])


def test_a_tree_is_refused_where_it_is_wrong() -> None:
    table = np.zeros((1, 1))
    with pytest.raises(ValueError, match="tree: a row must see itself"):
        batch_of([2], [0], table, np.array([1, 1], np.uint64))
    with pytest.raises(ValueError, match="tree: a request has 65 new tokens, at most 64 can be masked"):
        batch_of([65], [0], table, np.full(65, 2**64 - 1, np.uint64))
