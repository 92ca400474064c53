"""A draft model or an EAGLE head on a machine with a GPU: its weights in GPU memory, its KV cache split by request between there and
the host."""

from collections.abc import Sequence

import numpy as np

from specmoeoff.runtime.gpu.device import Device
from specmoeoff.runtime.gpu.execute import GpuExecutor, Placement, Room
from specmoeoff.runtime.gpu.model import GpuModel
from specmoeoff.runtime.gpu.weights import GpuWeights
from specmoeoff.runtime.kv_cache import pages_for
from specmoeoff.runtime.rows import Rows, make_rows
from specmoeoff.specs.plan import PlanDecode

PARTS = 2  # requests whose KV is in GPU memory, and the others: while the CPU attends for these, the GPU computes those


class GpuPasses:
    """See Passes. It has lanes of its own, beside which the link goes on with the target's experts. Requests in the first `n_near`
    places have their draft KV in GPU memory; every place owns pages for a whole context, so nothing ever moves. `target`: see
    GpuModel."""

    def __init__(
        self,
        weights: GpuWeights,
        device: Device,
        decode: PlanDecode,
        n_near: int,
        max_rows: int,
        n_threads: int,
        target: GpuModel | None = None,
    ) -> None:
        spec, batch, per_request = weights.spec, decode.batch, pages_for(decode.context_tokens)
        self.max_rows, self.vocab, self._n_near = max_rows, spec.vocab, n_near
        self._table = 1 + np.arange(batch * per_request, dtype=np.int32).reshape(batch, per_request)
        pages = n_near * per_request, (batch - n_near) * per_request
        room = Room(max_rows, max_rows, batch, per_request, *pages, decode.context_tokens)
        placement = Placement(((0,),) * spec.n_layers, ((),) * spec.n_layers, on_demand=False)
        self.runs = GpuExecutor(weights, device, placement, room, PARTS, n_threads, target=target)

    def run(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], kv_tokens: Sequence[int], logits: np.ndarray | None
    ) -> np.ndarray:
        """See Passes."""
        return self.runs.choose(self.forward(slots, tokens, kv_tokens), logits)

    def forward(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        kv_tokens: Sequence[int],
        features: Sequence[np.ndarray] = (),
    ) -> np.ndarray:
        """All layers over each request's new tokens, and features of an EAGLE head; the row of each one's last."""
        near = [i for i, slot in enumerate(slots) if slot < self._n_near]
        far = [i for i, slot in enumerate(slots) if slot >= self._n_near]
        parts: list[Rows] = []
        for members in filter(None, (near, far)):
            first, counts = parts[-1].last if parts else 0, [len(tokens[i]) for i in members]
            pages = self._table[[slots[i] for i in members]]
            n_near = len(members) if members is near else 0
            parts.append(make_rows(first, counts, [kv_tokens[i] for i in members], pages, n_near))
        order = [*near, *far]
        given = np.concatenate([features[i] for i in order]) if features else None
        self.runs.forward(np.concatenate([np.asarray(tokens[i], np.int32) for i in order]), parts, given)
        last = np.empty(len(order), np.int64)
        last[order] = np.cumsum([len(tokens[i]) for i in order]) - 1
        return last


class GpuEagle:
    """See EaglePasses. `target`: whose embedding and output matrix it shares."""

    def __init__(
        self,
        weights: GpuWeights,
        target: GpuModel,
        decode: PlanDecode,
        n_near: int,
        max_rows: int,
        n_threads: int,
    ) -> None:
        self._passes = GpuPasses(weights, target.device, decode, n_near, max_rows, n_threads, target)
        self.max_rows = max_rows

    def run(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        features: Sequence[np.ndarray],
        kv_tokens: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See EaglePasses."""
        last, runs = self._passes.forward(slots, tokens, kv_tokens, features), self._passes.runs
        return runs.choose(last), runs.features(last)
