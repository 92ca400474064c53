"""Tokens per round of greedy speculative decoding. k drafted, k+1 verified, 1..k+1 emitted."""

from collections.abc import Sequence

from specmoeoff.errors import BadInput


def expected_tokens(conditional: Sequence[float], draft_length: int) -> float:
    """E[t] = 1 + sum over i of the product of the first i conditional acceptance rates (Leviathan et al. 2023, eq. 1,
    with a rate per position). Raises BadInput where the acceptance table is shorter than the draft."""
    if draft_length > len(conditional):
        raise BadInput(
            f"acceptance is known for {len(conditional)} draft tokens, {draft_length} were asked for; "
            "measure the workload with more requests."
        )
    total, reached = 1.0, 1.0
    for rate in conditional[:draft_length]:
        reached *= rate
        total += reached
    return total


def all_accepted(conditional: Sequence[float], draft_length: int) -> float:
    """Probability that a whole draft stands."""
    reached = 1.0
    for rate in conditional[:draft_length]:
        reached *= rate
    return reached
