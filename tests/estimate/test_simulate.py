"""The graph's period against cases worked out by hand, and bounds that always hold."""

import random

import pytest

from specmoeoff.estimate.simulate import simulate
from specmoeoff.pipeline import ExpertUse, Graph, RequestTokens, WindowShape, window_graph

ONE = (RequestTokens(1, 10),)


def seconds(graph: Graph, **by_kind: float) -> list[float]:
    return [by_kind.get(node.kind, 0.0) for node in graph.nodes]


def shape(n_layers: int, uses: tuple[ExpertUse, ...], drafts: int = 0, micro_batches: int = 1) -> WindowShape:
    return WindowShape((ONE,) * drafts, (ONE,) * micro_batches, (uses,) * n_layers, 1)


RESIDENT = ExpertUse(0, "resident", 1)
STREAMED = ExpertUse(1, "prefetch", 1)


def test_everything_resident_is_the_sum_of_the_compute_lane() -> None:
    graph = window_graph(shape(2, (RESIDENT,), drafts=3, micro_batches=2), 0, 3)
    # 3 drafts of 1, two layers of two attentions of 2 and experts of 5, head 4
    schedule = simulate(graph, seconds(graph, draft=1, attention=2, experts=5, head=4))
    assert schedule.period_s == pytest.approx(3 * 1 + 2 * (2 * 2 + 5) + 4)


def test_what_lies_before_every_node_on_the_cpu_adds_up() -> None:
    graph = window_graph(shape(2, (RESIDENT,), drafts=3), 0, 3)
    # 3 drafts, two layers of attention and experts, head and verification: 9 nodes
    schedule = simulate(graph, seconds(graph, draft=1, attention=2, experts=5, head=4), gap_s=0.5)
    assert schedule.period_s == pytest.approx(3 * 1 + 2 * (2 + 5) + 4 + 9 * 0.5)


def test_a_slow_disk_sets_the_pace_when_slots_allow_reading_all_the_time() -> None:
    graph = window_graph(shape(4, (STREAMED,)), 3, 4)
    # Four loads of 10 a window; compute (1 + 1 a layer, head 1) hides behind them.
    schedule = simulate(graph, seconds(graph, load=10, attention=1, expert=1, head=1))
    assert schedule.period_s == pytest.approx(40)
    assert schedule.busy_s["disk"] == pytest.approx(40)


def test_a_single_slot_makes_reading_and_computing_take_turns() -> None:
    graph = window_graph(shape(2, (STREAMED,)), 1, 3)
    # Each layer: read 10, then compute 3, and only then may the next read begin; attention and head hide in the reads.
    schedule = simulate(graph, seconds(graph, load=10, attention=1, expert=3, head=1))
    assert schedule.period_s == pytest.approx(2 * (10 + 3))


def test_demand_waits_for_the_router() -> None:
    graph = window_graph(shape(2, (ExpertUse(1, "demand", 1),)), 4, 3)
    # Each layer: attention 2, then read 10, then compute 3; head 1.
    schedule = simulate(graph, seconds(graph, load=10, attention=2, expert=3, head=1))
    assert schedule.period_s == pytest.approx(2 * (2 + 10 + 3) + 1)


def test_first_layers_are_read_while_drafting() -> None:
    graph = window_graph(shape(1, (STREAMED,), drafts=2), 2, 3)
    # Drafts 2 x 6 hide the read of 10: 12 + attention 1 + expert 1 + head 1.
    schedule = simulate(graph, seconds(graph, draft=6, load=10, attention=1, expert=1, head=1))
    assert schedule.period_s == pytest.approx(15)


def test_an_unused_prefetch_not_begun_is_not_read() -> None:
    rare = ExpertUse(2, "prefetch", 1, 0.25)
    graph = window_graph(shape(1, (STREAMED, rare)), 1, 3)
    # One slot: the rare expert's turn comes after its router ended, so a quarter of it is read on average.
    schedule = simulate(graph, seconds(graph, load=8, attention=1, expert=1))
    assert schedule.loads == pytest.approx(1.25)


@pytest.mark.parametrize("seed", range(40))
def test_the_makespan_lies_between_the_busiest_lane_and_the_serial_sum(seed: int) -> None:
    rng = random.Random(seed)
    layers = tuple(
        tuple(
            ExpertUse(e, rng.choice(("resident", "prefetch", "demand")), rng.randint(1, 9), rng.uniform(0.1, 1))
            for e in range(rng.randint(1, 6))
        )
        for _ in range(rng.randint(1, 5))
    )
    window = WindowShape((ONE,) * rng.randint(0, 3), (ONE,) * rng.randint(1, 3), layers, 1)
    graph = window_graph(window, rng.randint(3, 8), 3)
    times = [rng.uniform(0, 5) for _ in graph.nodes]
    schedule = simulate(graph, times)
    spent = [b - a for a, b in zip(schedule.start_s, schedule.end_s, strict=True)]
    lanes = {
        lane: sum(t for n, t in zip(graph.nodes, spent, strict=True) if n.lane == lane) for lane in ("cpu", "disk")
    }
    makespan = max(schedule.end_s)
    assert max(lanes.values()) <= makespan + 1e-9
    assert makespan <= sum(spent) + 1e-9
    for node in graph.nodes:
        assert all(schedule.end_s[d] <= schedule.start_s[node.index] + 1e-9 for d in node.deps)


def test_work_after_a_wait_takes_longer_by_how_long_it_waited() -> None:
    graph = window_graph(shape(2, (STREAMED,)), 1, 3)
    prices = seconds(graph, load=10, attention=1, expert=3, head=1)
    # One slot: each layer waits for its read, so that waking, a tenth of the wait, is added to every expert.
    slower = simulate(graph, prices, lambda wait_s: wait_s / 10)
    waits = {"expert 0.1": 10 - 1 - 1, "expert 1.1": 10 - 1}  # beside the read: head and attention, or attention alone
    spent = {
        node.name: end - start
        for node, start, end in zip(graph.nodes, slower.start_s, slower.end_s, strict=True)
        if node.window == slower.steady and node.kind == "expert"
    }
    assert spent == pytest.approx({name: 3 + wait / 10 for name, wait in waits.items()})
    assert slower.period_s == pytest.approx(simulate(graph, prices).period_s + sum(waits.values()) / 10)
    resident = window_graph(shape(2, (RESIDENT,)), 0, 3)
    assert simulate(resident, seconds(resident, attention=1, experts=2), lambda wait_s: 1.0).period_s == pytest.approx(
        6
    )
