"""The predicted window as a Chrome trace: lanes as threads, and no more and no less busy than predicted."""

import json
from itertools import pairwise

import numpy as np
import pytest

from specmoeoff.estimate.gpu_choices import make_problem
from specmoeoff.estimate.gpu_window import GpuEstimator
from specmoeoff.estimate.planned import gpu_schedule, planned_schedule
from specmoeoff.estimate.rates import rates_of
from specmoeoff.estimate.trace import chrome_trace, predicted_spans
from specmoeoff.profiles import find
from specmoeoff.specs.model import ModelShape, ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.gpu_space import GpuSpace


def test_lanes_are_threads_that_are_as_busy_as_predicted(
    plan: Plan,
    made_up_profile: HardwareProfile,
    made_up_workload: Workload,
    target_spec: ModelSpec,
    draft_spec: ModelSpec,
) -> None:
    schedule = planned_schedule(plan, made_up_profile, made_up_workload, target_spec, draft_spec)
    trace = json.loads(chrome_trace(predicted_spans(schedule)))["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    assert sorted(lanes.values()) == ["cpu", "disk"]
    nodes = [event for event in trace if event["ph"] == "X"]
    for thread, lane in lanes.items():
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in nodes if e["tid"] == thread)
        assert sum(end - start for start, end in mine) == pytest.approx(1e6 * plan.predicted.busy_s[lane])
        assert all(end <= start + 1e-3 for (_, end), (start, _) in pairwise(mine))
    assert max(e["ts"] + e["dur"] for e in nodes) == pytest.approx(1e6 * plan.predicted.window_s)
    assert min(e["ts"] for e in nodes) >= 0
    attended = [e["args"]["layer"] for e in nodes if e["cat"] == "attention"]
    assert sorted(set(attended)) == list(range(target_spec.n_layers))


def test_a_gpu_machines_lanes_are_as_busy_as_predicted_too() -> None:
    spec = ModelShape.load(find("models", "mixtral-8x7b")).model
    workload = Workload.load(find("workloads", "apps")).with_output_tokens(1024)
    problem = make_problem(spec, workload, None, 3)
    estimator = GpuEstimator(problem, rates_of(HardwareProfile.load(find("machines", "a30"))))
    space = GpuSpace(problem, {"fast": 24 << 30, "host": 250 << 30})
    choices = space.choices(np.array([list(space.closed_form().values())]))
    busy, _ = estimator.breakdown(choices)
    trace = json.loads(chrome_trace(predicted_spans(gpu_schedule(estimator, choices))))["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    assert set(lanes.values()) == {"gpu", "cpu", "h2d", "d2h"}
    found = {lane: sum(e["dur"] for e in trace if e["ph"] == "X" and e["tid"] == tid) for tid, lane in lanes.items()}
    assert found == pytest.approx({lane: 1e6 * seconds for lane, seconds in busy.items()}, rel=1e-6)
    assert max(e["ts"] + e["dur"] for e in trace if e["ph"] == "X") == pytest.approx(
        1e6 * estimator.window_s(choices)[0]
    )
