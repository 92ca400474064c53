"""A decoder's dense weights, KV cache and workspace, and its forward pass in the pieces the graph is made of."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from specmoeoff.estimate.memory import expert_activation, layer_arrays, layer_shape
from specmoeoff.kernels.cpu import (
    ACTIVATION,
    DenseStack,
    Kernels,
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

    def routing(self, n_rows: int) -> dict[int, np.ndarray]:
        """Which (row, rank) slots chose each expert, ascending: {expert: int32 array}."""
        chosen = self.work.expert_index[:n_rows].reshape(-1)
        order = np.argsort(chosen, kind="stable").astype(np.int32)
        counts = np.bincount(chosen, minlength=self.spec.n_experts)
        ends = np.cumsum(counts)
        return {int(e): order[ends[e] - counts[e] : ends[e]] for e in np.flatnonzero(counts)}

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

    def stack(self, packed: Sequence[np.ndarray]) -> DenseStack:
        """This dense model's layers with their feed-forwards, for `dense_pass`."""
        return DenseStack(self._layers, packed)

    def dense_pass(self, stack: DenseStack, rows: Rows) -> None:
        """All layers over rows that begin with row 0."""
        n, work = rows.last, self.work
        arrays = (work.normed[:n], work.expert_index[:n], work.expert_weight[:n], work.expert_out[:n])
        self._kernels.dense_pass(stack, rows.batch, work.x[:n], self.kv.pages, *arrays)

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
