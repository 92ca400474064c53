"""Acceptance of drafted tokens: lossless, greedy and sampled.

Greedy, every emitted token is the target's own argmax. Sampled, accepting with min(1, p / q) and drawing from the residual
max(p - q, 0) on rejection leaves the target's distribution p whatever the drafter's q is (Leviathan et al. 2023, section
2.3 and appendix A.1).
"""

from collections.abc import Sequence

import numpy as np

from specmoeoff.runtime.sampling import Purpose, draw


def accept(drafted: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafted tokens stand. chosen[i] is the target's token after i drafted ones, (len(drafted) + 1,)."""
    for count, token in enumerate(drafted):
        if token != chosen[count]:
            return count
    return len(drafted)


def verify_sampled(
    p: np.ndarray, q: np.ndarray | None, drafted: np.ndarray, uniform: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many drafted tokens stand (...), and the target's own next token (...).

    p (..., k + 1, vocab): the target's distributions; q (..., k, vocab): those that drafted (..., k) were drawn from, None
    where the drafter was certain of each; uniform (..., k + 1, 4) by Purpose.
    """
    k = drafted.shape[-1]
    at = drafted[..., None]
    if q is None:
        q = np.zeros_like(p[..., :k, :])
        np.put_along_axis(q, at, 1.0, axis=-1)
    p_drafted, q_drafted = (np.take_along_axis(part, at, axis=-1)[..., 0] for part in (p[..., :k, :], q))
    stands = uniform[..., :k, Purpose.ACCEPT] * q_drafted < p_drafted
    n_accepted = np.logical_and.accumulate(stands, axis=-1).sum(axis=-1)

    def at_end(values: np.ndarray) -> np.ndarray:
        """(..., n, m) at row n_accepted, (..., m)."""
        return np.take_along_axis(values, n_accepted[..., None, None], axis=-2)[..., 0, :]

    target = at_end(p)
    rest = residual(target, at_end(np.concatenate([q, np.zeros_like(p[..., :1, :])], axis=-2)))
    return n_accepted, draw(rest, at_end(uniform)[..., Purpose.CHOOSE])


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """max(p - q, 0), up to its total: what a rejected token is drawn from; p (..., vocab) after k accepted ones, where q is 0."""
    rest = np.maximum(p - q, 0)
    # p and q that differ by rounding only leave nothing
    return np.where(rest.any(axis=-1, keepdims=True), rest, p)
