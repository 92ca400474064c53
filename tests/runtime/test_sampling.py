"""Sampled tokens come from the target's own distribution, speculated or not."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from specmoeoff.runtime import verify
from specmoeoff.runtime.sampling import Purpose, Sampling, distribution, draw, softmax, uniforms
from specmoeoff.runtime.verify import verify_sampled

FILTERS = {
    "temperature": Sampling(temperature=1.3),
    "top-k": Sampling(temperature=0.9, top_k=6),
    "top-p": Sampling(temperature=1.1, top_p=0.8),
    "min-p": Sampling(temperature=1.5, min_p=0.15),
    "all": Sampling(temperature=1.2, top_k=12, top_p=0.9, min_p=0.05),
}
VOCAB, N_DRAWS, CHUNK = 16, 200_000, 20_000
SEEDS = (11, 12, 13)


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("sampling", FILTERS.values(), ids=FILTERS)
def test_filters_are_those_of_transformers(sampling: Sampling, scale: float) -> None:
    import torch
    from transformers.generation import logits_process as peer

    logits = np.random.default_rng(0).normal(0, scale, (40, 500)).astype(np.float32)
    scores = torch.from_numpy(logits).double()
    for processor in (
        peer.TemperatureLogitsWarper(sampling.temperature),
        peer.TopKLogitsWarper(sampling.top_k or 500),
        peer.TopPLogitsWarper(sampling.top_p),
        peer.MinPLogitsWarper(sampling.min_p),
    ):
        scores = processor(None, scores)
    theirs = scores.softmax(-1).numpy()
    ours = distribution(logits, sampling)
    assert ((ours > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_tied_logits_stay_together_in_top_k() -> None:
    p = distribution(np.array([[1.0, 3.0, 2.0, 2.0, 0.0]], np.float32), Sampling(temperature=1, top_k=2))
    assert (p > 0).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)),
        *(("min_p", -0.1), ("min_p", 2.0), ("seed", -1), ("seed", 1 << 64)),
    ],
)
def test_what_makes_no_sense_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Sampling(**{"temperature": 1.0, field: value})  # type: ignore[arg-type]


def test_random_numbers_depend_on_seed_and_position_only() -> None:
    together = uniforms(7, 100, 50)
    for i in (0, 1, 49):
        np.testing.assert_array_equal(uniforms(7, 100 + i, 1)[0], together[i])
    assert not np.isin(uniforms(8, 100, 50), together).any()
    many = uniforms((1 << 64) - 1, 0, 50_000)
    assert ((many >= 0) & (many < 1)).all()
    for column in many.T:
        assert kstest(column, "uniform").pvalue > 0.001
    assert np.abs(np.corrcoef(many, rowvar=False) - np.eye(4)).max() < 0.02


def test_no_token_of_probability_zero_is_drawn() -> None:
    weights = np.array([0.0, 0.1, 0.0, 0.7, 0.1, 0.0, 0.0])
    edges = np.array([0.0, 1 - 2.0**-52, 0.1 / 0.9, 0.8 / 0.9])
    assert set(draw(np.broadcast_to(weights, (4, 7)), edges).tolist()) <= {1, 3, 4}


def tables(sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Of a made-up target and its draft: the next token's distribution after each token, (VOCAB, VOCAB)."""
    rng = np.random.default_rng(3)
    target = rng.normal(0, 1.5, (VOCAB, VOCAB)).astype(np.float32)
    draft = target + rng.normal(0, 1.0, target.shape).astype(np.float32)
    return distribution(target, sampling), distribution(draft, sampling)


def first_two(p: np.ndarray, q: np.ndarray | None, k: int, uniform: np.ndarray) -> np.ndarray:
    """Tokens 0 and 1 after token 0, (n, 2), by rounds of k drafts; q None: the drafter is certain, and
    right now and then. uniform (n, k + 2, 4)."""
    n = len(uniform)
    out = np.full((n, 2), -1)
    last, done = np.zeros(n, int), np.zeros(n, int)
    while (open_ := np.flatnonzero(done < 2)).size:
        here = uniform[open_[:, None], done[open_, None] + np.arange(k + 1)]
        drafted = np.empty((len(open_), k), int)
        at = before = last[open_]
        for i in range(k):
            at = (p.argmax(1)[at] + at % 2) % VOCAB if q is None else draw(q[at], here[:, i, Purpose.DRAFT])
            drafted[:, i] = at
        given = np.concatenate([before[:, None], drafted], axis=1)
        n_accepted, token = verify_sampled(p[given], None if q is None else q[given[:, :-1]], drafted, here)
        emitted = np.concatenate([drafted, token[:, None]], axis=1)
        emitted[np.arange(len(open_)), n_accepted] = token
        for i in range(2):
            fits = (i <= n_accepted) & (done[open_] + i < 2)
            out[open_[fits], done[open_[fits]] + i] = emitted[fits, i]
        last[open_] = token
        done[open_] += n_accepted + 1
    return out


def p_value(sampling: Sampling, drafter: str, k: int, seed: int) -> float:
    """Chi-square of the first two tokens' joint distribution after one prefix, bins of at least five expected."""
    p, q = tables(sampling)
    counts = np.zeros((VOCAB, VOCAB))
    for first in range(0, N_DRAWS, CHUNK):
        numbers = uniforms(seed, first * (k + 2), CHUNK * (k + 2)).reshape(CHUNK, k + 2, 4)
        tokens = first_two(p, q if drafter == "drawn" else None, k, numbers)
        np.add.at(counts, tuple(tokens.T), 1)
    expected = (p[0][:, None] * p * N_DRAWS).ravel()
    seen, large = counts.ravel(), expected >= 5
    assert seen[expected == 0].sum() == 0
    seen = np.append(seen[large], seen[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    filled = expected > 0
    return float(chisquare(seen[filled], expected[filled]).pvalue)


@pytest.mark.parametrize("drafter", ["drawn", "certain"])
@pytest.mark.parametrize("name", FILTERS)
def test_speculation_leaves_the_distribution(name: str, drafter: str) -> None:
    values = [p_value(FILTERS[name], drafter, k, seed) for k, seed in zip((1, 2, 3), SEEDS, strict=True)]
    assert min(values) > 0.001, values


@pytest.mark.parametrize("drafter", ["drawn", "certain"])
@pytest.mark.parametrize("name", FILTERS)
def test_without_the_residual_it_would_not(name: str, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "residual", lambda p, q: p)
    assert p_value(FILTERS[name], drafter, 2, SEEDS[0]) < 1e-6


def test_a_draft_equal_to_the_target_always_stands_and_one_it_excludes_never() -> None:
    p, _ = tables(FILTERS["top-k"])
    numbers, drafted = uniforms(1, 0, 4000).reshape(1000, 4, 4), np.tile([3, 5, 7], (1000, 1))
    given = np.concatenate([np.zeros((1000, 1), int), drafted], axis=1)
    certain: Callable[[int], np.ndarray] = lambda token: np.eye(VOCAB)[token]  # noqa: E731
    likely = np.stack([certain(3), certain(5), certain(7), p[7]])
    n_accepted, _ = verify_sampled(np.broadcast_to(likely, (1000, 4, VOCAB)), None, drafted, numbers)
    assert (n_accepted == 3).all()
    excluded = np.argmin(p[given[:, 0]], axis=1)[:, None]
    n_accepted, token = verify_sampled(p[given[:, :2]], None, excluded, numbers[:, :2])
    assert (n_accepted == 0).all()
    assert (p[0][token] > 0).all()


def test_softmax_is_safe_from_overflow() -> None:
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4, -1e4]], np.float32)), [[0.5, 0.5, 0.0]])
