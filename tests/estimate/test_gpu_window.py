"""Windows of a machine with a GPU: the graph by hand, bounds that always hold, and a few layers standing for all."""

import random

import numpy as np
import pytest

from specmoeoff.estimate.lanes import longest_path, steady_window_s, waits_of
from specmoeoff.pipeline import GpuWindow, gpu_window_graph

KINDS = (
    *("pre_attention", "gpu_attention", "post_attention", "resident_experts", "experts", "head", "verify"),
    *("attention", "host_experts", "offload", "onload", "rows_offload", "rows_onload", "load", "draft"),
    *("draft_pre", "draft_offload", "draft_attention", "draft_onload", "draft_post"),
)


def prices(**seconds: float) -> dict[str, np.ndarray]:
    return {kind: np.array([float(seconds.get(kind, 0.0))]) for kind in KINDS}


def window(micro_batches: int = 2, steps: int = 0, split: bool = False, host: bool = False, on_demand: bool = False):
    return GpuWindow(micro_batches, steps, split, host, on_demand)


def random_window(rng: random.Random) -> GpuWindow:
    steps = rng.choice((0, 0, 1, 3))
    flags = (steps > 0 and rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.4)
    return GpuWindow(rng.choice((1, 2, 4)), steps, *flags)


def random_prices(rng: random.Random, n: int = 1) -> dict[str, np.ndarray]:
    """Nodes of very different length, and the transfer near balance with the rest in some."""
    scales = {kind: 10 ** rng.uniform(-2, 0.5) for kind in KINDS}
    return {kind: np.array([scale * rng.uniform(0.5, 2) for _ in range(n)]) for kind, scale in scales.items()}


def test_two_layers_of_two_micro_batches_by_hand() -> None:
    graph = gpu_window_graph(window(), 2, 1)
    seconds = prices(pre_attention=1, attention=4, post_attention=1, experts=2, head=3, load=0)
    ends = dict(zip((n.name for n in graph.nodes), longest_path(graph, waits_of(graph), seconds), strict=True))
    # GPU: 0-1 and 1-2 project; CPU: 1-5 and 5-9 attend; GPU: 5-6 routes, 6-8 experts, 8-9 projects the next layer's first.
    assert [float(ends[f"{kind} 0.0"][0]) for kind in ("pre_attention", "attention", "experts")] == [1, 5, 8]
    # CPU: 9-13 and, after the other micro-batch's 9-13 on the GPU, 13-17; experts follow at 17-18 and 18-20, then the head.
    assert [float(ends[f"{kind} 1.1"][0]) for kind in ("pre_attention", "attention", "experts")] == [13, 17, 20]
    assert float(ends["head 0"][0]) == 23


def test_a_slow_link_sets_the_pace() -> None:
    period = steady_window_s(window(4, steps=2), 32, prices(load=10, attention=1, experts=1, draft=3))
    assert (
        32 * 4 * 10 <= period[0] <= 32 * 4 * 10 + 5
    )  # once a window it waits for the last experts to free their buffer


def test_a_slow_cpu_sets_the_pace_as_soon_as_two_micro_batches_overlap() -> None:
    seconds = prices(attention=5, pre_attention=1, post_attention=1, experts=2)
    alone, overlapped = (steady_window_s(window(m), 30, seconds)[0] for m in (1, 2))
    assert alone == pytest.approx(30 * (1 + 5 + 1 + 2))
    assert overlapped == pytest.approx(30 * 2 * 5 + 1 + 3, abs=1.0)  # the first projects, the last computes


def test_the_second_layers_experts_are_read_while_drafting() -> None:
    seconds = prices(load=6, experts=1, draft=6)
    without, beside = (steady_window_s(window(1, steps), 4, seconds)[0] for steps in (0, 2))
    assert without == pytest.approx(4 * 6)
    assert beside < without + 2 * 6


def test_experts_on_demand_wait_for_every_router() -> None:
    seconds = prices(attention=2, load=5, experts=1)
    assert steady_window_s(window(2, on_demand=True), 10, seconds)[0] == pytest.approx(10 * (2 * 2 + 5 + 2 * 1))


@pytest.mark.parametrize("seed", range(10))
def test_a_period_lies_between_the_busiest_lane_and_the_serial_sum(seed: int) -> None:
    """A hundred graphs each, a thousand in all."""
    rng = random.Random(seed)
    for _ in range(100):
        shape, n_layers = random_window(rng), rng.randint(2, 12)
        seconds = random_prices(rng)
        nodes = [n for n in gpu_window_graph(shape, n_layers, 2).nodes if n.window == 1]
        spent = [(node.lane, float(seconds[node.kind][0])) for node in nodes]
        period = steady_window_s(shape, n_layers, seconds)[0]
        busiest = max(sum(s for lane, s in spent if lane == one) for one in ("gpu", "cpu", "h2d", "d2h"))
        assert busiest * (1 - 1e-9) <= period <= sum(s for _, s in spent) * (1 + 1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 89, 101, 103, 126, 134])  # six layers alone are up to 6 % off from 89 on
def test_a_few_layers_and_two_windows_are_the_full_graph_and_many(seed: int) -> None:
    """Near the balance of link and the rest, where a transfer read ahead is used up layer by layer."""
    rng = random.Random(seed)
    shape, n_layers = random_window(rng), rng.choice((26, 32, 47))
    seconds = random_prices(rng, 64)
    rest = steady_window_s(shape, n_layers, {**seconds, "load": np.zeros(64)})
    share = np.array([rng.uniform(0.9, 1.1) for _ in range(64)])
    seconds["load"] = share * rest / n_layers / (1 if shape.on_demand else shape.micro_batches)
    graph = gpu_window_graph(shape, n_layers, 6)
    ends = longest_path(graph, waits_of(graph), seconds)
    full = (ends[graph.ends[5]] - ends[graph.ends[2]]) / 3
    assert steady_window_s(shape, n_layers, seconds) == pytest.approx(full, rel=1e-9)


@pytest.mark.parametrize("on_demand", [False, True])
def test_a_layers_experts_wait_for_their_buffer_across_windows_too(on_demand: bool) -> None:
    n_layers = 5
    nodes = gpu_window_graph(window(2, 3, on_demand=on_demand), n_layers, 3).nodes
    computed = {
        (n.window * n_layers + n.layer): n.index for n in nodes if n.kind == "experts"
    }  # the last micro-batch's
    loads = [(n.window * n_layers + n.layer, n) for n in nodes if n.kind == "load"]
    assert all(computed[layer - 2] in node.deps for layer, node in loads if layer >= 2)
    assert len(loads) == (15 if on_demand else 2 * 16)  # read ahead: also the first layer after the last window


def test_prices_as_arrays_are_the_prices_one_by_one() -> None:
    seconds = random_prices(random.Random(1), 20)
    together = steady_window_s(window(2, 3, True, True), 32, seconds)
    single = [
        steady_window_s(window(2, 3, True, True), 32, {k: s[i : i + 1] for k, s in seconds.items()})[0]
        for i in range(20)
    ]
    assert together == pytest.approx(single)
