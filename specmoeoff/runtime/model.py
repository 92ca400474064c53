"""A decoder's dense weights, KV cache and workspace, and its forward pass in the pieces the graph is made of."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from specmoeoff.estimate.memory import expert_activation, layer_arrays, layer_shape
from specmoeoff.kernels.cpu import (
    ACTIVATION,
    ExpertTable,
    Kernels,
    LayerStack,
    LayerWeights,
    aligned_empty,
)
from specmoeoff.runtime.kv_cache import KVCache
from specmoeoff.runtime.rope import rope_tables
from specmoeoff.runtime.rows import Rows
from specmoeoff.specs.model import ModelSpec


class Workspace:
    """The activations of one pass of up to `max_rows` tokens."""

    def __init__(self, spec: ModelSpec, max_rows: int) -> None:
        self.max_rows = max_rows
        self.x = array_of((max_rows, spec.hidden), np.float32)
        self.normed = array_of((max_rows, spec.hidden), ACTIVATION[spec.precision])
        self.expert_index = array_of((max_rows, spec.n_active), np.int32)
        self.expert_weight = array_of((max_rows, spec.n_active), np.float32)
        self.expert_out = array_of((max_rows * spec.n_active, spec.hidden), np.float32)
        self.slots = array_of((max_rows * spec.n_active,), np.int32)


def array_of(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros in memory of its own."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return aligned_empty(n_bytes).view(dtype).reshape(shape)


class Weights(Protocol):
    """What a model is made of, such as a PackedModel."""

    @property
    def spec(self) -> ModelSpec:
        """Its shape."""

    def load_dense(self) -> dict[str, np.ndarray]:
        """All weights but the experts', by name; a norm may be left out."""


class Model:
    """Everything of a model but its experts."""

    def __init__(self, packed: Weights, kernels: Kernels, n_pages: int, n_positions: int, max_rows: int) -> None:
        spec = self.spec = packed.spec
        self._kernels = kernels
        self.kv = KVCache(spec, n_pages)
        self.work = Workspace(spec, max_rows)
        dense = packed.load_dense()
        self.embedding, self.head, self._norm = dense["embedding"], dense["lm_head"], dense.get("norm")
        cos, sin = rope_tables(spec, n_positions)
        prefixes = [f"layers.{i}." for i in range(spec.n_layers)]
        self._expert_biases = [dense[prefix + "expert_biases"] for prefix in prefixes if spec.expert_bias]
        self._layers = []
        for layer, prefix in enumerate(prefixes):
            arrays: dict[str, Any] = {name: dense.get(prefix + name) for name in layer_arrays(spec, layer)}
            arrays.setdefault("router", None)
            self._layers.append(LayerWeights(layer_shape(spec, layer), **arrays, cosines=cos, sines=sin))

    def begin(self, tokens: np.ndarray) -> None:
        """Embed tokens (M,) into the residual stream."""
        rows = self.embedding[tokens]
        self.work.x[: len(tokens)] = (
            rows if rows.dtype == np.float32 else (rows.astype(np.uint32) << 16).view(np.float32)
        )

    def attention(self, layer: int, rows: Rows) -> None:
        """Attention block of some rows, up to and including the router."""
        part = slice(rows.first, rows.last)
        work = self.work
        self._kernels.attention_block(
            self._layers[layer],
            rows.batch,
            work.x[part],
            self.kv.pages[layer],
            work.normed[part],
            work.expert_index[part],
            work.expert_weight[part],
        )

    def stack(self, packed: Sequence[Mapping[int, np.ndarray]]) -> LayerStack:
        """All layers, packed[layer][expert] being in memory."""
        tables = [
            self._table(layer, experts) if self.spec.n_experts_of(layer) else None
            for layer, experts in enumerate(packed)
        ]
        return LayerStack(self._layers, tables)

    def _table(self, layer: int, packed: Mapping[int, np.ndarray]) -> ExpertTable:
        return ExpertTable(
            self._layers[layer].shape,
            [packed.get(expert) for expert in range(self.spec.n_experts)],
            self.spec.packed_format,
            [*self._expert_biases[layer]] if self._expert_biases else None,
            expert_activation(self.spec),
        )

    def layers(self, stack: LayerStack, parts: Sequence[Rows], first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Layers that begin with the `first`, all their experts in memory, over rows that begin with row 0; returns what
        `Kernels.layers` does."""
        n, work = parts[-1].last, self.work
        batches, pages = [rows.batch for rows in parts], self.kv.pages[first : first + len(stack.layers)]
        return self._kernels.layers(
            stack, batches, work.x[:n], pages, work.normed[:n], *self._routes(n), *self._outputs(n)
        )

    def feed_forward(self, table: ExpertTable, n_rows: int) -> dict[int, np.ndarray]:
        """The experts in memory, and `combine` if that is all that rows chose. Returns which (row, rank) slots chose each
        expert, ascending: {expert: int32 array}, valid until the next pass."""
        work = self.work
        used, start = self._kernels.feed_forward(
            table, work.normed[:n_rows], *self._routes(n_rows), work.x[:n_rows], *self._outputs(n_rows)
        )
        return {e: work.slots[start[i] : start[i + 1]] for i, e in enumerate(used)}

    def _routes(self, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        return self.work.expert_index[:n_rows], self.work.expert_weight[:n_rows]

    def _outputs(self, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
        n_slots = n_rows * self.spec.n_active
        return self.work.expert_out[:n_slots], self.work.slots[:n_slots]

    def experts(
        self, layer: int, n_rows: int, packed: Mapping[int, np.ndarray], slots: Mapping[int, np.ndarray]
    ) -> None:
        """Compute the experts packed[e] for their (row, rank) slots[e]."""
        biases = self._expert_biases[layer] if self._expert_biases else None
        self._kernels.experts(
            self.work.normed[:n_rows],
            list(packed.values()),
            [slots[expert] for expert in packed],
            self.work.expert_out[: n_rows * self.spec.n_active],
            self.spec.intermediate,
            self.spec.packed_format,
            biases=None if biases is None else [biases[expert] for expert in packed],
            swiglu=expert_activation(self.spec),
        )

    def combine(self, n_rows: int) -> None:
        """Add the weighted expert outputs to the residual stream."""
        work = self.work
        self._kernels.combine(
            work.x[:n_rows], work.expert_out[: n_rows * self.spec.n_active], work.expert_weight[:n_rows]
        )

    def features(self, n_rows: int) -> np.ndarray:
        """What the head sees of the pass's rows, (n_rows, hidden) bf16; valid until the next pass."""
        normed = self.work.normed[:n_rows]
        self._kernels.rmsnorm(self.work.x[:n_rows], self._norm, self.spec.rms_eps, normed)
        return normed

    def choose(self, rows: np.ndarray, logits: np.ndarray | None = None) -> np.ndarray:
        """The most likely next token after each of `rows` (n,), int32; logits (n, vocab) float32 if wanted."""
        chosen = np.empty(len(rows), np.int32)
        states = np.ascontiguousarray(self.work.x[rows])
        spec = self.spec
        self._kernels.head_argmax(states, self._norm, spec.rms_eps, self.head, spec.vocab, chosen, logits)
        return chosen
