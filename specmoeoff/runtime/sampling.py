"""What a request asks of its tokens: the distribution they come from, and the random numbers that draw them."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. top_k = 0, top_p = 1 and min_p = 0 filter nothing. ValueError names a field out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("temperature", 0 <= self.temperature <= 100, "0 (greedy) to 100"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", 0 <= self.seed < 1 << 64, "0 to 2^64 - 1"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


GREEDY = Sampling()


class Purpose(IntEnum):
    """The random numbers of one position: each has one use."""

    ACCEPT, CHOOSE, DRAFT = range(3)


def uniforms(seed: int, position: int, n: int) -> np.ndarray:
    """Random numbers in [0, 1) for positions position..position + n - 1 of a request, (n, 4) float64 by Purpose.

    Philox (Salmon et al. 2011) counts by position: they depend on the seed and the position, on nothing else.
    """
    raw = np.random.Philox(key=seed, counter=position).random_raw(4 * n).reshape(n, 4)
    # 52 bits, so that a number times any total stays below that total when rounded.
    return (raw >> np.uint64(12)) * 2.0**-52


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits (..., vocab), float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities of the next token, (n, vocab) float64, from logits (n, vocab).

    Temperature, top-k, top-p, min-p in this order, each over what the one before left, as transformers' logits processors
    do. A row depends on its own logits only.
    """
    return np.stack([_filtered(row.astype(np.float64) / sampling.temperature, sampling) for row in logits])


def _filtered(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    n = len(logits)
    if 0 < sampling.top_k < n:
        logits = np.where(logits < np.partition(logits, n - sampling.top_k)[n - sampling.top_k], -np.inf, logits)
    p = softmax(logits)
    if sampling.top_p < 1:
        # Tokens below this bound cannot fill 1 - top_p together, so all of them go and need no sorting.
        rare = p < (1 - sampling.top_p) / n
        likely = np.flatnonzero(~rare)
        ascending = likely[np.argsort(p[likely], kind="stable")]
        below = p[rare].sum() + np.cumsum(p[ascending]) <= 1 - sampling.top_p
        below[-1] = False
        p[rare] = p[ascending[below]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return np.asarray(p / p.sum())


def draw(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Tokens by inverse CDF: weights (..., vocab) of any positive total, uniform (...) in [0, 1)."""
    cumulative = np.cumsum(weights, axis=-1)
    return np.asarray((cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(axis=-1))
