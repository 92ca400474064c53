"""Refitted prices of a machine with a GPU."""

import numpy as np
import pytest

from specmoeoff.estimate.gpu_choices import Choices, make_problem
from specmoeoff.estimate.gpu_refit import Observed, refit
from specmoeoff.estimate.gpu_window import GpuEstimator
from specmoeoff.estimate.rates import rates_of
from specmoeoff.profiles import find
from specmoeoff.specs.model import ModelShape
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload


@pytest.fixture(scope="module")
def estimator() -> GpuEstimator:
    model = ModelShape.load(find("models", "mixtral-8x7b")).model
    workload = Workload.load(find("workloads", "mt-bench")).with_output_tokens(128)
    problem = make_problem(model, workload, 1088, 5)
    return GpuEstimator(problem, rates_of(HardwareProfile.load(find("machines", "h100"))))


def choice(draft: int, batch: float = 200.0) -> Choices:
    ones = [np.array([value]) for value in (draft, 2, False, 1, 0, 0.0, 0.0, batch)]
    return Choices(*ones)


def test_a_machine_that_is_slower_by_kind_and_length_is_predicted_after_three_lengths(estimator: GpuEstimator) -> None:
    def truth(draft: int) -> dict[str, float]:
        prices = {kind: float(s[0]) for kind, s in estimator.prices(choice(draft), np.array([1000.0])).items()}
        return {**prices, "attention": prices["attention"] * (2 + 0.3 * draft), "load": prices["load"] * 1.2}

    fitted = refit(estimator, [Observed(choice(draft), 1000.0, truth(draft)) for draft in (0, 2, 5)])
    for draft in range(6):
        found = fitted.prices(choice(draft), np.array([1000.0]))
        for kind, seconds in truth(draft).items():
            assert found[kind][0] == pytest.approx(seconds, rel=1e-6), (draft, kind)


def test_several_windows_of_a_length_count_by_their_median_and_other_batches_scale_alike(
    estimator: GpuEstimator,
) -> None:
    base = estimator.prices(choice(2))["attention"][0]
    at = estimator.problem.context_tokens
    seen = [Observed(choice(2), at, {"attention": base * f, "verify": 0.0}) for f in (1.4, 1.5, 9.0)]
    fitted = refit(estimator, seen)
    assert set(fitted.rates.scales) == {"attention"}
    for batch in (50.0, 400.0):
        before, after = (e.prices(choice(3, batch))["attention"][0] for e in (estimator, fitted))
        assert after == pytest.approx(1.5 * before)


def test_refitting_again_does_not_compound(estimator: GpuEstimator) -> None:
    seen = [Observed(choice(1), 500.0, {"load": 1.0})]
    once = refit(estimator, seen)
    assert refit(once, seen).prices(choice(1))["load"][0] == once.prices(choice(1))["load"][0]


def test_windows_longer_than_their_nodes_lengthen_every_prediction(estimator: GpuEstimator) -> None:
    """Starts and waits belong to no node: what they cost is learned from windows of some lengths and holds for the others."""
    context = np.array([1000.0])

    def window(draft: int) -> Observed:
        prices = {kind: float(s[0]) for kind, s in estimator.prices(choice(draft), context).items()}
        return Observed(choice(draft), 1000.0, prices, 1.07 * float(estimator.window_s(choice(draft), context)[0]))

    fitted = refit(estimator, [window(draft) for draft in (0, 2, 5)])
    for draft in range(6):
        ratio = fitted.window_s(choice(draft), context) / estimator.window_s(choice(draft), context)
        assert ratio[0] == pytest.approx(1.07)
