"""A model's memory on a machine with a GPU, and what each kind of node of the graph does to it.

The residual stream and all activations stay on the GPU; what the CPU's attention and experts need goes through pinned memory. A node
works on the rows of its micro-batch; what only one node after another of the `gpu` lane uses is there once for all of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from specmoeoff.kernels.cpu import Kernels, KVShape, aligned_empty
from specmoeoff.kernels.cuda import launches
from specmoeoff.kernels.cuda.launches import Array, Pages
from specmoeoff.pipeline import Node
from specmoeoff.runtime.gpu.device import Device, Stream
from specmoeoff.runtime.gpu.eagle import Entry
from specmoeoff.runtime.gpu.head import HEAD_ROWS, Head
from specmoeoff.runtime.gpu.inputs import Half, Part
from specmoeoff.runtime.gpu.lanes import Work
from specmoeoff.runtime.gpu.weights import GpuWeights
from specmoeoff.runtime.rope import rope_tables

U16, I32, F32 = np.uint16, np.int32, np.float32
MATRICES, NORMS = ("qkv", "o", "router"), ("input_norm", "post_norm", "q_norm", "k_norm")


class LayerExperts(NamedTuple):
    """Where a layer's experts are. Streamed ones lie in host memory, pinned; tables hold every expert's address, or 0; which buffer a
    layer's go to differs from window to window where layers are odd in number."""

    streamed: tuple[int, ...]
    source: np.ndarray
    resident_table: Array
    streamed_tables: tuple[Array, ...]
    on_host: dict[int, np.ndarray]
    elsewhere: Array | None
    has_resident: bool


class Sizes(NamedTuple):
    """What memory is made for. `buffers`: layers whose streamed experts are in GPU memory at once."""

    max_rows: int
    part_rows: int
    n_near_pages: int
    n_far_pages: int
    n_positions: int
    parts: int
    buffers: int


class GpuModel:
    """Everything of a model, placed. resident[layer] and on_host[layer] are experts' numbers; the others are streamed. `target`: of
    an EAGLE head, which shares its embedding and output matrix."""

    def __init__(
        self,
        weights: GpuWeights,
        device: Device,
        n_threads: int,
        sizes: Sizes,
        resident: Sequence[Sequence[int]],
        on_host: Sequence[Sequence[int]],
        target: "GpuModel | None" = None,
    ) -> None:
        spec = self.spec = weights.spec
        self.device, self.sizes = device, sizes
        self._kernels = Kernels(n_threads)
        heads, dim, kv_heads, rows = spec.n_heads, spec.head_dim, spec.n_kv_heads, sizes.max_rows
        self._kv_shape = KVShape(heads, kv_heads, dim, dim)
        self._rotary = tuple(self.upload(np.ascontiguousarray(t)) for t in rope_tables(spec, sizes.n_positions))
        self.embedding: Array = target.embedding if target else self.upload(weights.dense("embedding"))
        norms = NORMS if spec.qk_norm == "head" else NORMS[:2]
        names = [f"layers.{layer}." for layer in range(spec.n_layers)]
        self._norms = [{n: self.upload(weights.dense(name + n)) for n in norms} for name in names]
        self._matrices = [{n: self.addressed(weights.dense(name + n)) for n in MATRICES} for name in names]

        empty, pinned = device.empty, device.pinned
        page = launches.pages_shape(sizes.n_near_pages + 1, kv_heads, dim)
        self._near_kv = [empty(page, U16) for _ in names] if sizes.n_near_pages else []
        far_bytes = (sizes.n_far_pages + 1) * self._kv_shape.page_bytes
        self._no_pages = empty(launches.pages_shape(0, kv_heads, dim), U16)
        self.far_kv = [aligned_empty(far_bytes).reshape(-1, self._kv_shape.page_bytes) for _ in names]

        # for all rows of a window; away from the GPU what goes there
        far, hosted = rows * bool(sizes.n_far_pages), rows * any(map(len, on_host))
        self.x, self.normed = empty((rows, spec.hidden), F32), empty((rows, spec.hidden), U16)
        self._query, self._attended = (empty((rows, heads, dim), U16) for _ in range(2))
        self._away = empty((far * 2 * kv_heads * dim,), F32)
        self.index, self._weight = empty((rows, spec.n_active), I32), empty((rows, spec.n_active), F32)
        self._starts, self._slots = empty((sizes.parts, spec.n_experts + 1), I32), empty((rows * spec.n_active,), I32)
        self._host_sum = empty((hosted, spec.hidden), F32)
        self._query_host, self._attended_host = (pinned((far, heads * dim), U16) for _ in range(2))
        self._away_host = pinned((far * 2 * kv_heads * dim,), F32)
        self._normed_host, self._sum_host = pinned((hosted, spec.hidden), U16), pinned((hosted, spec.hidden), F32)
        self._weight_host = pinned((hosted, spec.n_active), F32)
        self.index_host = pinned((hosted if sizes.buffers > 1 else rows, spec.n_active), I32)
        # for the rows of a micro-batch, one node after another
        rows = sizes.part_rows
        self._qkv, self.projected = empty((rows, heads + 2 * kv_heads, dim), F32), empty((rows, spec.hidden), F32)
        self._router_logits = empty((rows, spec.n_experts), F32)
        self._expert_hidden = empty((rows * spec.n_active, spec.intermediate), U16)
        self._expert_out = empty((rows * spec.n_active, spec.hidden), F32)
        n_partials = launches.partial_floats(rows, heads, dim, sizes.n_positions) if self._near_kv else 0
        self._partials = empty((n_partials,), F32)
        self.ones = self.upload(np.ones((rows, 1), F32))
        counts = np.arange(max(rows, HEAD_ROWS) + 1, dtype=I32)
        self._bounds = self.upload(np.stack([np.zeros_like(counts), counts], axis=1).reshape(-1))
        matrix = target.head.matrix if target else self.addressed(weights.dense("lm_head"))
        self.head: Head = Head(self, weights, matrix)
        self.entry = Entry(self, weights) if target else None
        self._place(weights, resident, on_host)

    # ---- loading ---------------------------------------------------------------------------------------------------------

    def upload(self, values: np.ndarray) -> Array:
        """To the GPU, at once."""
        array = self.device.empty(values.shape, values.dtype.type)
        self.device.put(array, values)
        return array

    def addressed(self, packed: np.ndarray) -> tuple[Array, Array]:
        """A matrix on the GPU and the array of its address that kernels take."""
        array = self.upload(packed)
        return array, self.upload(np.array([self.device.address(array)], np.uint64))

    def _place(self, weights: GpuWeights, resident: Sequence[Sequence[int]], on_host: Sequence[Sequence[int]]) -> None:
        spec, device = self.spec, self.device
        n = 3 * spec.intermediate * spec.hidden
        self.experts: list[LayerExperts] = []
        streamed = [
            tuple(e for e in range(spec.n_experts) if e not in resident[layer] and e not in on_host[layer])
            for layer in range(spec.n_layers)
        ]
        self._buffers = device.empty((self.sizes.buffers, max(map(len, streamed)), n), U16)
        staging = device.pinned((n,), U16)
        self._residents = []
        for layer, away in enumerate(streamed):
            here, there = np.zeros(spec.n_experts, np.uint64), np.zeros((self.sizes.buffers, spec.n_experts), np.uint64)
            source = device.pinned((len(away), n), U16)
            for at, expert in enumerate(away):
                weights.expert(layer, expert, source[at])
                there[:, expert] = [device.address(buffer[at]) for buffer in self._buffers]
            for expert in resident[layer]:
                weights.expert(layer, expert, staging)
                self._residents.append(self.upload(staging))
                here[expert] = device.address(self._residents[-1])
            marks = np.isin(np.arange(spec.n_experts), on_host[layer]).astype(I32)
            self.experts.append(
                LayerExperts(
                    away,
                    source,
                    self.upload(here),
                    tuple(self.upload(table) for table in there),
                    {expert: weights.host_expert(layer, expert) for expert in on_host[layer]},
                    self.upload(marks) if marks.any() else None,
                    bool(resident[layer]),
                )
            )

    def _buffer(self, node: Node) -> int:
        """Layers take turns, through all windows."""
        return (node.window * self.spec.n_layers + node.layer) % self.sizes.buffers

    # ---- nodes -----------------------------------------------------------------------------------------------------------

    def work(self, node: Node, part: Part | None, tokens: Array) -> Work | None:
        """What a node of a layer does; None where there is nothing to do for it. `part`: None where a micro-batch is empty."""
        if node.kind == "load":
            return self._load(node)
        if part is None:
            return None
        make = {
            "pre_attention": lambda: self._pre_attention(node.layer, part, tokens),
            "gpu_attention": lambda: self._gpu_attention(node.layer, part.near),
            "offload": lambda: self._offload(part.far),
            "attention": lambda: self._cpu_attention(node.layer, part.far),
            "onload": lambda: self._onload(part.far),
            "post_attention": lambda: self._post_attention(node.layer, node.part, part),
            "rows_offload": lambda: self._rows_offload(node.layer, part),
            "host_experts": lambda: self._host_experts(node.layer, part),
            "rows_onload": lambda: self._rows_onload(node.layer, part),
            "resident_experts": lambda: self._resident_experts(node.layer, node.part, part),
            "experts": lambda: self._streamed_experts(node, part),
        }
        return make[node.kind]()

    def _load(self, node: Node) -> Work | None:
        """One of as many equal pieces as there are micro-batches."""
        experts = self.experts[node.layer]
        first, last = (len(experts.streamed) * p // self.sizes.parts for p in (node.part, node.part + 1))
        to = self._buffers[self._buffer(node)][first:last]
        return (lambda s: self.device.copy(s, to, experts.source[first:last])) if last > first else None

    def load_used(self, node: Node, chosen: np.ndarray) -> Work | None:
        """Those streamed experts that are among the chosen."""
        experts, buffer = self.experts[node.layer], self._buffers[self._buffer(node)]
        used = [at for at, expert in enumerate(experts.streamed) if expert in chosen]

        def run(stream: Stream) -> None:
            for at in used:
                self.device.copy(stream, buffer[at], experts.source[at])

        return run if used else None

    def _pre_attention(self, layer: int, part: Part, tokens: Array) -> Work:
        launch, norms, mine = self.device.launch, self._norms[layer], slice(part.first, part.last)
        x, normed, qkv = self.x[mine], self.normed[mine], self._qkv[: part.last - part.first]
        head_norms = (norms["q_norm"], norms["k_norm"]) if "q_norm" in norms else None

        def run(stream: Stream) -> None:
            if layer == 0:
                launch(stream, launches.embed(tokens[mine], self.embedding, x))
                if self.entry:
                    self.entry.compute(stream, mine)
            else:
                self.add_host_experts(stream, layer - 1, part)
            launch(stream, launches.rmsnorm(x, norms["input_norm"], self.spec.rms_eps, normed))
            self.linear(stream, normed, self._matrices[layer]["qkv"], qkv.reshape(len(qkv), -1))
            for half in (part.near, part.far):
                if half is None:
                    continue
                of = slice(half.first - part.first, half.last - part.first)
                kv = self._near_kv[layer] if half is part.near else self._no_pages
                away = None if half is part.near else self._away_of(self._away, half)
                arguments = (self.spec.rms_eps, self._rotary, half.rows, Pages(kv, half.table))
                query = self._query[half.first : half.last]
                launch(stream, launches.norm_rope_append(qkv[of], head_norms, *arguments, query, away))

        return run

    def _away_of(self, away: Array, half: Half) -> Array:
        """Keys and values (2, rows, n_kv_heads, dim) of the rows."""
        heads, dim = self.spec.n_kv_heads, self.spec.head_dim
        width = 2 * heads * dim
        return away[half.first * width : half.last * width].reshape(2, half.last - half.first, heads, dim)

    def _gpu_attention(self, layer: int, near: Half | None) -> Work | None:
        if near is None:
            return None
        mine = slice(near.first, near.last)
        made = launches.attention(
            self._query[mine], near.rows, Pages(self._near_kv[layer], near.table), self._partials, self._attended[mine]
        )
        return lambda stream: self._launch_all(stream, made)

    def _offload(self, far: Half | None) -> Work | None:
        if far is None:
            return None
        mine = slice(far.first, far.last)

        def run(stream: Stream) -> None:
            query = self._query[mine].reshape(far.last - far.first, -1)
            self.device.copy(stream, self._query_host[mine], query)
            self.device.copy(stream, self._away_of(self._away_host, far), self._away_of(self._away, far))

        return run

    def _cpu_attention(self, layer: int, far: Half | None) -> Work | None:
        if far is None or far.batch is None:
            return None
        batch, mine = far.batch, slice(far.first, far.last)
        away, query, out = self._away_of(self._away_host, far), self._query_host[mine], self._attended_host[mine]
        keys, values = away.reshape(2, len(query), -1)

        def attend() -> None:
            self._kernels.append_kv(self._kv_shape, batch, self.far_kv[layer], keys, values)
            self._kernels.verify_attention(self._kv_shape, batch, self.far_kv[layer], query, out)

        return lambda stream: self.device.host(stream, attend, [away, query], [out])

    def _onload(self, far: Half | None) -> Work | None:
        if far is None:
            return None
        mine = slice(far.first, far.last)
        to = self._attended[mine].reshape(far.last - far.first, -1)
        return lambda stream: self.device.copy(stream, to, self._attended_host[mine])

    def _post_attention(self, layer: int, number: int, part: Part) -> Work:
        launch, mine, m = self.device.launch, slice(part.first, part.last), part.last - part.first
        x, normed, projected = self.x[mine], self.normed[mine], self.projected[:m]
        logits, index = self._router_logits[:m], self.index[mine]
        matrices, n_experts = self._matrices[layer], self.spec.n_experts

        def run(stream: Stream) -> None:
            self.linear(stream, self._attended[mine].reshape(m, -1), matrices["o"], projected)
            launch(stream, launches.combine(x, projected, self.ones[:m]))
            launch(stream, launches.rmsnorm(x, self._norms[layer]["post_norm"], self.spec.rms_eps, normed))
            self.linear(stream, normed, matrices["router"], logits)
            launch(stream, launches.route(logits, n_experts, index, self._weight[mine], self.spec.renormalise))
            launch(stream, launches.token_lists(index, self._starts[number], self._slots_of(part)))
            if self.sizes.buffers == 1:  # the host will ask which experts to load
                self.device.copy(stream, self.index_host[mine], index)

        return run

    def _slots_of(self, part: Part) -> Array:
        return self._slots[part.first * self.spec.n_active : part.last * self.spec.n_active]

    def _rows_offload(self, layer: int, part: Part) -> Work | None:
        if not self.experts[layer].on_host:
            return None
        mine = slice(part.first, part.last)
        pairs = [(self._normed_host, self.normed), (self._weight_host, self._weight)]
        if self.sizes.buffers > 1:
            pairs.append((self.index_host, self.index))

        def run(stream: Stream) -> None:
            for to, source in pairs:
                self.device.copy(stream, to[mine], source[mine])

        return run

    def _host_experts(self, layer: int, part: Part) -> Work | None:
        """The weighted sum of what the CPU's experts say of each row, in the order of ranks."""
        packed, mine, m = self.experts[layer].on_host, slice(part.first, part.last), part.last - part.first
        if not packed:
            return None
        normed, index, weight = self._normed_host[mine], self.index_host[mine], self._weight_host[mine]
        total = self._sum_host[mine]

        def compute() -> None:
            chosen = index.reshape(-1)
            slots = [np.flatnonzero(chosen == expert).astype(I32) for expert in packed]
            out = np.zeros((m * self.spec.n_active, self.spec.hidden), F32)
            self._kernels.experts(normed, list(packed.values()), slots, out, self.spec.intermediate)
            total[:] = 0
            self._kernels.combine(total, out, np.where(np.isin(index, list(packed)), weight, F32(0)))

        return lambda stream: self.device.host(stream, compute, [normed, index, weight], [total])

    def _rows_onload(self, layer: int, part: Part) -> Work | None:
        mine = slice(part.first, part.last)
        if not self.experts[layer].on_host:
            return None
        return lambda stream: self.device.copy(stream, self._host_sum[mine], self._sum_host[mine])

    def add_host_experts(self, stream: Stream, layer: int, part: Part) -> None:
        """To the residual stream, where a layer has any."""
        if self.experts[layer].on_host:
            mine = slice(part.first, part.last)
            ones = self.ones[: part.last - part.first]
            self.device.launch(stream, launches.combine(self.x[mine], self._host_sum[mine], ones))

    def _resident_experts(self, layer: int, number: int, part: Part) -> Work | None:
        experts = self.experts[layer]
        return self._experts(experts.resident_table, number, part) if experts.has_resident else None

    def _streamed_experts(self, node: Node, part: Part) -> Work:
        experts, mine = self.experts[node.layer], slice(part.first, part.last)
        table = experts.streamed_tables[self._buffer(node)]
        compute = self._experts(table, node.part, part) if experts.streamed else None
        slots = self._expert_out[: (part.last - part.first) * self.spec.n_active]
        routes = (self._weight[mine], self.index[mine], experts.elsewhere)

        def run(stream: Stream) -> None:
            if compute:
                compute(stream)
            self.device.launch(stream, launches.combine(self.x[mine], slots, *routes))

        return run

    def _experts(self, table: Array, number: int, part: Part) -> Work:
        m = part.last - part.first
        n_slots = m * self.spec.n_active
        between, out = self._expert_hidden[:n_slots], self._expert_out[:n_slots]
        made = launches.experts(
            self.normed[part.first : part.last], table, self._starts[number], self._slots_of(part), m, between, out
        )
        return lambda stream: self._launch_all(stream, made)

    def linear(self, stream: Stream, x: Array, matrix: tuple[Array, Array], out: Array) -> None:
        """out (M, n_out) float32 = x (M, n_in) bf16 times a matrix."""
        m = len(x)
        self.device.launch(stream, launches.linear(x, matrix[1], self._bounds[2 * m : 2 * m + 2], out))

    def _launch_all(self, stream: Stream, made: Sequence[launches.Launch]) -> None:
        for launch in made:
            self.device.launch(stream, launch)
