"""Prices of a window's nodes on a machine with a GPU, for arrays of configurations, and what follows from them.

Every operator takes the larger of FLOPs over peak and bytes over bandwidth, and a start (SpecMoEOff, Table 1, with two FLOPs
a multiply-add). A layer stands for the mean of all: a first dense block, shared experts and sliding layers are spread.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from specmoeoff.estimate.gpu_choices import Choices, Problem
from specmoeoff.estimate.gpu_memory import FP32_BYTES
from specmoeoff.estimate.lanes import Prices, steady_window_s
from specmoeoff.estimate.rates import COPY_START_S, CPU_START_S, GPU_START_S, Rates
from specmoeoff.pipeline import GpuWindow, gpu_window_graph
from specmoeoff.specs.model import BF16_BYTES, ModelSpec

Array = np.ndarray


def visible_tokens(spec: ModelSpec, context: Array) -> Array:
    """Tokens a query meets, on the mean over layers."""
    sliding = spec.n_sliding_layers / spec.n_layers
    return (1 - sliding) * context + sliding * np.minimum(context, spec.sliding_window)


@dataclass(frozen=True)
class GpuEstimator:
    """A problem on a machine. context_tokens replaces the problem's where given, one for each choice."""

    problem: Problem
    rates: Rates

    def window_s(self, choices: Choices, context_tokens: Array | None = None) -> Array:
        """Seconds of a steady window of each choice."""
        prices = self.prices(choices, context_tokens)
        out = np.empty(len(choices))
        for shape, index in self._by_shape(choices):
            here = {kind: seconds[index] for kind, seconds in prices.items()}
            out[index] = steady_window_s(shape, self.problem.spec.n_layers, here)
        return self.rates.hand_over * out

    def period_s(self, choice: Choices, seconds: Mapping[str, float]) -> float:
        """Of one choice's steady windows whose nodes take so long by kind and start at once."""
        ((shape, _),) = self._by_shape(choice)
        prices = {kind: np.array([s]) for kind, s in seconds.items()}
        return float(steady_window_s(shape, self.problem.spec.n_layers, prices)[0])

    def _by_shape(self, choices: Choices) -> list[tuple[GpuWindow, Array]]:
        """The graphs' shapes, each with the choices that have it."""
        steps = self.problem.of_draft(choices, "steps")
        key = np.zeros(len(choices), dtype=int)
        parts = (choices.micro_batches, steps, (steps > 0) & (choices.draft_kv_share < 1), choices.on_host > 0)
        for part in (*parts, choices.on_demand):
            key = key * (1 + int(np.max(part))) + part
        order = np.argsort(key, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(key[order])) + 1)
        shapes = [[part[index[0]] for part in (*parts, choices.on_demand)] for index in groups]
        return [
            (GpuWindow(int(m), int(s), *map(bool, rest)), g) for (m, s, *rest), g in zip(shapes, groups, strict=True)
        ]

    def tokens_per_s(self, choices: Choices, context_tokens: Array | None = None) -> Array:
        """Decode throughput."""
        tokens = choices.batch * self.problem.of_draft(choices, "tokens_per_round")
        return tokens / self.window_s(choices, context_tokens)

    def breakdown(self, choices: Choices) -> tuple[dict[str, float], dict[str, float]]:
        """Of the first choice: seconds a window by lane, and by node kind, in all layers."""
        one = choices.take(np.array([0]))
        prices, ((shape, _),) = self.prices(one), self._by_shape(one)
        lanes: defaultdict[str, float] = defaultdict(float)
        kinds: defaultdict[str, float] = defaultdict(float)
        for node in gpu_window_graph(shape, self.problem.spec.n_layers, 2).nodes:
            if node.window == 1:
                lanes[node.lane] += float(prices[node.kind][0])
                kinds[node.kind] += float(prices[node.kind][0])
        return dict(lanes), {kind: s for kind, s in kinds.items() if s > 0}

    def used(self, n_requests: Array, n_tokens: Array, first: Array, last: Array) -> Array:
        """Experts of a layer, the first-th to the last-th most popular, that so many tokens are expected to touch."""
        popularity = self.problem.popularity
        n = n_requests * n_tokens**self.problem.union_exponent
        if np.ptp(popularity) < 1e-12:
            return (last - first) * (1 - (1 - popularity[0]) ** n)
        each, index = np.unique(n, return_inverse=True)
        touched = np.cumsum(1 - (1 - popularity) ** each[:, None], axis=1)
        touched = np.concatenate([np.zeros((len(each), 1)), touched], axis=1)
        return touched[index, last] - touched[index, first]

    def loaded(self, choices: Choices) -> Array:
        """Experts of a layer that cross the link in a window."""
        n_tokens = self.problem.of_draft(choices, "length") + 1.0
        last = self.problem.spec.n_experts - choices.on_host
        used = self.used(choices.batch, n_tokens, choices.resident, last)
        return np.where(choices.on_demand, used, last - choices.resident)

    def prices(self, choices: Choices, context_tokens: Array | None = None) -> Prices:
        """Seconds of each kind of node."""
        spec, rates, c = self.problem.spec, self.rates, choices
        context = np.full(len(c), self.problem.context_tokens) if context_tokens is None else context_tokens
        n_tokens = self.problem.of_draft(c, "length") + 1.0
        requests = c.batch / c.micro_batches
        rows, visible = requests * n_tokens, visible_tokens(spec, context)
        queries, output = spec.attention_widths
        kv_bytes, far = requests * visible * spec.kv_width * BF16_BYTES, 1 - c.kv_share
        attention_flops = 2 * rows * visible * (queries + output)
        expert_layers = spec.n_expert_layers / spec.n_layers
        shared = np.concatenate([[0.0], np.cumsum(self.problem.popularity)])  # tokens' choices by the most popular
        first, last = c.resident, spec.n_experts - c.on_host
        everything = np.full(len(c), spec.n_experts)

        def experts(lo: Array, hi: Array) -> tuple[Array, Array]:
            used = self.used(requests, n_tokens, lo, hi)
            return (2 * rows * (shared[hi] - shared[lo]) * spec.expert_params, used * spec.expert_bytes)

        on_host, on_host_bytes = experts(last, everything)
        host_s = np.maximum(on_host / rates.cpu_gemm_flops, on_host_bytes / rates.dram_bytes_beside_link)
        host_rows_bytes = rows * spec.hidden * BF16_BYTES * np.minimum(1.0, shared[-1] - shared[last])
        has_host = c.on_host > 0
        pieces = np.where(c.on_demand, 1, c.micro_batches)
        load_bytes = self.loaded(c) * spec.expert_bytes / pieces
        after_params = spec.output_params + spec.router_params + spec.ffn_params / spec.n_layers
        prices = {
            "pre_attention": self._gpu(2 * rows * spec.qkv_params, spec.qkv_params * BF16_BYTES),
            "gpu_attention": (c.kv_share > 0) * self._gpu(c.kv_share * attention_flops, c.kv_share * kv_bytes),
            "offload": self._copy(far * rows * (queries * BF16_BYTES + spec.kv_width * FP32_BYTES), rates.d2h_bytes),
            "attention": self._cpu_attention(far * attention_flops, far * kv_bytes),
            "onload": self._copy(far * rows * output * BF16_BYTES, rates.h2d_bytes),
            "post_attention": self._gpu(2 * rows * after_params, after_params * BF16_BYTES),
            "resident_experts": (first > 0) * expert_layers * self._gpu(*experts(np.zeros_like(first), first)),
            "experts": (last > first) * expert_layers * self._gpu(*experts(first, last)),
            "load": expert_layers * self._copy(load_bytes, rates.h2d_bytes),
            "host_experts": has_host * expert_layers * (CPU_START_S.value + host_s),
            "rows_offload": has_host * expert_layers * self._copy(host_rows_bytes, rates.d2h_bytes),
            "rows_onload": has_host * expert_layers * self._copy(host_rows_bytes, rates.h2d_bytes),
            "head": self._gpu(2 * c.batch * n_tokens * spec.vocab * spec.hidden, spec.vocab * spec.hidden * BF16_BYTES),
            "verify": np.full(len(c), GPU_START_S.value),
            **self._draft_prices(c, context),
        }
        for kind, scale in rates.scales.items():
            prices[kind] = prices[kind] * np.interp(n_tokens, scale.n_tokens, scale.factor)
        return prices

    def _draft_prices(self, c: Choices, context: Array) -> Prices:
        """Of one step. The first also reads the tokens accepted in the window before: its rows are spread over all."""
        head, rates = self.problem.head, self.rates
        if head is None:
            return {}
        steps = np.maximum(self.problem.of_draft(c, "steps"), 1)
        rows = c.batch * (self.problem.of_draft(c, "tokens_per_round") + steps - 1) / steps
        near, far = c.draft_kv_share, 1 - c.draft_kv_share
        kv_bytes = c.batch * context * head.kv_width * BF16_BYTES
        queries, output = head.attention_widths
        attention_flops = 2 * rows * context * (queries + output)
        before = head.qkv_params + head.other_layer_params
        after = head.output_params + head.expert_params
        logits = head.vocab * head.hidden / head.n_layers
        near_flops = near * (2 * rows * (before + after + logits) + attention_flops)
        near_bytes = (before + after + logits) * BF16_BYTES + near * kv_bytes
        n = head.n_layers
        return {
            "draft": n * (near > 0) * self._gpu(near_flops, near_bytes),
            "draft_pre": n * self._gpu(far * 2 * rows * before, before * BF16_BYTES),
            "draft_offload": n * self._copy(far * rows * (queries + head.kv_width) * BF16_BYTES, rates.d2h_bytes),
            "draft_attention": n * self._cpu_attention(far * attention_flops, far * kv_bytes),
            "draft_onload": n * self._copy(far * rows * output * BF16_BYTES, rates.h2d_bytes),
            "draft_post": n * self._gpu(far * 2 * rows * (after + logits), (after + logits) * BF16_BYTES),
        }

    def _gpu(self, flops: Array, n_bytes: Array | float) -> Array:
        return GPU_START_S.value + np.maximum(flops / self.rates.gpu_flops, n_bytes / self.rates.gpu_bytes)

    def _cpu_attention(self, flops: Array, n_bytes: Array) -> Array:
        seconds = np.maximum(flops / self.rates.cpu_attention_flops, n_bytes / self.rates.dram_bytes_beside_link)
        return (n_bytes > 0) * CPU_START_S.value + seconds

    def _copy(self, n_bytes: Array, rate: float) -> Array:
        return (n_bytes > 0) * COPY_START_S.value + n_bytes / rate
