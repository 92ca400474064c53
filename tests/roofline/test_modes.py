"""A machine that flips between two speeds is told from one that is noisy or now and then disturbed."""

import numpy as np
import pytest

from specmoeoff.roofline.timing import joint_modes, modes

SLOW, FAST = 32.0, 56.0
SEEDS = range(60)


def around(centre: float, n: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    return centre * (1 + noise * rng.standard_normal(n))


@pytest.mark.parametrize("n", [8, 13, 20, 50, 200])
@pytest.mark.parametrize("noise", [0.01, 0.03, 0.05])
@pytest.mark.parametrize("slow_share", [0.15, 0.5, 0.85])
def test_both_speeds_are_found_whatever_their_shares(n: int, noise: float, slow_share: float) -> None:
    n_slow = int(np.ceil(0.15 * n)) if slow_share == 0.15 else int(slow_share * n)
    # What the middle of so few samples can know: four standard errors, 5 % where that is less.
    near = [max(0.05, 4 * noise * 1.25 / np.sqrt(k)) for k in (n_slow, n - n_slow)]
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        samples = np.concatenate([around(SLOW, n_slow, noise, rng), around(FAST, n - n_slow, noise, rng)])
        slow, fast = modes(rng.permutation(samples))
        assert slow == pytest.approx(SLOW, rel=near[0])
        assert fast == pytest.approx(FAST, rel=near[1])


@pytest.mark.parametrize("n", [20, 50, 200])
def test_with_the_samples_of_a_real_probe_both_are_within_a_twentieth(n: int) -> None:
    missed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = modes(np.concatenate([around(SLOW, n // 3, 0.03, rng), around(FAST, n - n // 3, 0.03, rng)]))
        missed += found != pytest.approx((SLOW, FAST), rel=0.05)
    assert missed <= 2


@pytest.mark.parametrize("n", [8, 13, 20, 50, 200])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03, 0.05])
@pytest.mark.parametrize("tail", [0.0, 0.1])
def test_noise_and_a_tail_of_slow_samples_are_no_second_speed(n: int, noise: float, tail: float) -> None:
    mistaken = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        samples = around(FAST, n, noise, rng)
        samples[: int(tail * n)] *= rng.uniform(0.3, 0.9, int(tail * n))
        found = modes(rng.permutation(samples))
        mistaken += len(found) != 1
        assert found[-1] == pytest.approx(FAST, rel=0.1)
    assert mistaken <= 2


def test_strays_between_two_speeds_do_not_join_them() -> None:
    rng = np.random.default_rng(0)
    strays = rng.uniform(SLOW, FAST, 6)
    samples = np.concatenate([around(SLOW, 50, 0.02, rng), around(FAST, 50, 0.02, rng), strays])
    assert modes(samples) == pytest.approx((SLOW, FAST), rel=0.05)


@pytest.mark.parametrize("samples", [[1.0], [1.0, 9.0], [1.0, 1.0, 9.0], [0.0] * 8])
def test_too_few_or_equal_samples_are_one_speed(samples: list[float]) -> None:
    assert modes(samples) == (float(np.median(samples)),)


def test_speeds_that_noise_hides_in_each_kind_show_in_all_of_them_together() -> None:
    rng = np.random.default_rng(0)
    fast = rng.random(40) < 0.3
    rates = np.array([around(1.0, 40, 0.08, rng) * np.where(fast, 56.0, 40.0) for _ in range(7)])
    assert sum(len(modes(kind)) == 2 for kind in rates) <= 1
    assert np.array_equal(joint_modes(rates), fast)


def test_kinds_that_are_noisy_together_or_now_and_then_disturbed_have_one_speed() -> None:
    mistaken = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        rates = np.array([around(FAST, 40, 0.05, rng) for _ in range(7)])
        rates[:, :4] *= rng.uniform(0.3, 0.9, 4)
        mistaken += joint_modes(rates) is not None
    assert mistaken <= 2
