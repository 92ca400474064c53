"""Runs a priced graph on its lanes: who waits for whom, and how long a window takes when windows follow each other."""

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specmoeoff.pipeline import Graph


@dataclass(frozen=True)
class Schedule:
    """Start and end of every node in seconds, and how much of every load was really read (dropped loads less)."""

    graph: Graph
    start_s: list[float]
    end_s: list[float]
    read_share: list[float]

    @property
    def n_windows(self) -> int:
        return len(self.graph.ends)

    @property
    def steady(self) -> int:
        """The window that stands for all: the last that has another after it. The first has nothing read ahead for it, the
        last reads nothing ahead."""
        return max(self.n_windows - 2, min(1, self.n_windows - 1))

    @property
    def span_s(self) -> tuple[float, float]:
        """Begin and end of the steady window: the ends of the window before it and of itself."""
        ends = [0.0, *(self.end_s[i] for i in self.graph.ends)]
        return ends[self.steady], ends[self.steady + 1]

    @property
    def period_s(self) -> float:
        """How long a window takes when windows follow each other."""
        begin, end = self.span_s
        return end - begin

    @property
    def busy_s(self) -> dict[str, float]:
        """By lane, within the steady window's span."""
        begin, end = self.span_s
        busy = {"cpu": 0.0, "disk": 0.0}
        for node, a, b in zip(self.graph.nodes, self.start_s, self.end_s, strict=True):
            busy[node.lane] += max(0.0, min(b, end) - max(a, begin))
        return busy

    @property
    def phases_s(self) -> dict[str, float]:
        """By kind on the compute lane within the steady window, and what is left: `wait`."""
        phases: defaultdict[str, float] = defaultdict(float)
        for node in self.graph.nodes:
            if node.lane == "cpu" and node.window == self.steady:
                phases[node.kind] += self.end_s[node.index] - self.start_s[node.index]
        phases["wait"] = max(0.0, self.period_s - sum(phases.values()))
        return dict(phases)

    @property
    def loads(self) -> float:
        """Experts read for the steady window, dropped ones by their probability."""
        return sum(s for node, s in zip(self.graph.nodes, self.read_share, strict=True) if node.window == self.steady)


def simulate(graph: Graph, seconds: Sequence[float], wake_s: Callable[[float], float] = lambda wait_s: 0.0) -> Schedule:
    """Event-driven list scheduling. `wake_s`: what work on the CPU takes longer after a wait of so many seconds. Both lanes serve the most urgent ready node: the CPU by program order, the disk by
    window, layer, demand before prefetch. Loads obey the slot rules of pipeline.py."""
    return _Simulation(graph, seconds, wake_s).run()


class _Simulation:
    def __init__(self, graph: Graph, seconds: Sequence[float], wake_s: Callable[[float], float]) -> None:
        self._graph, self._seconds, self._wake_s = graph, seconds, wake_s
        self._cpu_end_s = 0.0
        n = len(graph.nodes)
        self._missing = [len(node.deps) for node in graph.nodes]
        self._users: list[list[int]] = [[] for _ in range(n)]
        for node in graph.nodes:
            for dep in node.deps:
                self._users[dep].append(node.index)
        self._start, self._end, self._share = [-1.0] * n, [-1.0] * n, [0.0] * n
        self._ready_cpu: list[int] = []
        self._ready_disk: list[tuple[int, int, bool, int]] = []
        self._events: list[tuple[float, int]] = []
        self._busy = {"cpu": False, "disk": False}
        self._free = graph.stream_slots
        self._current = (0, -1)
        for node in graph.nodes:
            if not self._missing[node.index]:
                self._make_ready(node.index)

    def run(self) -> Schedule:
        now = 0.0
        self._begin(now)
        while self._events:
            now, index = heapq.heappop(self._events)
            self._finish(index, now)
            while self._events and self._events[0][0] == now:
                self._finish(heapq.heappop(self._events)[1], now)
            self._begin(now)
        if min(self._end, default=0.0) < 0:
            raise ValueError(f"the graph cannot run: {self._graph.stream_slots} stream slots are too few")
        return Schedule(self._graph, self._start, self._end, self._share)

    def _make_ready(self, index: int) -> None:
        node = self._graph.nodes[index]
        if node.lane == "cpu":
            heapq.heappush(self._ready_cpu, index)
        else:
            demand = node.experts[0].source == "demand"
            heapq.heappush(self._ready_disk, (node.window, node.layer, not demand, index))

    def _finish(self, index: int, now: float) -> None:
        node = self._graph.nodes[index]
        self._end[index] = now
        self._busy[node.lane] = False
        if node.lane == "cpu":
            self._cpu_end_s = now
        if node.kind == "expert":
            self._free += 1
        for user in self._users[index]:
            self._missing[user] -= 1
            if not self._missing[user]:
                self._make_ready(user)

    def _begin(self, now: float) -> None:
        if not self._busy["cpu"] and self._ready_cpu:
            index = heapq.heappop(self._ready_cpu)
            node = self._graph.nodes[index]
            if node.kind == "attention":
                self._current = (node.window, node.layer)
            waited = now - self._cpu_end_s
            self._occupy(index, now, self._seconds[index] + (self._wake_s(waited) if waited > 0 else 0.0))
        if not self._busy["disk"] and self._ready_disk:
            window, layer, _, index = self._ready_disk[0]
            ahead = (window, layer) > self._current
            if self._free > (self._graph.demand_reserve if ahead else 0):
                heapq.heappop(self._ready_disk)
                self._free -= 1
                self._share[index] = self._share_read(index)
                self._occupy(index, now, self._seconds[index] * self._share[index])

    def _share_read(self, index: int) -> float:
        """All of it, unless routing is known: then an unused expert is not read."""
        node = self._graph.nodes[index]
        routed = all(self._end[r] >= 0 for r in node.routed_by)
        return node.experts[0].probability if routed else 1.0

    def _occupy(self, index: int, now: float, seconds: float) -> None:
        self._busy[self._graph.nodes[index].lane] = True
        self._start[index] = now
        heapq.heappush(self._events, (now + seconds, index))
