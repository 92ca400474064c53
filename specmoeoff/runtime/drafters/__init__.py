"""Who proposes the next tokens. One small interface; a drafter never changes what is emitted, only how fast."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specmoeoff.runtime.sequence import Sequence as TokenSequence
from specmoeoff.runtime.trace import Trace


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens, and the distributions (k, vocab) they were drawn from; None if they were chosen, not drawn."""

    tokens: list[int]
    q: np.ndarray | None = None


class Drafter(Protocol):
    """Proposes tokens for a batch; after verification it is told to roll back to what was accepted."""

    def see(self, sequences: Sequence[TokenSequence], counts: Sequence[int]) -> None:
        """The target has run a pass: counts[i] rows of sequences[i], after its kv_tokens."""

    def propose(self, sequences: Sequence[TokenSequence], lengths: Sequence[int], trace: Trace) -> list[Proposal]:
        """At most lengths[i] tokens that may follow sequences[i]."""

    def roll_back(self, sequence: TokenSequence) -> None:
        """Keep only state about the sequence's real tokens."""

    def forget(self, sequence: TokenSequence) -> None:
        """The sequence gives up its slot, which will be somebody else's; it may come back in another."""
