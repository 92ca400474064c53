"""Distinct experts and placements against the textbook, published tables and simulated routing."""

import numpy as np
import pytest

from specmoeoff.estimate.experts import (
    FLAT,
    fit_union_exponent,
    hit_rate,
    most_used,
    placement_gain,
    probability_used,
    streamed_bytes,
    tokens_to_touch,
    zipf_popularity,
)

TOKENS = (1, 2, 4, 6, 8, 16, 32)
UNIONS = {  # (experts, active, Zipf exponent): distinct experts that TOKENS touch
    (8, 2, 0.0): (2, 3.50, 5.47, 6.58, 7.20, 7.92, 8.00),
    (8, 2, 1.0): (2, 3.27, 4.84, 5.77, 6.39, 7.50, 7.94),
    (128, 8, 0.0): (8, 15.50, 29.12, 41.10, 51.62, 82.42, 111.77),
    (128, 8, 1.0): (8, 14.01, 23.55, 31.31, 37.93, 57.85, 82.04),
}


@pytest.mark.parametrize("case", UNIONS)
def test_tokens_touch_the_published_number_of_experts(case: tuple[int, int, float]) -> None:
    popularity = zipf_popularity(*case)
    found = [probability_used(popularity, n, 1, 1.0).sum() for n in TOKENS]
    assert found == pytest.approx(UNIONS[case], rel=0.01)
    assert found[0] == pytest.approx(case[1], abs=1e-9)


def test_popularity_is_what_gumbel_top_k_routing_gives() -> None:
    weights = 1.0 / np.arange(1, 65)
    noise = np.random.default_rng(0).gumbel(size=(100_000, 64))
    chosen = np.argpartition(-(np.log(weights) + noise), 6, axis=1)[:, :6]
    share = np.bincount(chosen.ravel(), minlength=64) / len(noise)
    assert zipf_popularity(64, 6, 1.0) == pytest.approx(share, abs=0.005)
    assert zipf_popularity(64, 6, 0.0) == pytest.approx(np.full(64, 6 / 64))
    assert zipf_popularity(4, 4, 1.0) == pytest.approx(np.ones(4))


@pytest.mark.parametrize(
    ("n_experts", "n_active", "tokens"), [(8, 2, 10.4), (64, 8, 22.4), (60, 4, 43.4), (128, 8, 46.4), (256, 8, 94.4)]
)
def test_nearly_all_experts_are_used_after_few_tokens(n_experts: int, n_active: int, tokens: float) -> None:
    assert tokens_to_touch(0.95, n_experts, n_active) == pytest.approx(tokens, abs=0.05)


@pytest.mark.parametrize(
    ("n_experts", "n_active", "rates"),
    [(8, 2, {1: 0.316, 2: 0.507, 4: 0.740}), (128, 8, {16: 0.549, 32: 0.696, 64: 0.847})],
)
def test_the_most_popular_experts_serve_most_tokens(n_experts: int, n_active: int, rates: dict[int, float]) -> None:
    popularity = zipf_popularity(n_experts, n_active, 1.0)
    assert [hit_rate(popularity, r) for r in rates] == pytest.approx(list(rates.values()), rel=0.01)


def test_placement_is_flat_once_nearly_all_experts_are_used_and_pays_before() -> None:
    popularity = zipf_popularity(8, 2, 1.0)
    many, few = (probability_used(popularity, n, 1, 1.0) for n in (4096, 4))
    assert placement_gain(many, 4) < FLAT < 0.1 < placement_gain(few, 4)
    assert placement_gain(probability_used(zipf_popularity(8, 2, 0.0), 4, 1, 1.0), 4) == pytest.approx(0, abs=1e-12)
    at_random = np.mean([streamed_bytes(few, np.random.default_rng(i).permutation(8)[:4], 1) for i in range(4000)])
    assert placement_gain(few, 4) == pytest.approx(1 - streamed_bytes(few, range(4), 1) / at_random, abs=0.01)


def test_bytes_streamed_are_of_what_is_used_and_not_resident() -> None:
    popularity = zipf_popularity(8, 2, 1.0)
    one, all_used = (probability_used(popularity, n, 1, 1.0) for n in (1, 1e9))
    assert streamed_bytes(one, (0, 3), 100) == pytest.approx(100 * (2 - popularity[0] - popularity[3]))
    assert streamed_bytes(all_used, (0, 3), 100) == streamed_bytes(all_used, (6, 7), 100) == pytest.approx(600)
    assert streamed_bytes(one, (), 100) == pytest.approx(200)


def test_one_token_uses_exactly_its_active_experts() -> None:
    popularity = np.array([1.0, 0.7, 0.2, 0.1])
    assert probability_used(popularity, 1, 1, 0.5).sum() == pytest.approx(2.0)


def test_the_union_exponent_is_recovered_from_its_own_unions() -> None:
    popularity = np.random.default_rng(0).dirichlet(np.ones(8), 30) * 2
    popularity = np.minimum(popularity, 1.0)
    points = [(r, w, probability_used(popularity, r, w, 0.6).sum(axis=1).mean()) for r in (1, 2, 4) for w in (1, 3, 9)]
    assert fit_union_exponent(popularity, points) == pytest.approx(0.6, abs=0.02)


def test_residents_are_the_most_used_places() -> None:
    used = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3]])
    assert most_used(used, 3) == [[0, 2], [1]]
