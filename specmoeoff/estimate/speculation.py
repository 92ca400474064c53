"""Tokens per round of greedy speculative decoding, and whether drafting pays. k drafted, k+1 verified, 1..k+1 emitted."""

from collections.abc import Sequence
from statistics import fmean

from specmoeoff.errors import BadInput

TAIL = 8  # of the longest places known, whose mean rate goes on where a run of hits is longer


def expected_tokens(conditional: Sequence[float], draft_length: int, of_text: bool = False) -> float:
    """E[t] = 1 + sum over i of the product of the first i conditional acceptance rates (Leviathan et al. 2023, eq. 1,
    with a rate per position). Raises BadInput where the acceptance table is shorter than the draft.

    of_text: whether a token is hit depends on the text before it alone, as with a greedy draft model. The text is then runs
    of hits, each ended by a miss, whatever is drafted; conditional[i] is how often a run of i goes on. A run of r yields
    r + 1 tokens in floor(r / (k+1)) + 1 rounds, since a whole draft's extra token is one of the run; the expectation of one
    over the other is E[t]. Of equal rates both formulas say the same; where long runs are the likeliest to go on, rounds
    that begin amid a run gain more than the first formula knows of.
    """
    if draft_length > len(conditional):
        raise BadInput(
            f"acceptance is known for {len(conditional)} draft tokens, {draft_length} were asked for; "
            "measure the workload with more requests."
        )
    if of_text and draft_length:
        return (1.0 + _runs_of(conditional, 1, 1)) / (1.0 + _runs_of(conditional, draft_length + 1, draft_length + 1))
    return 1.0 + sum(all_accepted(conditional, i) for i in range(1, draft_length + 1))


def all_accepted(conditional: Sequence[float], draft_length: int, of_text: bool = False) -> float:
    """Probability that a whole draft stands; of_text: as `expected_tokens` has it."""
    if of_text and draft_length:
        period = draft_length + 1
        return _runs_of(conditional, draft_length, period) / (1.0 + _runs_of(conditional, period, period))
    reached = 1.0
    for rate in conditional[:draft_length]:
        reached *= rate
    return reached


def _runs_of(conditional: Sequence[float], first: int, step: int) -> float:
    """Sum over n = first, first + step, ... of the probability that a run of hits has n or more."""
    known, total, n = len(conditional), 0.0, first
    while n <= known:
        total += all_accepted(conditional, n)
        n += step
    on = min(fmean(conditional[-TAIL:]), 1 - 1e-9)
    return total + all_accepted(conditional, known) * on ** (n - known) / (1.0 - on**step)


def tokens_per_round_to_the_end(conditional: Sequence[float], draft_length: int, output_tokens: int) -> float:
    """Mean tokens per round over a whole answer, whose last rounds draft no more than min(k, remaining - 1)."""
    rounds = [0.0]  # rounds[n]: expected rounds until n tokens are emitted
    for remaining in range(1, output_tokens + 1):
        k = min(draft_length, remaining - 1)
        stands = [all_accepted(conditional, i) for i in range(k + 1)] + [0.0]
        rounds.append(1.0 + sum((stands[i] - stands[i + 1]) * rounds[remaining - i - 1] for i in range(k + 1)))
    return output_tokens / rounds[-1]


def verified_share(conditional: Sequence[float], draft_length: int) -> float:
    """Of the k+1 verified positions, the share emitted: sigma of MoESD (arXiv 2505.19645, eq. 5)."""
    return expected_tokens(conditional, draft_length) / (draft_length + 1)


def utility(tokens: Sequence[float], window_s: Sequence[float]) -> list[float]:
    """By draft length, from k = 0: tokens gained over time spent, both against k = 0 (Cascade, arXiv 2506.20675)."""
    return [t / tokens[0] * window_s[0] / s for t, s in zip(tokens, window_s, strict=True)]


def best_length(tokens: Sequence[float], window_s: Sequence[float]) -> int:
    """The k of the highest utility; 0 where none is above 1."""
    found = utility(tokens, window_s)
    return max(range(len(found)), key=lambda k: (found[k], -k))


def moesd_speedup(sigma: float, draft_length: int, draft_s: float, verify_s: float, plain_s: float) -> float:
    """Over plain decoding: sigma (k+1) / (k T_D/T_T(1) + T_T(k)/T_T(1)), rejection's time within verify_s (MoESD, sec. 3).

    draft_s: one draft step; verify_s, plain_s: the target with k+1 tokens and with one.
    """
    return sigma * (draft_length + 1) * plain_s / (draft_length * draft_s + verify_s)
