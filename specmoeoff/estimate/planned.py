"""A plan's windows, priced again from what the plan was made of."""

import numpy as np

from specmoeoff.estimate.costs import Prices
from specmoeoff.estimate.gpu_choices import Choices
from specmoeoff.estimate.gpu_window import GpuEstimator
from specmoeoff.estimate.lanes import longest_path, waits_of
from specmoeoff.estimate.predict import STEADY_WINDOWS, forecast
from specmoeoff.estimate.simulate import Schedule
from specmoeoff.pipeline import GpuWindow, gpu_window_graph
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload


def planned_schedule(
    plan: Plan, profile: HardwareProfile, workload: Workload, spec: ModelSpec, draft: ModelSpec | None
) -> Schedule:
    """On a machine without a GPU."""
    prices = Prices(profile, spec, draft, plan.threads.compute, plan.limits.disk_limit_gb_per_s)
    contexts = [plan.predicted.context_tokens] * plan.decode.batch
    return forecast(spec, workload, plan.decode, plan.experts, prices, contexts).schedule


def gpu_schedule(estimator: GpuEstimator, choices: Choices) -> Schedule:
    """The first choice's windows on a machine with a GPU, all layers."""
    one, problem = choices.take(np.array([0])), estimator.problem
    steps = int(problem.of_draft(one, "steps")[0])
    shape = GpuWindow(
        int(one.micro_batches[0]),
        steps,
        bool(steps and one.draft_kv_share[0] < 1),
        bool(one.on_host[0] > 0),
        bool(one.on_demand[0]),
    )
    graph = gpu_window_graph(shape, problem.spec.n_layers, STEADY_WINDOWS)
    prices = estimator.prices(one)
    ends = [float(end[0]) for end in longest_path(graph, waits_of(graph), prices)]
    starts = [end - float(prices[node.kind][0]) for node, end in zip(graph.nodes, ends, strict=True)]
    return Schedule(graph, starts, ends, [1.0] * len(ends))
