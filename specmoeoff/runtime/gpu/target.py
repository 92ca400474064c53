"""The target model of an engine on a machine with a GPU: what the engine asks of an Executor and of an ExpertStore."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from specmoeoff.errors import BadInput
from specmoeoff.runtime.gpu.device import Device
from specmoeoff.runtime.gpu.execute import GpuExecutor, Placement, Room
from specmoeoff.runtime.gpu.weights import GpuWeights
from specmoeoff.runtime.kv_cache import PageTable
from specmoeoff.runtime.rows import Rows
from specmoeoff.runtime.trace import Trace
from specmoeoff.specs.plan import PlanDecode, PlanExperts, PlanGpu


def near_slots(gpu: PlanGpu | None, batch: int) -> int:
    """Places whose requests have their KV cache in GPU memory."""
    return round(gpu.kv_share * batch) if gpu else 0


class NoStore:
    """Of a machine whose experts all lie in host or GPU memory: nothing is read from disk."""

    bytes_planned, busy_s, n_slots = 0, 0.0, 0
    bucket = SimpleNamespace(gb_per_s=None)

    def quiesce(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """Nothing is open."""


class GpuTarget:
    """See Executor. The placement and the micro-batches are those it was made with."""

    def __init__(
        self,
        weights: GpuWeights,
        device: Device,
        decode: PlanDecode,
        experts: PlanExperts,
        pages: PageTable,
        max_rows: int,
        n_threads: int,
    ) -> None:
        spec = self._spec = weights.spec
        self._experts = experts
        on_host = experts.on_host or ((),) * spec.n_layers
        placement = Placement(experts.resident, on_host, not any(experts.prefetch))
        # The engine's parts are about equal: one request, at its edge, can make one larger.
        largest = max(decode.draft_length + 1, decode.prefill_chunk_tokens)
        room = Room(
            max_rows,
            min(max_rows, -(-max_rows // decode.micro_batches) + largest),
            decode.batch,
            pages.pages_per_request,
            pages.n_near_pages,
            pages.n_pages - 1 - pages.n_near_pages,
            min(spec.max_positions, decode.context_tokens),
        )
        self._runs = GpuExecutor(weights, device, placement, room, decode.micro_batches, n_threads, timed=True)
        self.model = self._runs.model
        self.experts_used = float(np.mean([spec.n_experts - len(layer) for layer in on_host]))
        self.uses: list[dict[int, int]] = []  # routing stays on the GPU
        self.routing_log: list[np.ndarray] | None = None
        self.failed_rows: dict[int, Exception] = {}

    def place(self, experts: PlanExperts) -> None:
        """See Executor: only what it was made with."""
        if experts != self._experts:
            raise BadInput("experts cannot be placed anew while a GPU's lanes run; open the engine anew.")

    def idle(self) -> None:
        """See Executor."""
        self._runs.lanes.drain()

    def read_ahead(self, window: int) -> None:
        """See Executor: the graph does it."""

    def forward(self, window: int, tokens: np.ndarray, micro_batches: Sequence[Rows], trace: Trace) -> None:
        """See Executor; enqueued, not waited for."""
        self._runs.forward(tokens, micro_batches)

    def busy_s(self, trace: Trace) -> tuple[dict[str, float], dict[str, float]]:
        """See Executor."""
        return self._runs.busy_s()

    def choose(self, rows: np.ndarray, logits: np.ndarray | None = None) -> np.ndarray:
        """See Model."""
        return self._runs.choose(rows, logits)

    def features(self, n_rows: int) -> np.ndarray:
        """See Model; they stay valid."""
        return self._runs.features(np.arange(n_rows))
