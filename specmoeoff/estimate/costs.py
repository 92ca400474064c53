"""Prices of the graph's nodes from a measured profile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specmoeoff.errors import BadInput
from specmoeoff.estimate.memory import expert_stride
from specmoeoff.estimate.tables import GROUP, OperatorTimes, find_table, has_table, layer_operators, wake_s
from specmoeoff.pipeline import ExpertUse, Graph, Node, RequestTokens
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.profile import HardwareProfile

MEMORY_ROWS, COMPUTE_ROWS = 4.0, 64.0
# The interpreter's between two nodes, its code and data swept from the caches by weights: windows of all-resident plans of the
# demo less their nodes, 37 to 58 us a node on an EPYC of 2025 (batches 4 to 16, k = 0 to 5). A draft step begins with much more.
NODE_GAP_S, DRAFT_START_S = 45e-6, 0.4e-3
COMBINE_ROWS = 64  # the combination of a layer is shared out over its experts at this size's cost


@dataclass(frozen=True)
class Calibration:
    """What was measured just now, in place of the profile's: disk rate, and operator times over the profile's for few
    rows, where memory is the limit, and for many, where arithmetic is; of a draft model by itself, where measured."""

    disk_gb_per_s: float
    memory_scale: float = 1.0
    compute_scale: float = 1.0
    draft_scale: float | None = None

    def scale(self, rows: float) -> float:
        """For operators on `rows` tokens: between both ends on the logarithm of rows."""
        share = min(1.0, max(0.0, math.log(max(rows, 1.0) / MEMORY_ROWS) / math.log(COMPUTE_ROWS / MEMORY_ROWS)))
        return self.memory_scale + share * (self.compute_scale - self.memory_scale)


class ModelTimes:
    """The operators of one model's shape, while the disk runs at this share of its full speed."""

    def __init__(self, profile: HardwareProfile, spec: ModelSpec, n_threads: int, disk_share: float) -> None:
        def table(operator: str) -> OperatorTimes:
            return find_table(profile, operator, spec.shape_key, n_threads, disk_share)

        self.spec, self.head = spec, table("head")
        self.layers = [layer_operators(spec, layer) for layer in range(spec.n_layers)]
        self._attention = {name: table(name) for name in {attention for _, attention in self.layers}}
        if spec.n_experts == 1:
            self.dense_layer = table("dense_layer")
        self._combine, self._expert, self._experts = table("combine"), table("expert"), table("experts")
        blocks = {block for block, _ in self.layers}
        self._block = {name: table(name) for name in blocks}
        # In a run of layers that are all in memory; not measured by early versions.
        self._run_block, self._run_experts = self._block, None
        if has_table(profile, "layers.experts", spec.shape_key, n_threads):
            self._run_block = {name: table(f"layers.{name}") for name in blocks}
            self._run_experts = table("layers.experts")

    def block(self, layer: int, rows: float, in_run: bool) -> float:
        """One layer's attention block, with nothing in the KV cache; `in_run`: in a call of layers that are all in memory."""
        name = self.layers[layer][0]
        alone = self._block[name](rows)
        return min(alone, self._run_block[name](rows)) if in_run else alone  # the same work less the calls

    def experts(self, uses: Sequence[ExpertUse], in_run: bool) -> float:
        """Experts in memory in one call, and their rows' share in the combination.

        Of a call with one and a call with GROUP experts both the time of a call and that of one more expert are known.
        """
        calls = more = run = 0.0
        for use in uses:
            one, of_group = self._expert(use.rows), self._experts(use.rows)
            one_more = max(0.0, (GROUP * of_group - one) / (GROUP - 1))
            calls += use.probability * max(0.0, one - one_more)
            more += use.probability * (one_more + use.rows * self._per_slot())
            run += use.probability * self._run_experts(use.rows) if self._run_experts else 0.0
        nobody = math.prod(1.0 - use.probability for use in uses)
        alone = more + (1.0 - nobody) * calls / max(sum(use.probability for use in uses), 1e-9)
        return min(alone, run) if in_run and self._run_experts else alone

    def streamed_expert(self, rows: float) -> float:
        """An expert that was waited for on so many rows, and their share in the combination."""
        return self._expert(rows) + rows * self._per_slot()

    def _per_slot(self) -> float:
        return self._combine(COMBINE_ROWS) / COMBINE_ROWS / self.spec.n_active

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
        streamed = {node.layer for node in window if node.kind == "load"}
        # While drafts are made, what is prefetched lies in its slots already, and no router has asked for more.
        return [
            self._load_s
            if node.lane == "disk"
            else self._price(node, bool(streamed) and node.kind != "draft", node.layer not in streamed)
            for node in window
        ] * len(graph.ends)

    def compute_floor(self, graph: Graph) -> tuple[float, float]:
        """Seconds of drafting, and of everything on the compute lane, whatever is resident and whatever runs beside."""
        lane = [(node.kind, self._price(node, False, True)) for node in graph.nodes if node.lane == "cpu"]
        return sum(s for kind, s in lane if kind == "draft"), sum(s for _, s in lane)

    def _price(self, node: Node, streams: bool, in_run: bool) -> float:
        uses = tuple([(u.rows, u.probability) for u in node.experts])
        key = (
            streams,
            in_run,
            node.kind,
            self._times[streams][0].layers[node.layer],
            node.rows,
            uses,
            len(node.requests),
            node.requests[0].context if node.requests else 0,
        )
        if key not in self._memo:
            rows = max((u.rows for u in node.experts), default=node.rows)
            speed = self._calibration
            scale = speed.draft_scale if node.kind == "draft" and speed.draft_scale else speed.scale(rows)
            self._memo[key] = self._operator(node, in_run, *self._times[streams]) * scale
        return self._memo[key]

    def _operator(self, node: Node, in_run: bool, target: ModelTimes, draft: ModelTimes | None = None) -> float:
        match node.kind:
            case "attention":
                over_context = target.over_context(node.layer, node.requests)
                return target.block(node.layer, node.rows, in_run) + over_context
            case "experts":
                return target.experts(node.experts, in_run)
            case "expert":
                return sum(u.probability * target.streamed_expert(u.rows) for u in node.experts)
            case "head":
                return target.head(node.rows)
            case "draft":
                if draft is None:
                    raise BadInput("the plan drafts with a model, but no draft model was given.")
                spec = draft.spec
                # An EAGLE head's linear map runs at its layer's rate.
                more = 1.0 + spec.other_layer_params / (spec.attention_params + spec.expert_params)
                layer = more * draft.dense_layer(node.rows) + draft.over_context(0, node.requests)
                return DRAFT_START_S + spec.n_layers * layer + draft.head(len(node.requests))
            case _:
                return 0.0
