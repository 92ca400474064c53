"""Plain decoding."""

from collections.abc import Sequence

from specmoeoff.runtime.drafters import Proposal
from specmoeoff.runtime.sequence import Sequence as TokenSequence
from specmoeoff.runtime.trace import Trace


class NoDrafter:
    """Proposes nothing."""

    def propose(self, sequences: Sequence[TokenSequence], lengths: Sequence[int], trace: Trace) -> list[Proposal]:
        """See Drafter."""
        return [Proposal([]) for _ in sequences]

    def roll_back(self, sequence: TokenSequence) -> None:
        """See Drafter."""

    def forget(self, sequence: TokenSequence) -> None:
        """See Drafter."""

    def see(self, sequences: Sequence[TokenSequence], counts: Sequence[int]) -> None:
        """See Drafter."""
