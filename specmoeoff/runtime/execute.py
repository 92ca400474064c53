"""Runs the target's part of a window node by node: attention, routing, experts as they arrive from disk, head."""

from collections.abc import Sequence

import numpy as np

from specmoeoff.pipeline import DEMAND_RESERVE_SLOTS, ExpertUse, Node
from specmoeoff.runtime.expert_store import ExpertStore, Load
from specmoeoff.runtime.model import Model
from specmoeoff.runtime.rows import Rows
from specmoeoff.runtime.trace import Trace
from specmoeoff.specs.plan import PlanExperts


class Executor:
    """Holds the loads that were asked for ahead of their window."""

    def __init__(self, model: Model, store: ExpertStore) -> None:
        self._model, self._store = model, store
        self._ahead: dict[tuple[int, int], dict[int, Load]] = {}
        self._next_window = 0
        self.experts_used = 0.0
        # by layer, {expert: rows}, of the window last run
        self.uses: list[dict[int, int]] = []
        self.routing_log: list[np.ndarray] | None = None
        # rows of the window last run that lack an expert which could not be read, and why
        self.failed_rows: dict[int, Exception] = {}

    def place(self, experts: PlanExperts) -> None:
        """Take another placement; what was on its way is forgotten."""
        complete = all(
            len(resident) + len(prefetch) == self._model.spec.n_experts_of(layer)
            for layer, (resident, prefetch) in enumerate(zip(experts.resident, experts.prefetch, strict=True))
        )
        self._prefetch = experts.prefetch
        self._ahead.clear()
        self._store.hold(experts.resident, experts.stream_slots, 0 if complete else DEMAND_RESERVE_SLOTS)
        self._next_window = 0

    def idle(self) -> None:
        """Stop reading ahead: nobody will need it for a while."""
        self._store.quiesce()
        self._ahead.clear()

    def busy_s(self, trace: Trace) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of the window by lane, but for the disk's, and by kind of node."""
        phases = dict(trace.phases_s)
        return {"cpu": sum(phases.values())}, phases

    def read_ahead(self, window: int) -> None:
        """Queue the prefetches of this window and the next."""
        for ahead in (window, window + 1):
            if (ahead, 0) in self._ahead:
                continue
            for layer, experts in enumerate(self._prefetch):
                loads = self._store.request(ahead, layer, experts, demand=False)
                self._ahead[ahead, layer] = {load.expert: load for load in loads}

    def forward(self, window: int, tokens: np.ndarray, micro_batches: Sequence[Rows], trace: Trace) -> None:
        """All layers of one pass; afterwards the residual stream holds the final states of tokens (M,)."""
        self.read_ahead(window)
        self._model.begin(tokens)
        self.uses, self.failed_rows = [], {}
        for layer in range(self._model.spec.n_layers):
            self._store.enter(window, layer)
            loads = self._ahead.pop((window, layer))
            for index, rows in enumerate(micro_batches):
                with trace.run(trace.builder.attention(layer, index, rows.requests)):
                    self._model.attention(layer, rows)
                if self._model.spec.n_experts_of(layer):
                    self._demand(window, layer, rows, loads)
            if self._model.spec.n_experts_of(layer):
                self._experts(layer, len(tokens), loads, trace)
            else:
                self.uses.append({})
        self.experts_used = sum(map(len, self.uses)) / len(self.uses)

    def _demand(self, window: int, layer: int, rows: Rows, loads: dict[int, Load]) -> None:
        """Ask at once for what a micro-batch's router chose and nobody is bringing."""
        chosen = sorted({*self._model.work.expert_index[rows.first : rows.last].ravel().tolist()})
        resident = self._store.resident
        missing = [e for e in chosen if e not in loads and (layer, e) not in resident]
        if missing:
            loads.update({load.expert: load for load in self._store.request(window, layer, missing, demand=True)})

    def _experts(self, layer: int, n_rows: int, loads: dict[int, Load], trace: Trace) -> None:
        model, store = self._model, self._store
        slots = model.routing(n_rows)
        for expert, load in loads.items():
            if expert not in slots:
                store.drop(load)
        self.uses.append({expert: len(rows) for expert, rows in slots.items()})
        if self.routing_log is not None:
            self.routing_log.append(model.work.expert_index[:n_rows].copy())
        uses = [
            ExpertUse(e, "resident" if e not in loads else "demand" if loads[e].demand else "prefetch", len(rows))
            for e, rows in slots.items()
        ]
        nodes = trace.builder.experts(layer, uses)
        waiting: dict[Load, tuple[Node, Node]] = {}
        for node in nodes:
            if node.kind == "load":
                waiting[loads[node.experts[0].expert]] = (node, nodes[nodes.index(node) + 1])
        for node in nodes:
            if node.kind == "experts":
                with trace.run(node):
                    packed = {use.expert: store.packed(store.resident[layer, use.expert]) for use in node.experts}
                    model.experts(layer, n_rows, packed, slots)
                    if not waiting:
                        model.combine(n_rows)
        while waiting:
            load = store.wait_any(list(waiting))
            load_node, node = waiting.pop(load)
            trace.note(load_node, load.start_s, load.end_s)
            with trace.run(node):
                rows = slots[load.expert]
                if load.error is None:
                    model.experts(layer, n_rows, {load.expert: store.packed(load.slot)}, slots)
                else:  # whatever those rows become, nobody else's depend on them
                    self.failed_rows |= dict.fromkeys((rows // model.spec.n_active).tolist(), load.error)
                if not waiting:
                    model.combine(n_rows)
            store.release(load)
