"""How long a window takes on lanes that keep the graph's order, for all configurations of one graph at once.

With a fixed order on every lane the schedule is the longest path: a node begins when the one before it on its lane and
those it waits for have ended. That is a recursion of max and plus, so the prices may be arrays.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from specmoeoff.pipeline import GpuWindow, Graph, gpu_window_graph

Prices = Mapping[str, np.ndarray]  # seconds by node kind, each of shape (n_configurations,)
Waits = list[tuple[int, ...]]

FIRST_LAYERS, WINDOWS = 6, 2
CHUNK = 4096  # configurations at a time, so that the ends of nodes stay in the CPU's cache


def waits_of(graph: Graph) -> Waits:
    """Of every node, what must have ended: the node before it on its lane, and the last of each other lane it needs."""
    last: dict[str, int] = {}
    waits = []
    for node in graph.nodes:
        lanes = {graph.nodes[d].lane: d for d in sorted(node.deps)}
        if node.lane in last:
            lanes[node.lane] = last[node.lane]
        waits.append(tuple(lanes.values()))
        last[node.lane] = node.index
    return waits


def longest_path(
    graph: Graph, waits: Waits, seconds: Prices, forget: Sequence[tuple[int, ...]] | None = None
) -> list[np.ndarray]:
    """End of every node. `forget`: after each node, those whose ends are no longer needed: memory is reused while hot."""
    ends: list[np.ndarray] = []
    for node, before in zip(graph.nodes, waits, strict=True):
        begin = ends[before[0]] if before else 0.0
        for other in before[1:]:
            begin = np.maximum(begin, ends[other])
        ends.append(begin + seconds[node.kind])
        for other in forget[node.index] if forget else ():
            ends[other] = None  # type: ignore[call-overload]
    return ends


def steady_window_s(shape: GpuWindow, n_layers: int, seconds: Prices) -> np.ndarray:
    """Seconds of a window when windows follow each other, (n_configurations,).

    Layers are identical, so a few stand for all: where two layers move every end of a node by the same time, so does every
    further pair (the recursion commutes with adding a constant). Configurations that have not settled so are simulated with
    twice the layers, up to all.
    """
    n = max(np.size(s) for s in seconds.values())
    out = np.empty(n)
    for begin in range(0, n, CHUNK):
        todo, layers = np.arange(begin, min(begin + CHUNK, n)), FIRST_LAYERS
        while todo.size:
            layers = min(layers + (n_layers - layers) % 2, n_layers)
            graph, waits, forget, pairs = _prepared(shape, layers)
            ends = longest_path(graph, waits, {kind: s[todo] for kind, s in seconds.items()}, forget)
            period = ends[graph.ends[-1]] - ends[graph.ends[-2]]
            if layers == n_layers:
                out[todo] = period
                break
            moved = [ends[later] - ends[earlier] for earlier, later in pairs]
            settled = np.max(moved, axis=0) - np.min(moved, axis=0) <= 1e-9 * period
            out[todo[settled]] = (period + (n_layers - layers) / 2 * moved[0])[settled]
            todo, layers = todo[~settled], 2 * layers
    return out


@lru_cache(maxsize=4096)
def _prepared(shape: GpuWindow, n_layers: int) -> tuple[Graph, Waits, list[tuple[int, ...]], list[tuple[int, int]]]:
    """The graph, what its nodes wait for, what each is the last to need, and the nodes of its last four layers with those
    two layers later."""
    graph = gpu_window_graph(shape, n_layers, WINDOWS)
    layers: list[list[int]] = [[] for _ in range(n_layers)]
    for node in graph.nodes:
        if node.layer >= 0 and node.window == WINDOWS - 1:
            layers[node.layer].append(node.index)
    pairs = [pair for i in (-4, -3) for pair in zip(layers[i], layers[i + 2], strict=True)] if n_layers >= 6 else []
    waits = waits_of(graph)
    last_user = {other: index for index, before in enumerate(waits) for other in before}
    for kept in (*graph.ends, *(node for pair in pairs for node in pair)):
        last_user.pop(kept, None)
    forget: list[tuple[int, ...]] = [()] * len(graph.nodes)
    for other, index in last_user.items():
        forget[index] += (other,)
    return graph, waits, forget, pairs
