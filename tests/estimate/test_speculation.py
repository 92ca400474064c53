"""Tokens per round and distinct experts against published and worked-out vectors."""

import numpy as np
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.estimate.experts import fit_union_exponent, most_used, probability_used
from specmoeoff.estimate.speculation import all_accepted, expected_tokens


@pytest.mark.parametrize(
    ("rate", "k", "tokens"),
    [
        (0.8, 0, 1.0),
        (0.8, 1, 1.8),
        (0.8, 3, 2.952),
        (0.8, 5, 3.68928),
        (0.5, 4, 1.9375),
        (0.9, 8, 6.12579511),
        (1.0, 5, 6.0),
    ],
)
def test_equal_rates_give_the_geometric_sum(rate: float, k: int, tokens: float) -> None:
    assert expected_tokens([rate] * 8, k) == pytest.approx(tokens, abs=1e-6)


def test_rates_by_position_give_eagles_published_lengths() -> None:
    rates = (0.67, 0.62, 0.61, 0.64, 0.63)  # EAGLE, Mixtral, MT-bench at temperature 0
    assert [round(expected_tokens(rates, k), 3) for k in range(1, 6)] == [1.67, 2.085, 2.339, 2.501, 2.603]


def test_expected_tokens_agree_with_simulated_rounds() -> None:
    rates = np.array([0.9, 0.6, 0.8, 0.3])
    accepted = np.random.default_rng(1).random((200_000, 4)) < rates
    emitted = 1 + np.cumprod(accepted, axis=1).sum(axis=1)
    assert expected_tokens(rates, 4) == pytest.approx(emitted.mean(), rel=0.01)
    assert all_accepted(rates, 4) == pytest.approx(np.prod(rates))


def test_a_draft_longer_than_what_was_measured_is_an_error() -> None:
    with pytest.raises(BadInput, match="acceptance is known for 2"):
        expected_tokens([0.9, 0.8], 3)


@pytest.mark.parametrize(
    ("n_experts", "n", "distinct"), [(8, 1, 2.0), (8, 2, 3.5), (8, 8, 7.2), (8, 32, 8.0), (128, 16, 82.42)]
)
def test_uniform_routing_touches_the_textbook_number_of_experts(n_experts: int, n: int, distinct: float) -> None:
    active = 2 if n_experts == 8 else 8
    popularity = np.full(n_experts, active / n_experts)
    assert probability_used(popularity, n, 1, 1.0).sum() == pytest.approx(distinct, abs=0.01)


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
