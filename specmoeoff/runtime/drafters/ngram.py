"""Prompt lookup: what followed the last few tokens the last time they occurred."""

from collections.abc import Sequence

from specmoeoff.runtime.drafters import Proposal
from specmoeoff.runtime.sequence import Sequence as TokenSequence
from specmoeoff.runtime.trace import Trace

LONGEST, SHORTEST = 4, 2


class NgramIndex:
    """Where every n-gram of a growing text ended last, its end excepted: a lookup takes the same time in any text."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._ends: dict[tuple[int, ...], int] = {}

    def lookup(self, tokens: Sequence[int], length: int) -> list[int]:
        """Up to `length` tokens after the latest earlier occurrence of the longest matching suffix."""
        for end in range(self.n_tokens, len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(tokens[end - n : end])] = end
        self.n_tokens = len(tokens)
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            if after := self._ends.get(tuple(tokens[-n:])):
                return list(tokens[after : after + length])
        return []


class NgramDrafter:
    """Costs nothing but a lookup. An index per place of the batch."""

    def __init__(self) -> None:
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, sequences: Sequence[TokenSequence], lengths: Sequence[int], trace: Trace) -> list[Proposal]:
        """See Drafter."""
        return [
            Proposal(self._indices.setdefault(s.slot, NgramIndex()).lookup(s.tokens, n) if n > 0 else [])
            for s, n in zip(sequences, lengths, strict=True)
        ]

    def roll_back(self, sequence: TokenSequence) -> None:
        """See Drafter. Only a sequence taken back by `rewind` has fewer tokens than were indexed."""
        index = self._indices.get(sequence.slot)
        if index and index.n_tokens > len(sequence.tokens):
            self.forget(sequence)

    def forget(self, sequence: TokenSequence) -> None:
        """See Drafter."""
        self._indices.pop(sequence.slot, None)

    def see(self, sequences: Sequence[TokenSequence], counts: Sequence[int]) -> None:
        """See Drafter."""
