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
from typing import Literal, NamedTuple

NodeKind = Literal[
    # on every machine
    "draft", "attention", "experts", "expert", "head", "verify", "load",
    # only with a GPU, where `attention` is the CPU's part alone and `experts` are the GPU's
    "pre_attention", "gpu_attention", "post_attention", "resident_experts", "host_experts",
    "offload", "onload", "rows_offload", "rows_onload",
    "draft_pre", "draft_offload", "draft_attention", "draft_onload", "draft_post",
]  # fmt: skip
Lane = Literal["gpu", "cpu", "h2d", "d2h", "disk"]

DEMAND_RESERVE_SLOTS = 2  # one computes while the other is read; keeps layers ahead from starving the layer at hand


class RequestTokens(NamedTuple):
    """New tokens of one request in this window, and the tokens already in its KV cache."""

    n_tokens: float
    context: int


class ExpertUse(NamedTuple):
    """One expert of a layer. `rows` tokens choose it if it is used at all, which happens with `probability`."""

    expert: int
    source: Literal["resident", "prefetch", "demand"]
    rows: float
    probability: float = 1.0


class Node(NamedTuple):
    """A piece of work on one lane. `deps` are node indices that must end first."""

    index: int  # type: ignore[assignment]
    window: int
    name: str
    kind: NodeKind
    lane: Lane
    layer: int
    deps: tuple[int, ...]
    requests: tuple[RequestTokens, ...] = ()
    experts: tuple[ExpertUse, ...] = ()
    rows: float = 0.0
    part: int = 0  # the micro-batch it is of, with a GPU
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
        rows = sum([r.n_tokens for r in requests])
        name = f"attention {layer}.{micro_batch}"
        node = self._add("attention", name, layer, self._last, requests=tuple(requests), rows=rows)
        self._routers += (node.index,)
        return node

    def experts(self, layer: int, uses: Iterable[ExpertUse]) -> list[Node]:
        """Loads and computations of a layer: residents in one node, every streamed expert in a node of its own."""
        by_source: dict[str, list[ExpertUse]] = {"resident": [], "prefetch": [], "demand": []}
        for use in uses:
            by_source[use.source].append(use)
        added, routers = [], self._routers
        if resident := by_source["resident"]:
            rows = sum([u.rows * u.probability for u in resident])
            added.append(
                self._add("experts", f"resident experts {layer}", layer, routers, experts=tuple(resident), rows=rows)
            )
        for use in (*by_source["prefetch"], *by_source["demand"]):
            load = self._add(
                "load",
                f"load {layer}.{use.expert}",
                layer,
                routers if use.source == "demand" else (),
                "disk",
                experts=(use,),
                user=len(self.graph.nodes) + 1,
                routed_by=routers,
            )
            name = f"expert {layer}.{use.expert}"
            rows, deps = use.rows * use.probability, (*routers, load.index)
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


@dataclass(frozen=True)
class GpuWindow:
    """What shapes a window's graph on a machine with a GPU; everything else is in the prices.

    `on_demand`: a layer's experts are transferred once all its routers have spoken, those that are used only; else all of
    them while the layer before computes. A node without work in some configuration has the price 0.
    """

    micro_batches: int
    draft_steps: int
    draft_on_host: bool
    experts_on_host: bool
    on_demand: bool


def gpu_window_graph(shape: GpuWindow, n_layers: int, n_windows: int = 1) -> Graph:
    """`n_windows` windows of a machine with a GPU (SpecMoEOff, section 4; n_layers >= 2).

    Per layer and micro-batch: projections on the GPU, queries to the host, attention beside the KV cache, its output back,
    router and experts on the GPU. The nodes' order is every lane's order. Stream buffers hold two layers' experts, so a
    layer's transfer begins when the experts two layers before are done, across windows too; it is cut into one piece for
    each micro-batch, which follows that micro-batch's activations.
    """
    builder, graph = GpuBuilder(shape, n_layers), Graph()
    for _ in range(n_windows):
        graph.nodes += builder.window()
        graph.ends.append(graph.nodes[-1].index)
    return graph


class GpuBuilder:
    """Adds window after window, keeping the edges and nothing else: there is no end to the windows of a run."""

    def __init__(self, shape: GpuWindow, n_layers: int) -> None:
        self._shape, self._n_layers = shape, n_layers
        self._window, self._n_nodes = 0, 0
        self._nodes: list[Node] = []
        self._verified: tuple[int, ...] = ()
        self._loads: dict[int, list[int]] = {}  # by layer, counted through all windows
        self._computed: dict[int, list[int]] = {}
        if not shape.on_demand:
            for part in range(shape.micro_batches):
                self._load(0, part)

    def _add(self, kind: NodeKind, lane: Lane, layer: int, part: int, *deps: int) -> int:
        """`layer` counts through all windows; -1: outside the layers."""
        window, layer = (self._window, -1) if layer < 0 else divmod(layer, self._n_layers)
        name = f"{kind} {layer}.{part}" if layer >= 0 else f"{kind} {part}"
        self._nodes.append(Node(self._n_nodes, window, name, kind, lane, layer, deps, part=part))
        self._n_nodes += 1
        return self._n_nodes - 1

    def _load(self, layer: int, part: int, *deps: int) -> None:
        free = self._computed.get(layer - 2, ())
        self._loads.setdefault(layer, []).append(self._add("load", "h2d", layer, part, *free, *deps))

    def window(self) -> list[Node]:
        """The nodes of one more, the last of them its end; with loads of the next window's first layer."""
        shape, first = self._shape, self._window * self._n_layers
        parts, ready = range(shape.micro_batches), self._draft(first + 1)
        routed = [self._attend(first, part, ready) for part in parts]
        for layer in range(first, first + self._n_layers):
            outputs = self._on_demand(layer, routed) if shape.on_demand else []
            following = []
            for part in parts:
                if not shape.on_demand:
                    router = self._route(layer, part, routed[part])
                    if len(self._loads.get(layer + 1, ())) < shape.micro_batches:
                        self._load(layer + 1, part)
                    outputs.append(self._experts(layer, part, router))
                if layer + 1 < first + self._n_layers:
                    following.append(self._attend(layer + 1, part, outputs[part]))
            routed = following
        head = self._add("head", "gpu", -1, 0, *(node for output in outputs for node in output))
        self._verified = (self._add("verify", "gpu", -1, 0, head),)
        self._window += 1
        for old in (self._loads, self._computed):
            for layer in [layer for layer in old if layer < first]:
                del old[layer]
        nodes, self._nodes = self._nodes, []
        return nodes

    def _draft(self, next_layer: int) -> tuple[int, ...]:
        """Steps of the part of the requests whose draft KV lies in GPU memory beside the other part's; the link goes on
        with the second layer's experts meanwhile."""
        shape, ready = self._shape, self._verified
        loaded = 0
        for step in range(shape.draft_steps):
            while not shape.on_demand and loaded < shape.micro_batches * (step + 1) // shape.draft_steps:
                self._load(next_layer, loaded)
                loaded += 1
            if shape.draft_on_host:
                pre = self._add("draft_pre", "gpu", -1, step, *ready)
                offload = self._add("draft_offload", "d2h", -1, step, pre)
                attention = self._add("draft_attention", "cpu", -1, step, offload)
                onload = self._add("draft_onload", "h2d", -1, step, attention)
            draft = self._add("draft", "gpu", -1, step, *ready)
            ready = (draft, self._add("draft_post", "gpu", -1, step, onload)) if shape.draft_on_host else (draft,)
        return ready

    def _attend(self, layer: int, part: int, ready: Sequence[int]) -> list[int]:
        pre = self._add("pre_attention", "gpu", layer, part, *ready)
        on_gpu = self._add("gpu_attention", "gpu", layer, part, pre)
        return [on_gpu, self._add("attention", "cpu", layer, part, self._add("offload", "d2h", layer, part, pre))]

    def _route(self, layer: int, part: int, attended: Sequence[int]) -> int:
        on_gpu, on_cpu = attended
        return self._add("post_attention", "gpu", layer, part, on_gpu, self._add("onload", "h2d", layer, part, on_cpu))

    def _host_experts(self, layer: int, part: int, router: int) -> int:
        return self._add("host_experts", "cpu", layer, part, self._add("rows_offload", "d2h", layer, part, router))

    def _experts(self, layer: int, part: int, router: int) -> list[int]:
        host = [self._host_experts(layer, part, router)] if self._shape.experts_on_host else []
        resident = self._add("resident_experts", "gpu", layer, part, router)
        experts = self._add("experts", "gpu", layer, part, resident, *self._loads[layer])
        self._computed.setdefault(layer, []).append(experts)
        return [experts, *(self._add("rows_onload", "h2d", layer, part, node) for node in host)]

    def _on_demand(self, layer: int, attended: Sequence[Sequence[int]]) -> list[list[int]]:
        """Experts of all micro-batches after the routers of all."""
        routers = [self._route(layer, part, nodes) for part, nodes in enumerate(attended)]
        self._load(layer, 0, *routers)
        return [self._experts(layer, part, router) for part, router in enumerate(routers)]
