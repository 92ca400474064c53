"""Prices of the graph's nodes from a measured profile."""

from collections.abc import Sequence
from dataclasses import dataclass

from specmoeoff.errors import BadInput
from specmoeoff.estimate.tables import OperatorTimes, find_table
from specmoeoff.pipeline import Graph, Node, RequestTokens
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile

COMBINE_ROWS = 64  # the combination of a layer is shared out over its experts at this size's cost


@dataclass(frozen=True)
class Calibration:
    """What was measured just now, in place of the profile's: disk rate, and operator times over the profile's."""

    disk_gb_per_s: float
    compute_scale: float = 1.0


class ModelTimes:
    """The operator tables of one model's shape."""

    def __init__(self, profile: HardwareProfile, spec: ModelSpec, n_threads: int) -> None:
        def table(operator: str) -> OperatorTimes:
            return find_table(profile, operator, spec.shape_key, n_threads)

        self.spec = spec
        self.block, self.context = table("attention_block"), table("attention")
        self.expert, self.combine, self.head = table("expert"), table("combine"), table("head")

    def attention(self, requests: Sequence[RequestTokens]) -> float:
        """One layer's attention block over a ragged batch."""
        n = len(requests)
        rows = sum(r.n_tokens for r in requests)
        mean_context = sum(r.context + r.n_tokens for r in requests) / n
        return self.block(rows) + n * self.context(rows / n, mean_context)


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
        self._target = ModelTimes(profile, spec, n_threads)
        self._draft = ModelTimes(profile, draft, n_threads) if draft else None
        measured = calibration.disk_gb_per_s if calibration else profile.disk.read_gb_per_s.value  # type: ignore[union-attr]
        self.disk_gb_per_s = min(measured, disk_limit_gb_per_s or measured)
        self.stride = -(-spec.expert_bytes // 4096) * 4096
        self._load_s = self.stride / (self.disk_gb_per_s * 1e9)
        self._scale = calibration.compute_scale if calibration else 1.0
        beside = profile.cpu_slowdown_beside_disk
        self._beside_disk = beside.value if beside else 1.0
        self._memo: dict[tuple[object, ...], float] = {}

    def seconds(self, graph: Graph) -> list[float]:
        """Of every node; a load's is that of the whole expert."""
        streams = any(node.kind == "load" for node in graph.nodes)
        scale = self._scale * (self._beside_disk if streams else 1.0)
        return [self._load_s if node.lane == "disk" else scale * self._price(node) for node in graph.nodes]

    def _price(self, node: Node) -> float:
        uses = tuple((u.rows, u.probability) for u in node.experts)
        key = (node.kind, node.rows, uses, len(node.requests), node.requests[0].context if node.requests else 0)
        if key not in self._memo:
            self._memo[key] = self._operator(node)
        return self._memo[key]

    def _operator(self, node: Node) -> float:
        target = self._target
        match node.kind:
            case "attention":
                return target.attention(node.requests)
            case "experts" | "expert":
                per_slot = target.combine(COMBINE_ROWS) / COMBINE_ROWS / target.spec.n_active
                return sum(u.probability * (target.expert(u.rows) + u.rows * per_slot) for u in node.experts)
            case "head":
                return target.head(node.rows)
            case "draft":
                return self._draft_step(node)
            case _:
                return 0.0

    def _draft_step(self, node: Node) -> float:
        times = self._draft
        if times is None:
            raise BadInput("the plan drafts with a model, but no draft model was given.")
        rows = node.rows
        layer = times.attention(node.requests) + times.expert(rows) + times.combine(rows)
        return times.spec.n_layers * layer + times.head(len(node.requests))
