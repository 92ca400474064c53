"""Fits and statistics recover what was put in."""

import numpy as np
import pytest

from specmoeoff.roofline.curves import attainable, ridge
from specmoeoff.roofline.fits import fit_transfer, leave_one_out_error
from specmoeoff.roofline.timing import measurement, modes, paired_ratios, sample


def test_a_fit_with_relative_weights_finds_a_small_latency_among_large_transfers() -> None:
    rng = np.random.default_rng(0)
    sizes = 4096 * 2.0 ** np.arange(19)
    seconds = (8e-6 + sizes / 25e9) * (1 + 0.03 * np.abs(rng.standard_normal(len(sizes))))
    latency, bandwidth, error = fit_transfer(sizes, seconds)
    assert latency == pytest.approx(8e-6, rel=0.08)
    assert bandwidth == pytest.approx(25e9, rel=0.05)
    assert error < 0.15


def test_leave_one_out_sees_a_bend_and_passes_a_line() -> None:
    assert leave_one_out_error([1, 2, 4, 8], [1, 2, 4, 8]) == pytest.approx(0.0)
    bent = leave_one_out_error([1, 2, 4], [1, 4, 4])
    assert bent == pytest.approx(0.5)
    assert leave_one_out_error([1, 2], [1, 2]) is None


def test_six_pairs_give_their_extremes_with_96_9_percent() -> None:
    middle, low, high, confidence = paired_ratios([3, 4, 5, 6, 7, 8], [1] * 6)
    assert (middle, low, high) == (5.5, 3, 8)
    assert confidence == pytest.approx(1 - 2 / 64)


def test_many_pairs_drop_their_extremes_and_cover_the_median() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        _, low, high, confidence = paired_ratios(rng.lognormal(size=15), np.ones(15))
        covered += low <= 1.0 <= high
        assert confidence >= 0.95
    assert covered / 400 >= 0.93


def test_two_speeds_are_two_modes() -> None:
    assert modes([1.0, 1.02, 0.98, 3.0, 3.1, 2.9]) == pytest.approx((1.0, 3.0))
    assert modes([1.0, 1.02, 0.98, 1.01, 1.03]) == pytest.approx((1.01,))


def test_a_measurement_keeps_its_samples() -> None:
    found = measurement([3.0, 1.0, 2.0], "GB/s", "max")
    assert (found.value, found.samples) == (3.0, (3.0, 1.0, 2.0))
    assert len(sample(lambda: None, 0.0, 5)) == 5


def test_the_ridge_is_where_the_roofs_meet() -> None:
    assert ridge(35.0, 470.0) == pytest.approx(470 / 35)
    assert attainable(ridge(35.0, 470.0), 35.0, 470.0) == pytest.approx(470.0)
    assert attainable(1.0, 35.0, 470.0) == 35.0
