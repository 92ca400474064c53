"""Tokens per round, and when drafting pays, against published and worked-out vectors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.errors import BadInput
from specmoeoff.estimate.speculation import (
    all_accepted,
    best_length,
    expected_tokens,
    moesd_speedup,
    tokens_per_round_to_the_end,
    utility,
    verified_share,
)
from specmoeoff.profiles.published import rows

EAGLE = (0.67, 0.62, 0.61, 0.64, 0.63)  # Mixtral, MT-bench at temperature 0


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
    assert [round(expected_tokens(EAGLE, k), 3) for k in range(1, 6)] == [1.67, 2.085, 2.339, 2.501, 2.603]


def test_expected_tokens_agree_with_simulated_rounds() -> None:
    rates = np.array([0.9, 0.6, 0.8, 0.3])
    accepted = np.random.default_rng(1).random((200_000, 4)) < rates
    emitted = 1 + np.cumprod(accepted, axis=1).sum(axis=1)
    assert expected_tokens(rates, 4) == pytest.approx(emitted.mean(), rel=0.01)
    assert all_accepted(rates, 4) == pytest.approx(np.prod(rates))


@pytest.mark.parametrize("k", [1, 2, 5, 11, 30])
def test_where_only_the_text_decides_rounds_of_every_length_follow_from_its_runs(k: int) -> None:
    rng, known = np.random.default_rng(2), 30
    place = np.arange(200)
    goes_on = np.minimum(0.7 + 0.03 * place, 0.94)  # a run of hits is the likelier to go on the longer it is
    runs = (np.cumprod(rng.random((50_000, len(place))) < goes_on, axis=1)).sum(axis=1)
    hits = np.ones(len(runs) + runs.sum(), bool)
    hits[np.cumsum(runs + 1) - 1] = False
    misses, at, n_rounds, n_whole = np.flatnonzero(~hits), 0, 0, 0
    while at < len(hits):
        stood = min(k, int(misses[np.searchsorted(misses, at)]) - at)
        at, n_rounds, n_whole = at + stood + 1, n_rounds + 1, n_whole + (stood == k)
    rates = goes_on[:known].tolist()
    assert expected_tokens(rates, k, of_text=True) == pytest.approx(len(hits) / n_rounds, rel=0.01)
    assert all_accepted(rates, k, of_text=True) == pytest.approx(n_whole / n_rounds, rel=0.015)


@given(rate=st.floats(0, 1), k=st.integers(0, 12))
def test_of_equal_rates_it_is_the_same_whether_the_text_or_the_round_decides(rate: float, k: int) -> None:
    rates = [rate] * 12
    assert expected_tokens(rates, k, of_text=True) == pytest.approx(expected_tokens(rates, k), rel=1e-6)
    assert all_accepted(rates, k, of_text=True) == pytest.approx(all_accepted(rates, k), rel=1e-6)


def test_a_draft_longer_than_what_was_measured_is_an_error() -> None:
    with pytest.raises(BadInput, match="acceptance is known for 2"):
        expected_tokens([0.9, 0.8], 3)


def test_a_long_draft_of_a_good_drafter_is_not_capped_at_its_length() -> None:
    assert expected_tokens([0.95] * 4, 4) == pytest.approx(4.52, abs=0.005)  # GenZ's min(expected, N) gives 4.0
    assert expected_tokens([1.0] * 4, 4) == 5


def test_the_last_rounds_draft_no_more_than_is_left() -> None:
    assert tokens_per_round_to_the_end(EAGLE, 5, 1) == 1.0
    assert tokens_per_round_to_the_end([1.0] * 3, 3, 10) == pytest.approx(10 / 3)  # 4 + 4 + 2
    lengths = [tokens_per_round_to_the_end(EAGLE, 5, n) for n in (8, 32, 64, 4096)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == pytest.approx(expected_tokens(EAGLE, 5), rel=1e-3)
    rng, n_answers, n_tokens = np.random.default_rng(0), 20_000, 32
    left, n_rounds = np.full(n_answers, n_tokens), 0
    while (going := left > 0).any():
        stood = np.cumprod(rng.random((n_answers, 5)) < EAGLE, axis=1).sum(axis=1)
        left -= going * (1 + np.minimum(stood, np.maximum(left - 1, 0)))
        n_rounds += going.sum()
    assert tokens_per_round_to_the_end(EAGLE, 5, n_tokens) == pytest.approx(n_answers * n_tokens / n_rounds, rel=0.01)


@pytest.mark.parametrize(
    ("rate", "draft_cost", "k"),
    [(0.7, 0.05, 6), (0.7, 0.1, 4), (0.7, 0.2, 3), (0.9, 0.05, 13), (0.9, 0.1, 10), (0.9, 0.2, 7)],
)
def test_the_best_length_falls_with_the_drafts_cost(rate: float, draft_cost: float, k: int) -> None:
    lengths = range(25)
    tokens = [expected_tokens([rate] * 24, n) for n in lengths]
    assert best_length(tokens, [1 + draft_cost * n for n in lengths]) == k


def test_drafting_that_does_not_pay_is_not_done() -> None:
    tokens = [expected_tokens([0.5] * 4, k) for k in range(5)]
    windows = [1 + 0.6 * k for k in range(5)]
    assert max(utility(tokens, windows)[1:]) < 1
    assert best_length(tokens, windows) == 0
    assert best_length([1.0, 1.5], [1.0, 1.5]) == 0


def test_moesds_rows_agree_with_its_own_speedups() -> None:
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows("moesd"):
        cells.setdefault((row.model, row.system, row.draft_length), {})[row.quantity] = row.value
    assert len(cells) == 21
    for (*_, k), cell in cells.items():
        # Time per token told over a whole generation: a round's time is that of sigma (k+1) tokens.
        round_s = cell["speculative"] * cell["sigma"] * (int(k) + 1)
        found = moesd_speedup(cell["sigma"], int(k), 0.0, round_s, cell["plain"])
        assert found == pytest.approx(cell["speedup"], abs=0.011)


def test_one_acceptance_rate_does_not_explain_all_of_moesds_lengths() -> None:
    def rate_of(sigma: float, k: int) -> float:
        grid = np.linspace(0.01, 0.999, 2000)
        return float(grid[np.argmin([abs(verified_share([a] * k, k) - sigma) for a in grid])])

    found = {
        int(r.draft_length): rate_of(r.value, int(r.draft_length))
        for r in rows("moesd")
        if (r.model, r.system, r.quantity) == ("mixtral-8x7b", "HumanEval T0", "sigma")
    }
    assert found == pytest.approx({2: 0.761, 3: 0.727, 4: 0.724}, abs=0.002)
