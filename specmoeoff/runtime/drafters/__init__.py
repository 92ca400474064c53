"""Who proposes the next tokens. One small interface; a drafter never changes what is emitted, only how fast."""

from collections.abc import Sequence
from typing import Protocol

from specmoeoff.runtime.sequence import Sequence as TokenSequence
from specmoeoff.runtime.trace import Trace


class Drafter(Protocol):
    """Proposes tokens for a batch; after verification it is told to roll back to what was accepted."""

    def see(self, sequences: Sequence[TokenSequence], counts: Sequence[int]) -> None:
        """The target has run a pass: counts[i] rows of sequences[i], after its kv_tokens."""

    def propose(self, sequences: Sequence[TokenSequence], lengths: Sequence[int], trace: Trace) -> list[list[int]]:
        """At most lengths[i] tokens that may follow sequences[i]."""

    def roll_back(self, sequence: TokenSequence) -> None:
        """Keep only state about the sequence's real tokens."""

    def forget(self, sequence: TokenSequence) -> None:
        """The sequence has ended; its slot will be somebody else's."""
