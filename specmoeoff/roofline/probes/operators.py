"""Seconds of the runtime's operators at a model's shape, over the sizes a window can have."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from specmoeoff.kernels.cpu import (
    PAGE_TOKENS,
    Batch,
    Kernels,
    LayerShape,
    LayerWeights,
    aligned_empty,
    packed_expert_bytes,
    packed_linear_bytes,
)
from specmoeoff.roofline.fits import leave_one_out_error
from specmoeoff.roofline.probes.disk import Reader
from specmoeoff.roofline.timing import measurement, seconds_of
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import Measurement, OperatorTable

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
TOKENS = (1, 2, 3, 5, 9, 13, 17)
CONTEXTS = (64, 256, 1024)
REQUESTS = 16
N_LAYERS = 12  # enough dense weights and experts that they come from memory, as in a real pass
COLD_BYTES = 200 << 20


class Bench:
    """Random weights of a model's shape, and one call per operator and size."""

    def __init__(self, spec: ModelSpec, n_threads: int) -> None:
        self.spec, self.n_threads = spec, n_threads
        self.kernels = Kernels(n_threads)
        self._rng = np.random.default_rng(0)
        n_expert = packed_expert_bytes(spec.hidden, spec.intermediate)
        self.experts = [self._weights(n_expert) for _ in range(max(4, min(40, COLD_BYTES // n_expert)))]
        self._turn = 0
        shape = LayerShape(
            hidden=spec.hidden,
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            intermediate=spec.intermediate,
            n_experts=spec.n_experts,
            n_active=spec.n_active,
            rms_eps=spec.rms_eps,
        )
        angles = np.zeros((max(CONTEXTS) + 512, spec.head_dim // 2), np.float32)
        ones = np.ones(spec.hidden, np.float32)
        width = spec.n_heads * spec.head_dim
        self.layers = [
            LayerWeights(
                shape,
                ones,
                self._weights(packed_linear_bytes(shape.qkv_width, spec.hidden)),
                self._weights(packed_linear_bytes(spec.hidden, width)),
                ones,
                self._weights(packed_linear_bytes(spec.n_experts, spec.hidden)) if spec.n_experts > 1 else None,
                angles + 1,
                angles,
            )
            for _ in range(N_LAYERS)
        ]
        self.head_weight = self._weights(packed_linear_bytes(spec.vocab, spec.hidden))
        pages = REQUESTS * (max(CONTEXTS) // PAGE_TOKENS + 1) + 1
        heads, dim = spec.n_kv_heads, spec.head_dim
        n_kv = pages * heads * dim * PAGE_TOKENS * 2
        self.k_pages = [
            self._weights(n_kv).view(np.uint16).reshape(pages, heads, dim // 2, PAGE_TOKENS, 2) for _ in range(2)
        ]
        self.v_pages = [
            self._weights(n_kv).view(np.uint16).reshape(pages, heads, PAGE_TOKENS // 2, dim, 2) for _ in range(2)
        ]
        self.table = (1 + np.arange(pages - 1, dtype=np.int32)).reshape(REQUESTS, -1)

    def _weights(self, n_bytes: int) -> np.ndarray:
        """bf16 of ordinary size; one block repeated, since only their being ordinary matters to time."""
        buffer = aligned_empty(n_bytes)
        block = (self._rng.standard_normal(1 << 16).astype(np.float32) * 0.05).view(np.uint32) >> 16
        values = buffer[: n_bytes // 2 * 2].view(np.uint16)
        values[:] = np.resize(block.astype(np.uint16), len(values))
        return buffer

    def _next(self, things: Sequence[np.ndarray]) -> np.ndarray:
        self._turn += 1
        return things[self._turn % len(things)]

    def expert(self, rows: int) -> Callable[[], None]:
        """One cold expert."""
        spec = self.spec
        normed = self._weights(rows * spec.hidden * 2).view(np.uint16).reshape(rows, spec.hidden)
        out, slots = np.zeros((rows, spec.hidden), np.float32), np.arange(rows, dtype=np.int32)

        def work() -> None:
            self.kernels.experts(normed, [self._next(self.experts)], [slots], out, spec.intermediate)

        return work

    def combine(self, rows: int) -> Callable[[], None]:
        """Weighted sum of expert outputs."""
        spec = self.spec
        x = np.zeros((rows, spec.hidden), np.float32)
        out = np.zeros((rows * spec.n_active, spec.hidden), np.float32)
        weight = np.full((rows, spec.n_active), 0.5, np.float32)
        return lambda: self.kernels.combine(x, out, weight)

    def head(self, rows: int) -> Callable[[], None]:
        """Final norm, output projection, argmax."""
        spec = self.spec
        x, norm = np.ones((rows, spec.hidden), np.float32), np.ones(spec.hidden, np.float32)
        out = np.zeros(rows, np.int32)
        return lambda: self.kernels.head_argmax(x, norm, spec.rms_eps, self.head_weight, spec.vocab, out)

    def attention_block(self, counts: Sequence[int], context: int) -> Callable[[], None]:
        """One layer for requests with counts[i] new tokens after `context` old ones."""
        spec, rows = self.spec, sum(counts)
        row_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        batch = Batch(
            row_start, np.full(len(counts), context, np.int32), np.ascontiguousarray(self.table[: len(counts)])
        )
        x = self._rng.standard_normal((rows, spec.hidden)).astype(np.float32)
        normed = np.zeros((rows, spec.hidden), np.uint16)
        index = np.zeros((rows, spec.n_active), np.int32)
        weight = np.zeros((rows, spec.n_active), np.float32)

        def work() -> None:
            self._turn += 1
            layer, pages = self.layers[self._turn % N_LAYERS], self._turn % 2
            # The residual stream grows call by call otherwise.
            np.clip(x, -4, 4, out=x)
            self.kernels.attention_block(
                layer, batch, x, self.k_pages[pages], self.v_pages[pages], normed, index, weight
            )

        return work


def spread(rows: int) -> list[int]:
    n = min(rows, REQUESTS)
    return [rows // n + (i < rows % n) for i in range(n)]


def measure_operators(spec: ModelSpec, n_threads: int, budget_s: float, rounds: int = 7) -> list[OperatorTable]:
    """The tables of one model and thread count. Points take turns, so that a change of speed hits all alike."""
    bench = Bench(spec, n_threads)
    works: dict[tuple[str, int, int], Callable[[], None]] = {}
    for rows in ROWS:
        works["expert", rows, 0] = bench.expert(rows)
        works["combine", rows, 0] = bench.combine(rows)
        works["head", rows, 0] = bench.head(rows)
        works["attention_block", rows, 0] = bench.attention_block(spread(rows), 0)
    for tokens in TOKENS:
        for context in (0, *CONTEXTS):
            works["attention", tokens, context] = bench.attention_block([tokens] * REQUESTS, max(0, context - tokens))
    samples: dict[tuple[str, int, int], list[float]] = {key: [] for key in works}
    for work in works.values():
        work()
    end = time.perf_counter() + budget_s
    n_rounds = 0
    while n_rounds < 3 or (n_rounds < rounds and time.perf_counter() < end):
        for key, work in works.items():
            # Short calls several times: a timer reading costs a good part of a microsecond.
            repeats = 1 if samples[key] and samples[key][0] > 5e-4 else 3
            samples[key].append(min(seconds_of(work) for _ in range(repeats)) if repeats > 1 else seconds_of(work))
        n_rounds += 1
    return _tables(bench, samples, n_rounds)


def _tables(bench: Bench, samples: dict[tuple[str, int, int], list[float]], n_rounds: int) -> list[OperatorTable]:
    spec = bench.spec
    dense = spec.attention_params
    facts = {
        "expert": lambda n: (2.0 * spec.expert_params * n, float(spec.expert_bytes)),
        "combine": lambda n: (2.0 * n * spec.n_active * spec.hidden, 4.0 * n * spec.hidden * (spec.n_active + 2)),
        "head": lambda n: (2.0 * spec.vocab * spec.hidden * n, 2.0 * spec.vocab * spec.hidden),
        "attention_block": lambda n: (2.0 * dense * n, 2.0 * dense),
    }
    tables = []

    def table(
        operator: str,
        axes: tuple[str, ...],
        grid: tuple[tuple[float, ...], ...],
        rows: list[np.ndarray],
        work: list[tuple[float, float]],
    ) -> None:
        tables.append(
            OperatorTable(
                operator=operator,
                shape=spec.shape_key,
                n_threads=bench.n_threads,
                isa=bench.kernels.isa,
                axes=axes,
                grid=grid,
                seconds=tuple(float(np.median(r)) for r in rows),
                p10_s=tuple(float(np.percentile(r, 10)) for r in rows),
                p95_s=tuple(float(np.percentile(r, 95)) for r in rows),
                flops=tuple(w[0] for w in work),
                bytes=tuple(w[1] for w in work),
                n_samples=n_rounds,
                loo_error=leave_one_out_error(grid[0], [float(np.median(r)) for r in rows]) if len(grid) == 1 else None,
            )
        )

    for operator, fact in facts.items():
        rows = [np.asarray(samples[operator, n, 0]) for n in ROWS]
        table(operator, ("rows",), (tuple(map(float, ROWS)),), rows, [fact(n) for n in ROWS])
    rows, work = [], []
    for n in TOKENS:
        base = np.asarray(samples["attention", n, 0])
        for context in CONTEXTS:
            # The cost beyond a context of almost nothing, which attention_block already holds.
            rows.append(np.maximum(np.asarray(samples["attention", n, context]) - base, 0.0) / REQUESTS)
            kv = 4.0 * spec.n_kv_heads * spec.head_dim * context
            work.append((4.0 * n * context * spec.n_heads * spec.head_dim, kv))
    grid = (tuple(map(float, TOKENS)), tuple(map(float, CONTEXTS)))
    table("attention", ("tokens", "context"), grid, rows, work)
    return tables


def slowdown_beside_disk(spec: ModelSpec, n_threads: int, path: Path, n_readers: int, chunk_bytes: int) -> Measurement:
    """How much longer an expert takes while the disk is read at full speed; turns of a tenth of a second."""
    bench = Bench(spec, n_threads)
    work = bench.expert(16)
    reader = Reader(path, n_readers, chunk_bytes)

    def burst() -> float:
        return float(np.median([seconds_of(work) for _ in range(150)]))

    work()
    ratios = []
    for _ in range(7):
        alone = burst()
        stop = threading.Event()
        thread = threading.Thread(target=reader.read, args=(5.0, stop))
        thread.start()
        time.sleep(0.02)
        beside = burst()
        stop.set()
        thread.join()
        ratios.append(max(1.0, beside / alone))
    return measurement(ratios, "ratio")
