"""How many different experts a window touches, and which are worth holding."""

from collections.abc import Sequence

import numpy as np

FLAT = 1e-3


def probability_used(popularity: np.ndarray, n_requests: float, n_tokens: float, union_exponent: float) -> np.ndarray:
    """P(expert is used) = 1 - (1 - pi)^n for n independent tokens (MoESD eq. 8 with popularity).

    popularity: share of tokens that choose each expert, any shape. Consecutive tokens of one request share experts: w of
    them count as w**union_exponent independent ones.
    """
    n_effective = n_requests * n_tokens**union_exponent
    return 1.0 - (1.0 - np.clip(popularity, 0.0, 1.0)) ** n_effective


def zipf_popularity(n_experts: int, n_active: int, exponent: float = 0.0) -> np.ndarray:
    """(n_experts,) share of tokens that choose each expert, summing to n_active: the top-k of Gumbel-perturbed Zipf
    weights rank**-exponent; 0 is uniform.

    An expert's exponential clock of rate p_i is among the first k with probability integral over u in 0..1 of
    P(fewer than k others rang by -ln(u) / p_i); Gumbel top-k is the same race (Efraimidis and Spirakis 2006).
    """
    if n_active == n_experts:
        return np.ones(n_experts)
    weights = np.arange(1, n_experts + 1) ** -exponent
    nodes, parts = np.polynomial.legendre.leggauss(64)
    rung_s = -np.log((nodes + 1) / 2) / weights[:, None]  # (n_experts, nodes)
    n_others = np.zeros((n_active, *rung_s.shape))  # [m]: P(m others rang before)
    n_others[0] = 1.0
    for other, weight in enumerate(weights):
        rang = 1.0 - np.exp(-weight * rung_s)
        rang[other] = 0.0
        n_others[1:] = n_others[1:] * (1 - rang) + n_others[:-1] * rang
        n_others[0] *= 1 - rang
    chosen = n_others.sum(axis=0) @ parts / 2
    return chosen * (n_active / chosen.sum())


def tokens_to_touch(share: float, n_experts: int, n_active: int) -> float:
    """Tokens of uniform routing after which this share of the experts was used."""
    return float(np.log(1.0 - share) / np.log(1.0 - n_active / n_experts))


def hit_rate(popularity: np.ndarray, n_resident: int) -> float:
    """Share of a layer's expert choices that fall on its n_resident most popular; popularity: (n_experts,)."""
    return float(np.sort(popularity)[::-1][:n_resident].sum() / popularity.sum())


def streamed_bytes(used: np.ndarray, resident: Sequence[int], expert_bytes: int) -> float:
    """Expected bytes of a layer's experts that are used and not resident; used: (n_experts,) from probability_used."""
    return expert_bytes * float(np.delete(used, np.asarray(resident, int)).sum())


def placement_gain(used: np.ndarray, n_resident: int) -> float:
    """By what share of the bytes streamed the most used residents beat random ones: an axis below FLAT is not worth
    searching, since with nearly all experts used only the number of residents matters."""
    at_random = used.sum() * (1 - n_resident / len(used))
    return float(1.0 - np.sort(used)[: len(used) - n_resident].sum() / at_random) if at_random else 0.0


def fit_union_exponent(popularity: np.ndarray, points: Sequence[tuple[int, int, float]]) -> float:
    """The exponent that best explains points (requests, tokens, distinct experts per layer); 1 where nothing tells."""
    known = [(r, w, d) for r, w, d in points if w > 1]
    if not known:
        return 1.0
    grid = np.linspace(0.0, 1.0, 101)

    def error(gamma: float) -> float:
        predicted = [probability_used(popularity, r, w, gamma).sum(axis=-1).mean() for r, w, _ in known]
        return float(sum((p / d - 1.0) ** 2 for p, (_, _, d) in zip(predicted, known, strict=True)))

    return float(min(grid, key=error))


def most_used(used: np.ndarray, n: int) -> list[list[int]]:
    """By layer, the n (layer, expert) places most likely to be used; used: (n_layers, n_experts)."""
    order = np.argsort(-used, axis=None, kind="stable")[:n]
    chosen: list[list[int]] = [[] for _ in used]
    for place in order:
        chosen[place // used.shape[1]].append(int(place % used.shape[1]))
    return [sorted(layer) for layer in chosen]
