"""Runs windows on a machine with a GPU: builds the graph as it goes, and gives every node its work."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

import numpy as np

from specmoeoff.pipeline import GpuBuilder, GpuWindow, Node
from specmoeoff.runtime.gpu.device import Device
from specmoeoff.runtime.gpu.head import HEAD_ROWS
from specmoeoff.runtime.gpu.inputs import Inputs, Part
from specmoeoff.runtime.gpu.lanes import LANES, Lanes
from specmoeoff.runtime.gpu.model import U16, GpuModel, Sizes
from specmoeoff.runtime.gpu.weights import GpuWeights
from specmoeoff.runtime.rows import Rows

BUFFERED_LAYERS = 2  # while one computes the next one comes


class Placement(NamedTuple):
    """Experts by layer; the others are streamed: all of a layer ahead of need, or those that are used on demand."""

    resident: Sequence[Sequence[int]]
    on_host: Sequence[Sequence[int]]
    on_demand: bool


class Room(NamedTuple):
    """What memory is made for; `part_rows`: of a micro-batch. Pages count without the spare one."""

    max_rows: int
    part_rows: int
    max_requests: int
    pages_per_request: int
    n_near_pages: int
    n_far_pages: int
    n_positions: int


class GpuExecutor:
    """The target's part of every window. `timed`: keep when each node began and ended; `target`: see GpuModel."""

    def __init__(
        self,
        weights: GpuWeights,
        device: Device,
        placement: Placement,
        room: Room,
        micro_batches: int,
        n_threads: int,
        timed: bool = False,
        target: GpuModel | None = None,
    ) -> None:
        spec = self.spec = weights.spec
        self._device, self.lanes = device, Lanes(device, timed)
        self._on_demand, self._n_parts, self._part_rows = placement.on_demand, micro_batches, room.part_rows
        buffers = 1 if placement.on_demand else BUFFERED_LAYERS
        near, far = room.n_near_pages, room.n_far_pages
        sizes = Sizes(room.max_rows, room.part_rows, near, far, room.n_positions, micro_batches, buffers)
        self.model = GpuModel(weights, device, n_threads, sizes, placement.resident, placement.on_host, target)
        self._inputs = Inputs(device, room.max_rows, room.max_requests, room.pages_per_request, near)
        on_host = any(len(layer) for layer in placement.on_host)
        self.shape = GpuWindow(micro_batches, 0, False, on_host, placement.on_demand)
        self._builder = GpuBuilder(self.shape, spec.n_layers)
        self.nodes: list[Node] = []
        self._loads_begun: list[Node] = []  # of the window at hand, by the one before

    def forward(self, tokens: np.ndarray, micro_batches: Sequence[Rows], features: np.ndarray | None = None) -> None:
        """All layers over tokens (M,), and of an EAGLE head over features (M, hidden) bf16; enqueued, not waited for. Raises
        ValueError for more than there is room for.

        `choose` follows, at least once where anything was chosen."""
        if max(rows.last - rows.first for rows in micro_batches) > self._part_rows:
            raise ValueError(f"a micro-batch has more than the {self._part_rows} rows that memory was made for")
        if self.nodes:  # inputs are where the last window's were, which its first node came after
            self.lanes.synchronize(next(node.index for node in self.nodes if node.kind == "pre_attention"))
        self._loads_begun = [node for node in self.nodes if node.kind == "load" and node.window > self.nodes[-1].window]
        nodes = self.nodes = self._builder.window()
        parts: list[Part | None] = [None] * self._n_parts
        stream = self.lanes.streams["gpu"]
        tokens_here, given = self._inputs.send(stream, np.asarray(tokens, np.int32), micro_batches)
        parts[: len(given)] = given
        if self.model.entry and features is not None:
            self.model.entry.send(stream, features)
        self._rows = len(tokens)
        *layers, head, verify = nodes
        for node in layers:
            if node.kind == "load" and self._on_demand:
                self._load_on_demand(node, given)
            else:
                self.lanes.run(node, self.model.work(node, parts[node.part], tokens_here))

        def add(stream: object) -> None:
            for part in given:
                self.model.add_host_experts(stream, self.spec.n_layers - 1, part)

        self.lanes.run(head, add)
        self.lanes.run(verify, lambda _: None)

    def _load_on_demand(self, node: Node, parts: Sequence[Part]) -> None:
        for router in reversed(node.deps):  # the last one's end tells of the others
            self.lanes.synchronize(router)
        chosen = np.unique(self._device.get(self.model.index_host[: self._rows]))
        self.lanes.run(node, self.model.load_used(node, chosen))

    def choose(self, rows: np.ndarray, logits: np.ndarray | None = None) -> np.ndarray:
        """The most likely next token after each of `rows` (n,) of the last pass, int32; logits (n, vocab) float32 if wanted."""
        *_, head, verify = self.nodes
        chosen, model = np.empty(len(rows), np.int32), self.model
        for first in range(0, len(rows), HEAD_ROWS):
            some = rows[first : first + HEAD_ROWS]
            n, into = len(some), None if logits is None else logits[first : first + HEAD_ROWS]
            self.lanes.run(head, partial(model.head.compute, rows=some))
            self.lanes.run(verify, partial(model.head.send, n=n, logits=into is not None))
            self.lanes.synchronize(verify.index)
            chosen[first : first + n] = model.head.fetch(n, into)
        return chosen

    def features(self, rows: np.ndarray) -> np.ndarray:
        """What the head sees of `rows` (n,) of the last pass, (n, hidden) bf16."""
        *_, head, verify = self.nodes
        found, model = np.empty((len(rows), self.spec.hidden), U16), self.model
        for first in range(0, len(rows), HEAD_ROWS):
            some = rows[first : first + HEAD_ROWS]
            self.lanes.run(head, partial(model.head.norm, rows=some))
            self.lanes.run(verify, partial(model.head.send_features, n=len(some)))
            self.lanes.synchronize(verify.index)
            found[first : first + len(some)] = model.head.fetch_features(len(some))
        return found

    def states(self, n_rows: int) -> np.ndarray:
        """The residual stream of the last pass, (n_rows, hidden) float32."""
        self.lanes.synchronize(self.nodes[-1].index)
        return self._device.get(self.model.x[:n_rows])

    @property
    def far_pages(self) -> list[np.ndarray]:
        """Keys and values beside the CPU, of each layer."""
        return self.model.far_kv

    def busy_s(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by lane and by kind of node of the last window, which is waited for; only where it was `timed`."""
        window = self.nodes[-1].window
        self.lanes.synchronize(self.nodes[-1].index)
        lanes, kinds = defaultdict[str, float](float), defaultdict[str, float](float)
        for node in (*self._loads_begun, *self.nodes):
            if node.window == window:
                seconds = self.lanes.seconds(node)
                lanes[node.lane] += seconds
                kinds[node.kind] += seconds
        return {lane: lanes[lane] for lane in LANES}, dict(kinds)

    def seconds_by_kind(self, nodes: Sequence[Node] | None = None) -> dict[str, float]:
        """Mean over the nodes of each kind of a window, by default the last, once everything is over; only where it was `timed`."""
        self.lanes.drain()
        found: defaultdict[str, list[float]] = defaultdict(list)
        for node in self.nodes if nodes is None else nodes:
            found[node.kind].append(self.lanes.seconds(node))
        return {kind: fmean(seconds) for kind, seconds in found.items()}
