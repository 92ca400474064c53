"""A separate small model, wholly in memory, with its own KV cache over the target's page table."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from specmoeoff.kernels.cpu import PAGE_TOKENS, Kernels
from specmoeoff.pipeline import RequestTokens
from specmoeoff.runtime.drafters import Proposal
from specmoeoff.runtime.kv_cache import PageTable
from specmoeoff.runtime.model import Model
from specmoeoff.runtime.pack import PackedModel
from specmoeoff.runtime.rows import make_rows
from specmoeoff.runtime.sampling import Purpose, distribution, draw, uniforms
from specmoeoff.runtime.sequence import Sequence as TokenSequence
from specmoeoff.runtime.trace import Trace


class Passes(Protocol):
    """A dense model over live requests, with room for `max_rows` tokens a pass."""

    max_rows: int
    vocab: int

    def run(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], kv_tokens: Sequence[int], logits: np.ndarray | None
    ) -> np.ndarray:
        """The most likely token after the last of each request's new `tokens`, which follow kv_tokens known ones; logits
        (n, vocab) float32 of the same rows if wanted."""


class HostPasses:
    """On the CPU, over the target's pages."""

    def __init__(self, packed: PackedModel, kernels: Kernels, pages: PageTable, max_rows: int) -> None:
        if packed.spec.n_experts != 1:
            raise ValueError("the draft model must be dense")
        n_positions = min(packed.spec.max_positions, pages.pages_per_request * PAGE_TOKENS)
        self._model = Model(packed, kernels, pages.n_pages, n_positions, max_rows)
        self._stack = self._model.stack([{0: expert} for expert in packed.load_experts()])
        self._pages, self.max_rows, self.vocab = pages, max_rows, packed.spec.vocab

    def run(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], kv_tokens: Sequence[int], logits: np.ndarray | None
    ) -> np.ndarray:
        """See Passes."""
        counts = [len(t) for t in tokens]
        self._model.begin(np.concatenate([np.asarray(t, np.int32) for t in tokens]))
        rows = make_rows(0, counts, kv_tokens, self._pages.table[slots])
        self._model.layers(self._stack, [rows])
        return self._model.choose(np.cumsum(counts) - 1, logits)


class ModelDrafter:
    """Drafts one token a pass, as the request samples: its most likely one, or one drawn from its own distribution.

    Tokens it has not seen yet are caught up with in the first pass.
    """

    def __init__(self, passes: Passes, n_slots: int) -> None:
        self._passes = passes
        self._kv_tokens = np.zeros(n_slots, np.int64)

    def propose(self, sequences: Sequence[TokenSequence], lengths: Sequence[int], trace: Trace) -> list[Proposal]:
        """See Drafter."""
        drafts: list[list[int]] = [[] for _ in sequences]
        q: list[list[np.ndarray]] = [[] for _ in sequences]
        live = [i for i, length in enumerate(lengths) if length > 0]
        step = 0
        while live:
            pending = [(sequences[i].tokens + drafts[i])[self._kv_tokens[sequences[i].slot] :] for i in live]
            taken = self._fit([len(p) for p in pending])
            complete = [i for i, n, p in zip(live, taken, pending, strict=True) if n == len(p)]
            logits = (
                np.empty((len(live), self._passes.vocab), np.float32)
                if any(not sequences[i].request.sampling.greedy for i in complete)
                else None
            )
            slots = [sequences[i].slot for i in live]
            chosen = self._pass(slots, [p[:n] for p, n in zip(pending, taken, strict=True)], logits, trace, step)
            step += 1
            for row, i in enumerate(live):
                sampling = sequences[i].request.sampling
                if i not in complete:
                    continue
                if logits is None or sampling.greedy:
                    drafts[i].append(int(chosen[row]))
                else:
                    position = len(sequences[i].tokens) + len(drafts[i])
                    q[i].append(distribution(logits[row : row + 1], sampling)[0])
                    drafts[i].append(int(draw(q[i][-1], uniforms(sampling.seed, position, 1)[0, Purpose.DRAFT])))
            live = [i for i in live if len(drafts[i]) < lengths[i]]
        return [Proposal(tokens, np.stack(each) if each else None) for tokens, each in zip(drafts, q, strict=True)]

    def _fit(self, counts: list[int]) -> list[int]:
        """How many pending tokens of each sequence fit one pass."""
        room = self._passes.max_rows - len(counts)
        taken = []
        for count in counts:
            extra = min(count - 1, room)
            room -= extra
            taken.append(1 + extra)
        return taken

    def _pass(
        self, slots: list[int], tokens: list[list[int]], logits: np.ndarray | None, trace: Trace, step: int
    ) -> np.ndarray:
        counts, known = [len(t) for t in tokens], [int(self._kv_tokens[s]) for s in slots]
        with trace.run(trace.builder.draft(step, tuple(map(RequestTokens, counts, known)))):
            chosen = self._passes.run(slots, tokens, known, logits)
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
