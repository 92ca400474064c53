"""Runs the target's part of a window node by node: attention, routing, experts as they arrive from disk, head."""

import time
from collections.abc import Sequence

import numpy as np

from specmoeoff.pipeline import DEMAND_RESERVE_SLOTS, ExpertUse, Node
from specmoeoff.runtime.expert_store import ExpertStore, Load
from specmoeoff.runtime.model import Model
from specmoeoff.runtime.rows import Rows
from specmoeoff.runtime.trace import Trace
from specmoeoff.specs.plan import PlanExperts

MOST_ROWS_OF_CALL = 4096  # times layers: the interpreter hears of Ctrl-C between calls only


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
        packed: list[dict[int, np.ndarray]] = [{} for _ in experts.resident]
        for (layer, expert), slot in self._store.resident.items():
            packed[layer][expert] = self._store.packed(slot)
        self._stack = self._model.stack(packed)
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
                loads = self._store.request(ahead, layer, experts, demand=False) if experts else []
                self._ahead[ahead, layer] = {load.expert: load for load in loads}

    def forward(self, window: int, tokens: np.ndarray, micro_batches: Sequence[Rows], trace: Trace) -> None:
        """All layers of one pass; afterwards the residual stream holds the final states of tokens (M,)."""
        self.read_ahead(window)
        self._model.begin(tokens)
        self.uses, self.failed_rows = [], {}
        layer, n_layers = 0, self._model.spec.n_layers
        while layer < n_layers:
            self._store.enter(window, layer)
            last = layer
            while last < n_layers and (last - layer) * len(tokens) < MOST_ROWS_OF_CALL and self._needs_nothing(last):
                last += 1
                if self.routing_log is not None:
                    break
            if last > layer:
                self._layers(window, layer, last, micro_batches, trace)
            else:
                self._streamed_layer(window, layer, micro_batches, trace)
                last = layer + 1
            layer = last
        self.experts_used = sum(map(len, self.uses)) / len(self.uses)

    def _needs_nothing(self, layer: int) -> bool:
        """Whether all that a layer may use is in memory."""
        table = self._stack.experts[layer]
        return table is None or table.is_complete

    def _layers(self, window: int, first: int, last: int, parts: Sequence[Rows], trace: Trace) -> None:
        """Layers that need nothing from disk, in one call."""
        counts, clock = self._model.layers(self._stack.part(first, last), parts, first)
        for layer, rows_of, times in zip(range(first, last), counts.tolist(), clock.tolist(), strict=True):
            self._ahead.pop((window, layer))
            for index, rows in enumerate(parts):
                trace.note(trace.builder.attention(layer, index, rows.requests), *times[index])
            used = {expert: n for expert, n in enumerate(rows_of) if n}
            self.uses.append(used)
            if self._stack.experts[layer]:
                (node,) = trace.builder.experts(layer, [ExpertUse(e, "resident", n) for e, n in used.items()])
                trace.note(node, *times[-1])
                self._log_routes(parts[-1].last)

    def _log_routes(self, n_rows: int) -> None:
        if self.routing_log is not None:
            self.routing_log.append(self._model.work.expert_index[:n_rows].copy())

    def _streamed_layer(self, window: int, layer: int, parts: Sequence[Rows], trace: Trace) -> None:
        """A layer some of whose experts are not in memory: those come while the others compute."""
        model, store, n_rows = self._model, self._store, parts[-1].last
        loads = self._ahead.pop((window, layer))
        chosen: set[int] = set()
        for index, rows in enumerate(parts):
            with trace.run(trace.builder.attention(layer, index, rows.requests)):
                model.attention(layer, rows)
            chosen |= self._demand(window, layer, rows, loads)
        for expert, load in loads.items():
            if expert not in chosen:
                store.drop(load)
        self._log_routes(n_rows)
        table = self._stack.experts[layer]
        assert table is not None
        start_s = time.perf_counter()
        slots = model.feed_forward(table, n_rows)
        end_s = time.perf_counter()
        self.uses.append({expert: len(slots[expert]) for expert in sorted(slots)})
        uses = [
            ExpertUse(e, "resident" if e not in loads else "demand" if loads[e].demand else "prefetch", n)
            for e, n in self.uses[-1].items()
        ]
        nodes = trace.builder.experts(layer, uses)
        waiting: dict[Load, tuple[Node, Node]] = {}
        for node, user in zip(nodes, [*nodes[1:], None], strict=True):
            if node.kind == "experts":
                trace.note(node, start_s, end_s)
            elif node.kind == "load":
                assert user
                waiting[loads[node.experts[0].expert]] = (node, user)
        while waiting:
            load = store.wait_any(list(waiting))
            load_node, node = waiting.pop(load)
            trace.note(load_node, load.start_s, load.end_s)
            with trace.run(node):
                rows_of = slots[load.expert]
                if load.error is None:
                    model.experts(layer, n_rows, {load.expert: store.packed(load.slot)}, slots)
                else:  # whatever those rows become, nobody else's depend on them
                    self.failed_rows |= dict.fromkeys((rows_of // model.spec.n_active).tolist(), load.error)
                if not waiting:
                    model.combine(n_rows)
            store.release(load)

    def _demand(self, window: int, layer: int, rows: Rows, loads: dict[int, Load]) -> set[int]:
        """What a micro-batch's router chose; of that, what nobody is bringing is asked for at once."""
        chosen = {*self._model.work.expert_index[rows.first : rows.last].ravel().tolist()}
        resident = self._store.resident
        missing = sorted(e for e in chosen if e not in loads and (layer, e) not in resident)
        if missing:
            loads.update({load.expert: load for load in self._store.request(window, layer, missing, demand=True)})
        return chosen
