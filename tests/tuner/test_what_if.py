"""What a better machine would give: never less, and most where the plan is bound."""

from dataclasses import replace

import pytest

from specmoeoff.tuner.tune import TuneRequest, tune
from specmoeoff.tuner.what_if import what_if


@pytest.fixture(scope="module")
def gains(made_up_request: TuneRequest) -> dict[str, float]:
    workload = made_up_request.workload
    short = {"model": workload.acceptance["model"].model_copy(update={"conditional": (0.8,) * 4})}
    workload = workload.model_copy(update={"acceptance": short})
    request = replace(made_up_request, workload=workload, disk_limit_gb_per_s=0.5)
    plan = tune(request)
    assert plan.predicted.bound == "disk"
    rows = what_if(replace(request, measure_top=3, measure=lambda plan: 1 / 0), plan)
    return {row.change: row.gain for row in rows if row.gain is not None}


def test_nothing_gets_slower_and_the_bound_lane_gains_most_of_the_machine(gains: dict[str, float]) -> None:
    assert min(gains.values()) > 0.99
    machine = {change: gain for change, gain in gains.items() if "drafts" not in change}
    assert max(machine, key=lambda change: machine[change]) == "disk twice as fast"
    assert gains["disk twice as fast"] > 1.5


def test_more_memory_for_experts_and_better_drafts_help_and_what_is_not_short_does_not(gains: dict[str, float]) -> None:
    assert gains["fast memory doubled"] > 1.2
    assert gains["half as many drafts rejected"] > 1.1
    assert gains["host memory doubled"] == pytest.approx(1.0, abs=0.01)
