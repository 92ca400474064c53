"""Prompt lookup: what followed the last few tokens the last time they occurred."""

from collections.abc import Sequence

from specmoeoff.runtime.sequence import Sequence as TokenSequence
from specmoeoff.runtime.trace import Trace

LONGEST, SHORTEST = 4, 2


def lookup(tokens: Sequence[int], length: int) -> list[int]:
    """Up to `length` tokens after the latest earlier occurrence of the longest matching suffix."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        suffix = list(tokens[-n:])
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start] == suffix[0] and list(tokens[start : start + n]) == suffix:
                return list(tokens[start + n : start + n + length])
    return []


class NgramDrafter:
    """Costs nothing but a search; keeps no state."""

    def propose(self, sequences: Sequence[TokenSequence], lengths: Sequence[int], trace: Trace) -> list[list[int]]:
        """See Drafter."""
        return [lookup(s.tokens, n) if n else [] for s, n in zip(sequences, lengths, strict=True)]

    def roll_back(self, sequence: TokenSequence) -> None:
        """See Drafter."""

    def forget(self, sequence: TokenSequence) -> None:
        """See Drafter."""

    def see(self, sequences: Sequence[TokenSequence], counts: Sequence[int]) -> None:
        """See Drafter."""
