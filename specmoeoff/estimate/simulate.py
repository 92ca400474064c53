"""Runs a priced graph on its lanes: who waits for whom, and how long a window takes when windows follow each other."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from specmoeoff.pipeline import Graph, Node


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
            if a < end and b > begin:
                busy[node.lane] += min(b, end) - max(a, begin)
        return busy

    @property
    def phases_s(self) -> dict[str, float]:
        """By kind on the compute lane within the steady window, and what is left: `wait`."""
        phases: defaultdict[str, float] = defaultdict(float)
        steady = self.steady
        for node in self.graph.nodes:
            if node.lane == "cpu" and node.window == steady:
                phases[node.kind] += self.end_s[node.index] - self.start_s[node.index]
        phases["wait"] = max(0.0, self.period_s - sum(phases.values()))
        return dict(phases)

    @property
    def loads(self) -> float:
        """Experts read for the steady window, dropped ones by their probability."""
        steady = self.steady
        return sum(s for node, s in zip(self.graph.nodes, self.read_share, strict=True) if node.window == steady)


def simulate(
    graph: Graph,
    seconds: Sequence[float],
    wake_s: Callable[[float], float] = lambda wait_s: 0.0,
    gap_s: float = 0.0,
) -> Schedule:
    """List scheduling, from one end of a node to the next. `wake_s`: what work on the CPU takes longer after a wait of so
    many seconds; `gap_s`: what lies before each node there. Both lanes serve the most urgent ready node: the CPU by program
    order, the disk by window, layer, demand before prefetch. Loads obey the slot rules of pipeline.py."""
    nodes, n = graph.nodes, len(graph.nodes)
    missing = [len(node.deps) for node in nodes]
    users: list[list[int]] = [[] for _ in nodes]
    for node in nodes:
        for dep in node.deps:
            users[dep].append(node.index)
    start_s, end_s, read_share = [-1.0] * n, [-1.0] * n, [0.0] * n
    ready_cpu: list[int] = []
    ready_disk: list[tuple[int, int, bool, int]] = []

    def make_ready(node: Node) -> None:
        if node.lane == "cpu":
            heappush(ready_cpu, node.index)
        else:
            heappush(ready_disk, (node.window, node.layer, node.experts[0].source != "demand", node.index))

    for node in nodes:
        if not node.deps:
            make_ready(node)
    on_cpu = on_disk = -1  # the node that runs there, if any
    cpu_end_s = disk_end_s = inf
    now_s = waits_since_s = 0.0
    free_slots, current = graph.stream_slots, (0, -1)
    while True:
        if on_cpu < 0 and ready_cpu:
            on_cpu = heappop(ready_cpu)
            node = nodes[on_cpu]
            if node.kind == "attention":
                current = (node.window, node.layer)
            waited_s = now_s - waits_since_s
            start_s[on_cpu] = now_s + gap_s
            cpu_end_s = start_s[on_cpu] + (seconds[on_cpu] + (wake_s(waited_s) if waited_s > 0 else 0.0))
        if on_disk < 0 and ready_disk:
            ahead = ready_disk[0][:2] > current
            if free_slots > (graph.demand_reserve if ahead else 0):
                on_disk = heappop(ready_disk)[-1]
                free_slots -= 1
                node = nodes[on_disk]
                # All of it, unless routing is known: then an unused expert is not read.
                routed = all(end_s[router] >= 0 for router in node.routed_by)
                share = read_share[on_disk] = node.experts[0].probability if routed else 1.0
                start_s[on_disk] = now_s
                disk_end_s = now_s + seconds[on_disk] * share
        if on_cpu < 0 and on_disk < 0:
            break
        now_s = min(cpu_end_s, disk_end_s)
        ended = []
        if cpu_end_s == now_s:
            ended.append(on_cpu)
            on_cpu, cpu_end_s, waits_since_s = -1, inf, now_s
        if disk_end_s == now_s:
            ended.append(on_disk)
            on_disk, disk_end_s = -1, inf
        for index in ended:
            end_s[index] = now_s
            if nodes[index].kind == "expert":
                free_slots += 1
            for user in users[index]:
                missing[user] -= 1
                if not missing[user]:
                    make_ready(nodes[user])
    if min(end_s, default=0.0) < 0:
        raise ValueError(f"the graph cannot run: {graph.stream_slots} stream slots are too few")
    return Schedule(graph, start_s, end_s, read_share)
