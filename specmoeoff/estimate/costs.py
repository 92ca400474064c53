"""Prices of the graph's nodes from a measured profile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specmoeoff.errors import BadInput
from specmoeoff.estimate.memory import expert_stride
from specmoeoff.estimate.tables import OperatorTimes, find_table, layer_operators, wake_s
from specmoeoff.pipeline import Graph, Node, RequestTokens
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile

MEMORY_ROWS, COMPUTE_ROWS = 4.0, 64.0
COMBINE_ROWS = 64  # the combination of a layer is shared out over its experts at this size's cost


@dataclass(frozen=True)
class Calibration:
    """What was measured just now, in place of the profile's: disk rate, and operator times over the profile's for few
    rows, where memory is the limit, and for many, where arithmetic is."""

    disk_gb_per_s: float
    memory_scale: float = 1.0
    compute_scale: float = 1.0

    def scale(self, rows: float) -> float:
        """For operators on `rows` tokens: between both ends on the logarithm of rows."""
        share = min(1.0, max(0.0, math.log(max(rows, 1.0) / MEMORY_ROWS) / math.log(COMPUTE_ROWS / MEMORY_ROWS)))
        return self.memory_scale + share * (self.compute_scale - self.memory_scale)


class ModelTimes:
    """The operators of one model's shape, while the disk runs at this share of its full speed."""

    def __init__(self, profile: HardwareProfile, spec: ModelSpec, n_threads: int, disk_share: float) -> None:
        def table(operator: str) -> OperatorTimes:
            return find_table(profile, operator, spec.shape_key, n_threads, disk_share)

        self.spec = spec
        self.head, self.combine = table("head"), table("combine")
        if spec.n_experts == 1:
            self.dense_layer = table("dense_layer")
        self.layers = [layer_operators(spec, layer) for layer in range(spec.n_layers)]
        self._attention = {name: table(name) for name in dict.fromkeys(name for layer in self.layers for name in layer)}
        self.expert, self.experts = table("expert"), table("experts")

    def block(self, layer: int, rows: float) -> float:
        """One layer's attention block, with nothing in the KV cache."""
        return self._attention[self.layers[layer][0]](rows)

    def over_context(self, layer: int, requests: Sequence[RequestTokens]) -> float:
        """What one layer's attention to what is in the KV cache adds, over a ragged batch."""
        n = len(requests)
        rows = sum(r.n_tokens for r in requests)
        return n * self._attention[self.layers[layer][1]](rows / n, sum(r.context for r in requests) / n)


class Prices:
    """Seconds of each node. Equal nodes are priced once."""

    def __init__(
        self,
        profile: HardwareProfile,
        spec: ModelSpec,
        draft: ModelSpec | None,
        n_threads: int,
        disk_limit_gb_per_s: float | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        if profile.disk is None and calibration is None:
            reason = profile.waived.get("disk", "not measured")
            raise BadInput(f"profile {profile.name}: it has no disk link ({reason}); profile the machine again.")
        measured = calibration.disk_gb_per_s if calibration else profile.disk.read_gb_per_s.value  # type: ignore[union-attr]
        self.disk_gb_per_s = min(measured, disk_limit_gb_per_s or measured)
        self.stride = expert_stride(spec)
        self._load_s = self.stride / (self.disk_gb_per_s * 1e9)
        self._calibration = calibration or Calibration(measured)
        # Of target and draft: alone, and beside the disk at the speed it may run.
        self._times = {
            streams: tuple(
                ModelTimes(profile, model, n_threads, self.disk_gb_per_s / measured if streams else 0.0)
                for model in (spec, draft)
                if model
            )
            for streams in (False, True)
        }
        self.wake_s = wake_s(profile, spec.shape_key, n_threads)
        self._memo: dict[tuple[object, ...], float] = {}

    def seconds(self, graph: Graph) -> list[float]:
        """Of every node, all windows being equal; a load's is that of the whole expert."""
        window = graph.nodes[: graph.ends[0] + 1]
        streams = any(node.kind == "load" for node in window)
        return [self._load_s if node.lane == "disk" else self._price(node, streams) for node in window] * len(
            graph.ends
        )

    def compute_floor(self, graph: Graph) -> tuple[float, float]:
        """Seconds of drafting, and of everything on the compute lane, whatever is resident and whatever runs beside."""
        lane = [(node.kind, self._price(node, False)) for node in graph.nodes if node.lane == "cpu"]
        return sum(s for kind, s in lane if kind == "draft"), sum(s for _, s in lane)

    def _price(self, node: Node, streams: bool) -> float:
        uses = tuple([(u.rows, u.probability) for u in node.experts])
        key = (
            streams,
            node.kind,
            self._times[streams][0].layers[node.layer],
            node.rows,
            uses,
            len(node.requests),
            node.requests[0].context if node.requests else 0,
        )
        if key not in self._memo:
            rows = max((u.rows for u in node.experts), default=node.rows)
            self._memo[key] = self._operator(node, *self._times[streams]) * self._calibration.scale(rows)
        return self._memo[key]

    def _operator(self, node: Node, target: ModelTimes, draft: ModelTimes | None = None) -> float:
        match node.kind:
            case "attention":
                return target.block(node.layer, node.rows) + target.over_context(node.layer, node.requests)
            case "experts" | "expert":
                per_slot = target.combine(COMBINE_ROWS) / COMBINE_ROWS / target.spec.n_active
                seconds = target.expert if node.kind == "expert" else target.experts
                return sum(u.probability * (seconds(u.rows) + u.rows * per_slot) for u in node.experts)
            case "head":
                return target.head(node.rows)
            case "draft":
                if draft is None:
                    raise BadInput("the plan drafts with a model, but no draft model was given.")
                spec = draft.spec
                # An EAGLE head's linear map runs at its layer's rate.
                more = 1.0 + spec.other_layer_params / (spec.attention_params + spec.expert_params)
                layer = more * draft.dense_layer(node.rows) + draft.over_context(0, node.requests)
                return spec.n_layers * layer + draft.head(len(node.requests))
            case _:
                return 0.0
