"""How many different experts a window touches, and which are worth holding."""

from collections.abc import Sequence

import numpy as np


def probability_used(popularity: np.ndarray, n_requests: float, n_tokens: float, union_exponent: float) -> np.ndarray:
    """P(expert is used) = 1 - (1 - pi)^n for n independent tokens (MoESD eq. 8 with popularity).

    popularity: share of tokens that choose each expert, any shape. Consecutive tokens of one request share experts: w of
    them count as w**union_exponent independent ones.
    """
    n_effective = n_requests * n_tokens**union_exponent
    return 1.0 - (1.0 - np.clip(popularity, 0.0, 1.0)) ** n_effective


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
