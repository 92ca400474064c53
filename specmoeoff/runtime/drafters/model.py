"""A separate small model, wholly in memory, with its own KV cache over the target's page table."""

from collections.abc import Sequence

import numpy as np

from specmoeoff.kernels.cpu import Kernels
from specmoeoff.runtime.kv_cache import PageTable
from specmoeoff.runtime.model import Model, make_rows
from specmoeoff.runtime.pack import PackedModel
from specmoeoff.runtime.sequence import Sequence as TokenSequence
from specmoeoff.runtime.trace import Trace


class ModelDrafter:
    """Drafts greedily, one pass a token. Tokens it has not seen yet are caught up with in the first pass."""

    def __init__(self, packed: PackedModel, kernels: Kernels, pages: PageTable, max_rows: int) -> None:
        if packed.spec.n_experts != 1:
            raise ValueError("the draft model must be dense")
        n_positions = min(packed.spec.max_positions, pages.pages_per_request * 64)
        self._model = Model(packed, kernels, pages.n_pages, n_positions, max_rows)
        self._stack = self._model.stack(packed.load_experts())
        self._pages = pages
        self._kv_tokens = np.zeros(len(pages.table), np.int64)

    def propose(self, sequences: Sequence[TokenSequence], lengths: Sequence[int], trace: Trace) -> list[list[int]]:
        """See Drafter."""
        drafts: list[list[int]] = [[] for _ in sequences]
        live = [i for i, length in enumerate(lengths) if length]
        step = 0
        while live:
            pending = [(sequences[i].tokens + drafts[i])[self._kv_tokens[sequences[i].slot] :] for i in live]
            taken = self._fit([len(p) for p in pending])
            done = self._pass(
                [sequences[i].slot for i in live], [p[:n] for p, n in zip(pending, taken, strict=True)], trace, step
            )
            step += 1
            for i, n, p, token in zip(live, taken, pending, done, strict=True):
                if n == len(p):
                    drafts[i].append(int(token))
            live = [i for i in live if len(drafts[i]) < lengths[i]]
        return drafts

    def _fit(self, counts: list[int]) -> list[int]:
        """How many pending tokens of each sequence fit one pass."""
        room = self._model.work.max_rows - len(counts)
        taken = []
        for count in counts:
            extra = min(count - 1, room)
            room -= extra
            taken.append(1 + extra)
        return taken

    def _pass(self, slots: list[int], tokens: list[list[int]], trace: Trace, step: int) -> np.ndarray:
        model = self._model
        counts = [len(t) for t in tokens]
        rows = make_rows(0, counts, [int(self._kv_tokens[s]) for s in slots], self._pages.table[slots])
        with trace.run(trace.builder.draft(step, rows.requests)):
            model.begin(np.concatenate([np.asarray(t, np.int32) for t in tokens]))
            model.dense_pass(self._stack, rows)
            chosen = model.choose(np.cumsum(counts) - 1)
        self._kv_tokens[slots] += counts
        return chosen

    def roll_back(self, sequence: TokenSequence) -> None:
        """See Drafter."""
        self._kv_tokens[sequence.slot] = min(self._kv_tokens[sequence.slot], sequence.kv_tokens)

    def forget(self, sequence: TokenSequence) -> None:
        """See Drafter."""
        self._kv_tokens[sequence.slot] = 0

    def see(self, sequences: Sequence[TokenSequence], counts: Sequence[int]) -> None:
        """See Drafter."""
