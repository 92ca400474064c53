"""Seconds of the runtime's operators at a model's shape, over the sizes a window can have.

Operators are timed inside a pass, one after another as the runtime calls them: what an operator costs depends on what the
caches hold when it begins, and on whether the other threads still wait for it or have gone to sleep. Layers that are all in
memory run in one call, without sleep: `layers.*`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from specmoeoff.estimate.memory import expert_activation, layer_arrays, layer_shape
from specmoeoff.estimate.tables import GROUP, layer_operators
from specmoeoff.kernels.cpu import (
    ACTIVATION,
    HALVES,
    PAGE_TOKENS,
    Batch,
    ExpertTable,
    Kernels,
    LayerShape,
    LayerStack,
    LayerWeights,
    aligned_empty,
    packed_expert_bytes,
    packed_linear_bytes,
)
from specmoeoff.roofline.fits import leave_one_out_error, never_falling
from specmoeoff.roofline.timing import measurement, seconds_of
from specmoeoff.specs.model import BF16_BYTES, ModelSpec
from specmoeoff.specs.profile import OperatorTable, Slowdown

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
TOKENS = (1, 2, 3, 5, 9, 13, 17, 25)
CONTEXTS = (64, 256, 1024, 4096)
REQUESTS, REQUESTS_OF_LONG_CONTEXT = 16, 4
COLD_BYTES = 200 << 20  # weights are rotated through at least this much, so that they come from memory
OF_EXPERTS = ("expert", "experts", "layers.experts")
GAP_S = 50e-6  # what the runtime's Python takes between two kernels: long enough for idle threads to fall asleep
PASS_S, PASSES_OF_BUDGET, COLD_LAYERS = 0.025, 200, 2  # a budget too small for so many shortens each
ROUNDS_OF_ALL = 3
MOST_BATCHES = 16
# Beside other lanes: where memory is the limit, and where arithmetic is.
ROWS_BESIDE, TOKENS_BESIDE = (16, 128), 5
BESIDE_S, MOST_BESIDE = 1.0, 3
SETTLE_S = 0.02
# How long the compute lane waits for the disk: the longer, the slower its cores are to come back.
WAITS_S, AWAKE_REPEATS = (0.0005, 0.002, 0.006, 0.02), 3

Key = tuple[str, float, int]
Seconds = list[float]
Traffic = Callable[[], AbstractContextManager[None]]


class Bench:
    """Random weights of a model's layers, one of each kind many times over, and one call per operator and size."""

    def __init__(self, spec: ModelSpec, n_threads: int) -> None:
        self.spec, self.n_threads = spec, n_threads
        self.kernels = Kernels(n_threads, precision=spec.precision)
        self._rng = np.random.default_rng(0)
        n_expert = packed_expert_bytes(spec.hidden, spec.intermediate, spec.packed_format)
        self.n_layers = n_layers = max(2, min(40, COLD_BYTES // n_expert))
        self.contexts = tuple(c for c in CONTEXTS if c + max(TOKENS) <= spec.max_positions) or (64,)
        self.experts = [self._weights(n_expert) for _ in range(n_layers)]
        self._bias = np.ones(2 * spec.intermediate + spec.hidden, np.float32) if spec.expert_bias else None
        # The last layer of each operator: one with experts, where there is any.
        self.layer_of = {name: layer for layer in range(spec.n_layers) for name in layer_operators(spec, layer)}
        self.blocks = [name for name in self.layer_of if name.endswith("block")]
        self.attentions = [name for name in self.layer_of if name.endswith("attention")]
        self._layers = {n: [self._layer(n) for _ in range(n_layers)] for n in {*self.layer_of.values()}}
        self._head_weight = self._weights(packed_linear_bytes(spec.vocab, spec.hidden, spec.precision))
        page_bytes = layer_shape(spec).kv.page_bytes
        most = max(_n_requests(c) * (c // PAGE_TOKENS + 2) for c in self.contexts)
        of_dense = n_layers * REQUESTS * (ROWS[-1] // REQUESTS // PAGE_TOKENS + 1)
        self._n_pages = max(most, of_dense, COLD_BYTES // page_bytes)
        self._pages = self._weights(self._n_pages * page_bytes).reshape(self._n_pages, page_bytes)
        self._turn = 0

    def _weights(self, n_bytes: int) -> np.ndarray:
        """Numbers of ordinary size; one block repeated, since only their being ordinary matters to time."""
        buffer = aligned_empty(n_bytes)
        block = self._rng.standard_normal(1 << 16).astype(np.float32) * 0.05
        if self.spec.precision == "bf16":
            block = (block.view(np.uint32) >> 16).astype(np.uint16)
        values = buffer[: n_bytes // block.itemsize * block.itemsize].view(block.dtype)
        values[:] = np.resize(block, len(values))
        return buffer

    def _layer(self, layer: int) -> LayerWeights:
        """Everything of this layer of the model but its experts."""
        spec, shape = self.spec, layer_shape(self.spec, layer)
        angles = np.zeros((max(*self.contexts, ROWS[-1]) + ROWS[-1], shape.rotary_dim // 2), np.float32)
        arrays: dict[str, Any] = {
            name: self._weights(packed_linear_bytes(*shape.matrices[name], spec.precision))
            if name in shape.matrices
            else np.ones(shape.vectors[name], np.float32)
            for name in layer_arrays(spec, layer)
        }
        if "router" in arrays:  # every row takes the same experts: their rows are then known
            arrays["choice_bias"] = np.where(np.arange(spec.n_experts) < spec.n_active, 1e6, 0).astype(np.float32)
        return LayerWeights(shape, **{"router": None} | arrays, cosines=angles + 1, sines=angles)

    def _batches(self, counts: Sequence[int], context: int) -> list[Batch]:
        """Of requests with counts[i] new tokens after `context` old ones, some batches on pages of their own."""
        pages = (context + max(counts)) // PAGE_TOKENS + 1
        row_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        contexts, each = np.full(len(counts), context, np.int32), len(counts) * pages
        tables = np.arange(self._n_pages // each * each, dtype=np.int32).reshape(-1, len(counts), pages)
        return [Batch(row_start, contexts, table) for table in tables[:MOST_BATCHES]]

    def _rows(self, counts: Sequence[int]) -> tuple[np.ndarray, ...]:
        """x, normed, expert_index, expert_weight of a pass."""
        spec, n = self.spec, sum(counts)
        return (
            self._rng.standard_normal((n, spec.hidden)).astype(np.float32),
            np.zeros((n, spec.hidden), ACTIVATION[spec.precision]),
            np.zeros((n, spec.n_active), np.int32),
            np.zeros((n, spec.n_active), np.float32),
        )

    def expert(self, rows: int, group: int = 1) -> Callable[[], None]:
        """`group` experts of `rows` rows each in one call."""
        spec, n = self.spec, rows * group
        activation = np.dtype(ACTIVATION[spec.precision])
        normed = self._weights(n * spec.hidden * activation.itemsize).view(activation).reshape(n, spec.hidden)
        out = np.zeros((n, spec.hidden), np.float32)
        slots = np.array_split(np.arange(n, dtype=np.int32), group)
        biases = None if self._bias is None else [self._bias] * group
        swiglu = expert_activation(spec)

        def work() -> None:
            self._turn += group
            chosen = [self.experts[(self._turn + i) % len(self.experts)] for i in range(group)]
            self.kernels.experts(normed, chosen, slots, out, spec.intermediate, spec.packed_format, biases, swiglu)

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
        return lambda: self.kernels.head_argmax(x, norm, spec.rms_eps, self._head_weight, spec.vocab, out)

    def attention_block(
        self, counts: Sequence[int], context: int = 0, operator: str = "attention_block"
    ) -> Callable[[], None]:
        """One layer that has this operator, for requests with counts[i] new tokens after `context` old ones."""
        x, *outputs = self._rows(counts)
        layers = self._layers[self.layer_of[operator]]
        batches = self._batches(counts, context)  # made before: the runtime makes one for all layers of a window

        def work() -> None:
            self._turn += 1
            if self._turn % len(batches) == 0:  # the residual stream grows call by call otherwise
                np.clip(x, -4, 4, out=x)
            layer, batch = layers[self._turn % len(layers)], batches[self._turn % len(batches)]
            self.kernels.attention_block(layer, batch, x, self._pages, *outputs)

        return work

    def run(self, operator: str, counts: Sequence[int], context: int = 0) -> Callable[[float], tuple[Seconds, Seconds]]:
        """Runs that take about so many seconds, in one call, of layers that have this block, requests as in attention_block:
        seconds of every layer's block, and of each of its experts."""
        shape, each = self._layers[self.layer_of[operator]][0].shape, (context + max(counts)) // PAGE_TOKENS + 1
        most = max(1, min(self.n_layers, self._n_pages // (len(counts) * each)))
        has_experts = self.spec.n_experts_of(self.layer_of[operator]) > 0
        tables = [self._table(i, shape) if has_experts else None for i in range(most)]
        stack = LayerStack(self._layers[self.layer_of[operator]][:most], tables)
        n_pages = self._n_pages // most
        pages = self._pages[: most * n_pages].reshape(most, n_pages, -1)
        table = np.arange(len(counts) * each, dtype=np.int32).reshape(-1, each)
        row_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        batch = Batch(row_start, np.full(len(counts), context, np.int32), table)
        x, *outputs = self._rows(counts)
        n_slots = len(x) * shape.n_active
        outputs += [np.zeros((n_slots, shape.hidden), np.float32), np.zeros(n_slots, np.int32)]

        def seconds_of_layers(n: int) -> np.ndarray:
            np.clip(x, -4, 4, out=x)
            first = self._turn % (most - n + 1)
            self._turn += n
            _, clock = self.kernels.layers(stack.part(first, first + n), [batch], x, pages[first : first + n], *outputs)
            return clock[..., 1] - clock[..., 0]

        def work(seconds: float) -> tuple[Seconds, Seconds]:
            blocks, experts = seconds_of_layers(min(most, 1 + int(seconds / a_layer_s))).T.tolist()
            return blocks[COLD_LAYERS:] or blocks, [s / shape.n_active for s in experts[COLD_LAYERS:] or experts]

        a_layer_s = max(1e-6, float(seconds_of_layers(1).sum()))
        return work

    def _table(self, layer: int, shape: LayerShape) -> ExpertTable:
        """Experts that follow those of the layer before."""
        packed = [self.experts[(layer * shape.n_active + i) % len(self.experts)] for i in range(shape.n_active)]
        packed += packed[:1] * (shape.n_experts - len(packed))
        biases = None if self._bias is None else [self._bias] * shape.n_experts
        return ExpertTable(shape, packed, self.spec.packed_format, biases, expert_activation(self.spec))

    def over_context(self, operator: str, tokens: int, context: int) -> Callable[[], float]:
        """Measures what a context adds to one request's `tokens` new tokens in one layer, in the call the runtime makes."""
        counts = [tokens] * _n_requests(context)
        if self.spec.n_experts == 1:
            long_run, short_run = (self.run("attention_block", counts, c) for c in (context, 0))

            def pair() -> tuple[float, float]:
                return float(np.median(long_run(PASS_S)[0])), float(np.median(short_run(PASS_S)[0]))

            repeats = 1
        else:
            long, short = (self.attention_block(counts, c, operator) for c in (context, 0))

            def pair() -> tuple[float, float]:
                return after_a_gap(long), after_a_gap(short)

            repeats = 3

        def measure() -> float:
            beyond, within = np.median([pair() for _ in range(repeats)], axis=0)
            return max(0.0, float(beyond - within)) / len(counts)

        return measure

    def wake(self, wait_s: float) -> float:
        """What an operator on few rows takes longer after the process has slept for this long."""

        def after_sleep() -> float:
            time.sleep(wait_s)
            return seconds_of(work)

        work = self.expert(ROWS_BESIDE[0])
        return max(0.0, float(np.median([after_sleep() - after_a_gap(work) for _ in range(AWAKE_REPEATS)])))


def spread(rows: int) -> list[int]:
    """`rows` tokens over at most REQUESTS requests."""
    n = min(rows, REQUESTS)
    return [rows // n + (i < rows % n) for i in range(n)]


def _n_requests(context: int) -> int:
    return REQUESTS if context <= 1024 else REQUESTS_OF_LONG_CONTEXT


def after_a_gap(work: Callable[[], None]) -> float:
    """Seconds of one call after GAP_S of one thread's Python."""
    end = time.perf_counter() + GAP_S
    while time.perf_counter() < end:
        pass
    return seconds_of(work)


class Pass:
    """One size's operators in the runtime's order, over as many layers as a moment allows: call by call, as where experts come
    from disk, and in runs of layers that are all in memory."""

    def __init__(self, bench: Bench, rows: int) -> None:
        self._calls = {
            **{name: bench.attention_block(spread(rows), operator=name) for name in bench.blocks},
            "expert": bench.expert(rows),
            "experts": bench.expert(rows, GROUP),
            "combine": bench.combine(rows),
        }
        self._runs = {name: bench.run(name, spread(rows)) for name in bench.blocks}
        self._head, self._n_layers, self._is_dense = bench.head(rows), bench.n_layers, bench.spec.n_experts == 1

    def layers(self, seconds: float) -> dict[str, Seconds]:
        """Samples by operator of one layer after the other; `experts` for one expert of the group. Not of the first layers,
        which find others' numbers in the caches, where there are more."""
        samples: dict[str, Seconds] = {name: [] for name in self._calls}
        end = time.perf_counter() + seconds
        while not samples["combine"] or (time.perf_counter() < end and len(samples["combine"]) < self._n_layers):
            for name, work in self._calls.items():
                samples[name].append(after_a_gap(work) / (GROUP if name == "experts" else 1))
        return {name: found[COLD_LAYERS:] or found for name, found in samples.items()}

    def run(self, seconds: float = PASS_S) -> dict[str, Seconds]:
        """Layers both ways, those in runs as `layers.*`, and what comes after them; `dense_layer` for one of a dense model."""
        samples = {**self.layers(seconds), **self.runs(seconds)}
        if self._is_dense:
            each = zip(samples["layers.attention_block"], samples["layers.experts"], strict=True)
            samples["dense_layer"] = [sum(parts) for parts in each]
        samples["head"] = [after_a_gap(self._head)]
        return samples

    def runs(self, seconds: float) -> dict[str, Seconds]:
        """Samples of layers that are all in memory, as `layers.*`; `layers.experts` for one expert."""
        samples: dict[str, Seconds] = {}
        for name, run in self._runs.items():
            samples[f"layers.{name}"], experts = run(seconds)
            if name == "attention_block":
                samples["layers.experts"] = experts
        return samples


class Rounds:
    """Samples of one model and thread count, alone and beside each of `lanes`, in rounds of about PASS_S for each size."""

    def __init__(self, spec: ModelSpec, n_threads: int, pass_s: float, lanes: Mapping[str, Traffic]) -> None:
        self._bench = bench = Bench(spec, n_threads)
        self._passes = {rows: Pass(bench, rows) for rows in ROWS}
        self._over_context: dict[Key, Callable[[], float]] = {
            (name, t, c): bench.over_context(name, t, c)
            for name in bench.attentions
            for t in TOKENS
            for c in bench.contexts
        }
        self._samples: dict[Key, list[float]] = {}
        self._ratios: dict[tuple[str, str, float], list[float]] = {}
        self._pass_s, self._lanes = pass_s, lanes
        # What is measured beside other lanes, and at which size.
        self._few: list[tuple[float, Callable[[], dict[str, Seconds]]]]
        self._few = [(float(rows), partial(self._passes[rows].run, pass_s)) for rows in ROWS_BESIDE]
        longest = {name: self._over_context[name, TOKENS_BESIDE, bench.contexts[-1]] for name in bench.attentions}
        self._few.append((float(TOKENS_BESIDE), lambda: {name: [measure()] for name, measure in longest.items()}))
        for one in self._passes.values():
            one.layers(0.0)
        self._spent_s = dict.fromkeys(ROWS, 0.0)

    def round(self, all_sizes: bool, end: float) -> None:
        """Every size once, or those only that have taken less time than most; beside other lanes until `end` at the latest."""
        samples = self._samples
        for rows, one in self._passes.items():
            if not all_sizes and len(ROWS) * self._spent_s[rows] > sum(self._spent_s.values()):
                continue
            began = time.perf_counter()
            for name, found in one.run(self._pass_s).items():
                samples.setdefault((name, rows, 0), []).append(float(np.median(found)))
            self._spent_s[rows] += time.perf_counter() - began
        for key, measure in self._over_context.items():
            samples.setdefault(key, []).append(measure())
        for wait_s in WAITS_S:
            samples.setdefault(("wake", wait_s, 0), []).append(self._bench.wake(wait_s))
        for lane, traffic in self._lanes.items():
            # Less often than an operator alone is measured, and a ratio of two.
            began, n_times = time.perf_counter(), 0
            while n_times < 1 or (time.perf_counter() < min(end, began + BESIDE_S) and n_times < MOST_BESIDE):
                for (name, size), ratio in _slowdowns(self._few, traffic).items():
                    self._ratios.setdefault((name, lane, size), []).append(ratio)
                n_times += 1

    def tables(self) -> list[OperatorTable]:
        """Medians of all samples so far."""
        return _tables(self._bench, self._samples, self._ratios)


def measure_operators(
    specs: Sequence[ModelSpec],
    n_threads: int,
    budget_s: float,
    rounds: int,
    between: Callable[[], None] = lambda: None,
    lanes: Mapping[str, Traffic] = MappingProxyType({}),
) -> list[OperatorTable]:
    """The tables of some models at one thread count, alone and beside each of `lanes`.

    Models and sizes take turns, so that a change of speed hits all alike. A size of long samples takes part in the first rounds
    only: they hold many bursts of a busy machine, short ones one or none. `between` is called after every round.
    """
    pass_s = min(PASS_S, max(0.0, budget_s) / (PASSES_OF_BUDGET * len(specs)))
    every = [Rounds(spec, n_threads, pass_s, lanes) for spec in specs]
    end, n_rounds = time.perf_counter() + budget_s, 0
    n_full = ROUNDS_OF_ALL if pass_s == PASS_S else 1
    while n_rounds < n_full or (n_rounds < rounds and time.perf_counter() < end):
        for one in every:
            one.round(n_rounds < ROUNDS_OF_ALL, end)
        between()
        n_rounds += 1
    return [table for one in every for table in one.tables()]


def _slowdowns(
    runs: Sequence[tuple[float, Callable[[], dict[str, list[float]]]]], traffic: Traffic
) -> dict[tuple[str, float], float]:
    """By operator and size, the seconds beside the traffic over those alone, before and after."""
    before = [run() for _, run in runs]
    with traffic():
        time.sleep(SETTLE_S)
        beside = [run() for _, run in runs]
    ratios = {}
    for (size, run), old, new in zip(runs, before, beside, strict=True):
        again = run()
        for name, found in new.items():
            alone = np.median([*old[name], *again[name]])
            ratios[name, size] = float(np.median(found) / alone) if alone else 1.0  # a short context can cost nothing
    return ratios


def _tables(
    bench: Bench, samples: dict[Key, list[float]], ratios: dict[tuple[str, str, float], list[float]]
) -> list[OperatorTable]:
    spec, blocks = bench.spec, {name: _block_params(bench.spec, bench.layer_of[name]) for name in bench.blocks}
    # What every row of an operator is multiplied with.
    params = {**blocks, **{f"layers.{name}": n for name, n in blocks.items()}}
    params |= {**dict.fromkeys(OF_EXPERTS, spec.expert_params), "head": spec.vocab * spec.hidden}
    if spec.n_experts == 1:
        params["dense_layer"] = blocks["attention_block"] + spec.expert_params
    rows_alone = [*params, "combine"]
    weight_bytes = {name: BF16_BYTES * HALVES[spec.precision] * n for name, n in params.items()}
    weight_bytes |= dict.fromkeys(OF_EXPERTS, bench.experts[0].nbytes)

    def work_of(operator: str, n: float, context: int) -> tuple[float, float]:
        """FLOPs and bytes."""
        if operator in params:
            return 2.0 * params[operator] * n, float(weight_bytes[operator])
        if operator == "combine":
            return 2.0 * n * spec.n_active * spec.hidden, 4.0 * n * spec.hidden * (spec.n_active + 2)
        if operator in bench.attentions:
            return _attention_work(spec, bench.layer_of[operator], n, context)
        return 0.0, 0.0

    tables: list[OperatorTable] = []

    def table(operator: str, axes: tuple[str, ...], grid: tuple[tuple[float, ...], ...], keys: list[Key]) -> None:
        found = [np.asarray(samples[key]) for key in keys]
        medians = tuple(float(np.median(f)) for f in found)
        work = [work_of(*key) for key in keys]
        tables.append(
            OperatorTable(
                operator=operator,
                shape=spec.shape_key,
                n_threads=bench.n_threads,
                isa=bench.kernels.isa,
                axes=axes,
                grid=grid,
                seconds=never_falling(medians) if axes == ("rows",) else medians,
                p10_s=tuple(float(np.percentile(f, 10)) for f in found),
                p95_s=tuple(float(np.percentile(f, 95)) for f in found),
                flops=tuple(w[0] for w in work),
                bytes=tuple(w[1] for w in work),
                n_samples=min(map(len, found)),  # of the size that has fewest
                loo_error=leave_one_out_error(grid[0], medians) if axes == ("rows",) else None,
                beside=tuple(
                    Slowdown(lane=lane, size=size, ratio=measurement(found, "ratio"))  # type: ignore[arg-type]
                    for (name, lane, size), found in ratios.items()
                    if name == operator
                ),
            )
        )

    for operator in rows_alone:
        table(operator, ("rows",), (tuple(map(float, ROWS)),), [(operator, n, 0) for n in ROWS])
    grid = (tuple(map(float, TOKENS)), tuple(map(float, bench.contexts)))
    # The cost beyond a context of nothing, which the block already holds.
    for operator in bench.attentions:
        table(operator, ("tokens", "context"), grid, [(operator, n, c) for n in TOKENS for c in bench.contexts])
    table("wake", ("wait_s",), (WAITS_S,), [("wake", wait_s, 0) for wait_s in WAITS_S])
    return tables


def _block_params(spec: ModelSpec, layer: int) -> int:
    """Of a layer's matrices but its experts'."""
    matrices = layer_shape(spec, layer).matrices
    return sum(math.prod(matrices[name]) for name in layer_arrays(spec, layer) if name in matrices)


def _attention_work(spec: ModelSpec, layer: int, tokens: float, context: int) -> tuple[float, float]:
    """FLOPs and bytes of one request and layer."""
    shape = layer_shape(spec, layer)
    seen, width = min(context, shape.window or context), shape.head_dim + shape.v_head_dim
    n_bytes = BF16_BYTES * HALVES[spec.precision] * shape.n_kv_heads * width * seen
    return 2.0 * tokens * seen * shape.n_heads * width, float(n_bytes)
