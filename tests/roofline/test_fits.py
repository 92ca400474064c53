"""Fits find what made the data: a link's latency and rate through noise, an operator's overhead and both its slopes."""

import numpy as np
import pytest
from scipy.stats import linregress

from specmoeoff.estimate.tables import OutOfRange
from specmoeoff.roofline.fits import fit_operator, fit_transfer, never_falling, transfer_intervals
from specmoeoff.specs.profile import OperatorTable

LATENCY_S, BYTES_PER_S = 8e-6, 25e9
SIZES = 4096 * 2.0 ** np.arange(19)
ROWS = np.array([1.0, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512])


def link_seconds(seed: int, noise: float = 0.03) -> np.ndarray:
    """A noise that only ever lengthens."""
    return (LATENCY_S + SIZES / BYTES_PER_S) * (1 + noise * np.abs(np.random.default_rng(seed).standard_normal(19)))


def off(found: float, true: float) -> float:
    return abs(found / true - 1)


def test_latency_and_rate_of_a_noisy_link_are_found_within_a_twentieth_where_plain_least_squares_fails() -> None:
    fits = [fit_transfer(SIZES, link_seconds(seed)) for seed in range(200)]
    assert all(off(f.latency_s, LATENCY_S) < 0.05 and off(f.bytes_per_s, BYTES_PER_S) < 0.05 for f in fits)
    assert not any(f.use_table for f in fits[:20])
    plain = [linregress(SIZES, link_seconds(seed)).intercept for seed in range(200)]
    assert np.mean([off(intercept, LATENCY_S) < 0.05 for intercept in plain]) < 0.1


def test_a_fit_without_noise_is_exact_and_knows_the_half_rate_size() -> None:
    fit = fit_transfer(SIZES, link_seconds(0, noise=0.0))
    latency, bandwidth, _ = fit
    assert fit == pytest.approx((LATENCY_S, BYTES_PER_S, 0.0), abs=1e-9, rel=1e-4)
    half = fit.n_half_bytes
    assert half / (latency + half / bandwidth) == pytest.approx(bandwidth / 2)


def test_disturbed_sizes_move_the_line_little_where_weights_alone_let_them_and_send_readers_to_the_table() -> None:
    missed_by_weights = 0
    for seed in range(200):
        seconds = link_seconds(seed, noise=0.01)
        seconds[np.random.default_rng(seed).choice(19, 3, replace=False)] *= 1.5
        fit = fit_transfer(SIZES, seconds)
        assert max(off(fit.latency_s, LATENCY_S), off(fit.bytes_per_s, BYTES_PER_S)) < 0.05
        assert fit.use_table
        weighted = np.linalg.lstsq(np.stack([1 / seconds, SIZES / seconds], axis=1), np.ones(19), rcond=None)[0]
        missed_by_weights += max(off(weighted[0], LATENCY_S), off(1 / weighted[1], BYTES_PER_S)) > 0.05
    assert missed_by_weights > 100


def test_an_interval_is_given_only_where_the_data_bound_it() -> None:
    assert transfer_intervals(fit_transfer(SIZES[:2], SIZES[:2]), SIZES[:2], SIZES[:2]) is None
    wild = 1e-3 * np.exp(3 * np.random.default_rng(0).standard_normal(19))
    assert transfer_intervals(fit_transfer(SIZES, wild), SIZES, wild) is None
    exact = link_seconds(0, noise=0.0)
    (short, long), (slow, fast) = transfer_intervals(fit_transfer(SIZES, exact), SIZES, exact)
    assert (short, long, slow, fast) == pytest.approx((LATENCY_S, LATENCY_S, BYTES_PER_S, BYTES_PER_S), rel=1e-3)


def test_copies_in_steps_as_pageable_ones_are_no_line() -> None:
    staged = 20e-6 * np.ceil(SIZES / (4 << 20)) + SIZES / 10e9 + 0.3e-3 * (SIZES > 64 << 10)
    assert fit_transfer(SIZES, staged).use_table


def test_a_latency_is_never_below_nothing() -> None:
    faster_when_small = SIZES / 25e9 * np.linspace(0.9, 1.0, 19)
    latency, bandwidth, *_ = fit_transfer(SIZES, faster_when_small)
    assert 0 <= latency < 1e-8
    assert bandwidth == pytest.approx(25e9, rel=0.12)


def operator(seconds: np.ndarray) -> OperatorTable:
    """An expert of 10 MB."""
    return OperatorTable(
        operator="expert",
        shape="made-up",
        n_threads=1,
        isa="avx2",
        axes=("rows",),
        grid=(tuple(ROWS),),
        seconds=tuple(seconds),
        p10_s=tuple(seconds),
        p95_s=tuple(seconds),
        flops=tuple(1e7 * ROWS),
        bytes=(1e7,) * len(ROWS),
        n_samples=1,
    )


def test_an_operators_overhead_bandwidth_and_peak_are_found_and_left_out_points_foretold() -> None:
    for seed in range(20):
        noise = 1 + 0.02 * np.random.default_rng(seed).standard_normal(len(ROWS))
        fit = fit_operator(operator((50e-6 + np.maximum(1e7 / 30e9, 1e7 * ROWS / 400e9)) * noise))
        assert (fit.bytes_per_s, fit.flops_per_s) == pytest.approx((30e9, 400e9), rel=0.2)
        assert fit(48) == pytest.approx(50e-6 + 48e7 / 400e9, rel=0.05)
        assert max(fit.loo_error, fit.fit_error / 3) < 0.04


def test_an_operator_is_priced_only_where_it_was_fitted() -> None:
    fit = fit_operator(operator(50e-6 + np.maximum(1e7 / 30e9, 1e7 * ROWS / 400e9)))
    for rows in (0.5, 513):
        with pytest.raises(OutOfRange, match=rf"operator expert: {rows:g} rows are outside the fitted 1 to 512"):
            fit(rows)


def test_a_disturbed_size_moves_the_order_of_sizes_back_and_nothing_else() -> None:
    true = [1.0, 1.1, 1.1, 1.2, 1.3, 2.0, 4.0]
    assert never_falling(true) == pytest.approx(true)
    found = never_falling([1.0, 1.1, 1.6, 1.2, 1.3, 2.0, 4.0])
    assert list(found) == sorted(found)
    assert found[:2] == pytest.approx(true[:2])
    assert found[5:] == pytest.approx(true[5:])
    assert max(off(f, t) for f, t in zip(found, true, strict=True)) < 0.25 < off(1.6, true[2])
