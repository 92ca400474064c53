"""The graph of a window of decoding: one graph, three readers.

The estimator prices its nodes, the runtime executes them, the report draws them. A window is: draft steps; then for every
layer the attention of each micro-batch (with its projections and router), the resident experts together, each streamed
expert by itself; then the head and the acceptance. Transfers run on the `disk` lane beside it, ahead of need as far as
stream slots allow, over the window's end into the next one.

A planned graph holds every expert with the probability that it is used; the runtime adds the experts of a layer when its
router has spoken, with probability 1. Both go through the same Builder, so nodes compare one to one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

NodeKind = Literal["draft", "attention", "experts", "expert", "head", "verify", "load"]
Lane = Literal["cpu", "disk"]

DEMAND_RESERVE_SLOTS = 2  # one computes while the other is read; keeps layers ahead from starving the layer at hand


@dataclass(frozen=True, slots=True)
class RequestTokens:
    """New tokens of one request in this window, and the tokens already in its KV cache."""

    n_tokens: float
    context: int


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """One expert of a layer. `rows` tokens choose it if it is used at all, which happens with `probability`."""

    expert: int
    source: Literal["resident", "prefetch", "demand"]
    rows: float
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class Node:
    """A piece of work on one lane. `deps` are node indices that must end first."""

    index: int
    window: int
    name: str
    kind: NodeKind
    lane: Lane
    layer: int
    deps: tuple[int, ...]
    requests: tuple[RequestTokens, ...] = ()
    experts: tuple[ExpertUse, ...] = ()
    rows: float = 0.0
    # A load takes a slot when it starts; the node that computes its expert, its `user`, gives it back.
    user: int | None = None
    # Nodes whose end tells whether this expert is used: a prefetch not begun by then is dropped if it is not.
    routed_by: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WindowShape:
    """What goes through one window. `drafts`: requests of every draft step; `experts`: uses by layer."""

    drafts: tuple[tuple[RequestTokens, ...], ...]
    micro_batches: tuple[tuple[RequestTokens, ...], ...]
    experts: tuple[tuple[ExpertUse, ...], ...]
    head_rows: float


@dataclass
class Graph:
    """Nodes in lane order; `ends[w]` is the last node of window w."""

    nodes: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    stream_slots: int = 0
    demand_reserve: int = 0


class Builder:
    """Adds the nodes of window after window, keeping the edges. The runtime calls it node by node, a plan all at once."""

    def __init__(self, stream_slots: int, demand_reserve: int = 0) -> None:
        self.graph = Graph(stream_slots=stream_slots, demand_reserve=demand_reserve)
        self._window = 0
        self._last: tuple[int, ...] = ()
        self._routers: tuple[int, ...] = ()

    def _add(
        self, kind: NodeKind, name: str, layer: int, deps: tuple[int, ...], lane: Lane = "cpu", **work: object
    ) -> Node:
        node = Node(len(self.graph.nodes), self._window, name, kind, lane, layer, deps, **work)  # type: ignore[arg-type]
        self.graph.nodes.append(node)
        return node

    def draft(self, step: int, requests: Sequence[RequestTokens]) -> Node:
        """One pass of the draft model: `requests` are those that still draft at this step."""
        rows = sum(r.n_tokens for r in requests)
        node = self._add("draft", f"draft {step}", -1, self._last, requests=tuple(requests), rows=rows)
        self._last = (node.index,)
        return node

    def attention(self, layer: int, micro_batch: int, requests: Sequence[RequestTokens]) -> Node:
        """Norm, projections, KV append, verification attention, output projection, norm and router of one micro-batch."""
        if micro_batch == 0:
            self._routers = ()
        rows = sum(r.n_tokens for r in requests)
        name = f"attention {layer}.{micro_batch}"
        node = self._add("attention", name, layer, self._last, requests=tuple(requests), rows=rows)
        self._routers += (node.index,)
        return node

    def experts(self, layer: int, uses: Iterable[ExpertUse]) -> list[Node]:
        """Loads and computations of a layer: residents in one node, every streamed expert in a node of its own."""
        uses = tuple(uses)
        added = []
        resident = tuple(u for u in uses if u.source == "resident")
        if resident:
            rows = sum(u.rows * u.probability for u in resident)
            name = f"resident experts {layer}"
            added.append(self._add("experts", name, layer, self._routers, experts=resident, rows=rows))
        for use in sorted((u for u in uses if u.source != "resident"), key=lambda u: u.source == "demand"):
            position = len(self.graph.nodes)
            load = self._add(
                "load",
                f"load {layer}.{use.expert}",
                layer,
                self._routers if use.source == "demand" else (),
                "disk",
                experts=(use,),
                user=position + 1,
                routed_by=self._routers,
            )
            name = f"expert {layer}.{use.expert}"
            rows = use.rows * use.probability
            deps = (*self._routers, load.index)
            added += [load, self._add("expert", name, layer, deps, experts=(use,), rows=rows)]
        self._last = tuple(n.index for n in added if n.lane == "cpu") or self._routers
        return added

    def head(self, rows: float) -> Node:
        """Final norm, output projection and argmax of `rows` tokens."""
        node = self._add("head", "head", -1, self._last, rows=rows)
        self._last = (node.index,)
        return node

    def verify(self, rows: float) -> Node:
        """Compare, accept, roll back, refill: ends the window."""
        node = self._add("verify", "verify", -1, self._last, rows=rows)
        self._last = (node.index,)
        self.graph.ends.append(node.index)
        self._window += 1
        return node


def window_graph(shape: WindowShape, stream_slots: int, n_windows: int = 1) -> Graph:
    """`n_windows` equal windows, one after the other, with the edges between them."""
    demand = any(use.source == "demand" for layer in shape.experts for use in layer)
    builder = Builder(stream_slots, DEMAND_RESERVE_SLOTS if demand else 0)
    for _ in range(n_windows):
        for step, requests in enumerate(shape.drafts):
            builder.draft(step, requests)
        for layer, uses in enumerate(shape.experts):
            for index, requests in enumerate(shape.micro_batches):
                builder.attention(layer, index, requests)
            builder.experts(layer, uses)
        builder.head(shape.head_rows)
        builder.verify(shape.head_rows)
    return builder.graph
