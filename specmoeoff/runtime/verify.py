"""Greedy acceptance: lossless by construction, since every emitted token is the target's own argmax."""

from collections.abc import Sequence


def accept(drafted: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafted tokens stand. chosen[i] is the target's token after i drafted ones, (len(drafted) + 1,)."""
    for count, token in enumerate(drafted):
        if token != chosen[count]:
            return count
    return len(drafted)
