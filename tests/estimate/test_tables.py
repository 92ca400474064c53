"""Operator times read from tables: what runs beside them makes them longer, by as much as was measured."""

import math

import pytest

from specmoeoff.estimate.planned import planned_schedule
from specmoeoff.estimate.tables import find_table, wake_s
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile, Measurement, OperatorTable, Slowdown
from specmoeoff.specs.workload import Workload


def _beside(table: OperatorTable, *ratios: tuple[float, float]) -> OperatorTable:
    return table.model_copy(
        update={
            "beside": tuple(
                Slowdown(
                    lane="disk",
                    size=size,
                    ratio=Measurement(value=ratio, unit="ratio", statistic="median", samples=(ratio,)),
                )
                for size, ratio in ratios
            )
        }
    )


@pytest.fixture
def slowed(made_up_profile: HardwareProfile) -> HardwareProfile:
    tables = [_beside(t, (16.0, 1.4), (64.0, 1.2)) if t.operator == "expert" else t for t in made_up_profile.operators]
    return made_up_profile.model_copy(update={"operators": tuple(tables)})


@pytest.mark.parametrize(("rows", "ratio"), [(1.0, 1.4), (16.0, 1.4), (32.0, 1.3), (64.0, 1.2), (256.0, 1.2)])
def test_an_operator_takes_longer_beside_the_disk_by_its_size(
    slowed: HardwareProfile, rows: float, ratio: float
) -> None:
    shape = slowed.operators[0].shape
    n_threads = slowed.operators[0].n_threads
    alone, beside, half = (find_table(slowed, "expert", shape, n_threads, share)(rows) for share in (0.0, 1.0, 0.5))
    assert math.isclose(beside / alone, ratio)
    assert math.isclose(half / alone, 1.0 + (ratio - 1.0) / 2)


def test_what_was_not_measured_beside_the_disk_or_ran_faster_takes_as_long(slowed: HardwareProfile) -> None:
    shape, n_threads = slowed.operators[0].shape, slowed.operators[0].n_threads
    assert find_table(slowed, "head", shape, n_threads, 1.0)(4.0) == find_table(slowed, "head", shape, n_threads)(4.0)
    faster = tuple(_beside(t, (16.0, 0.97)) if t.operator == "expert" else t for t in slowed.operators)
    changed = slowed.model_copy(update={"operators": faster})
    assert find_table(changed, "expert", shape, n_threads, 1.0)(4.0) == find_table(changed, "expert", shape, n_threads)(
        4.0
    )


def test_layers_run_beside_the_disk_and_drafts_do_not(
    made_up_profile: HardwareProfile,
    made_up_workload: Workload,
    plan: Plan,
    target_spec: ModelSpec,
    draft_spec: ModelSpec,
) -> None:
    tables = tuple(_beside(t, (16.0, 2.0)) for t in made_up_profile.operators)
    calm, disturbed = (
        planned_schedule(plan, profile, made_up_workload, target_spec, draft_spec).phases_s
        for profile in (made_up_profile, made_up_profile.model_copy(update={"operators": tables}))
    )
    assert disturbed["draft"] == pytest.approx(calm["draft"])
    assert disturbed["attention"] > 1.01 * calm["attention"]


def test_waking_is_read_between_waits_and_no_longer_than_the_longest(made_up_profile: HardwareProfile) -> None:
    one = next(t for t in made_up_profile.operators if t.operator == "head")
    same = {"seconds": (1e-4, 3e-4), "p10_s": (0.0, 0.0), "p95_s": (0.0, 0.0), "flops": (0.0, 0.0), "bytes": (0.0, 0.0)}
    wake = one.model_copy(update={"operator": "wake", "axes": ("wait_s",), "grid": ((1e-3, 5e-3),), **same})
    profile = made_up_profile.model_copy(update={"operators": (*made_up_profile.operators, wake)})
    longer = wake_s(profile, one.shape, one.n_threads)
    assert [longer(wait) for wait in (0.0, 5e-4, 1e-3, 3e-3, 1.0)] == pytest.approx([0.0, 5e-5, 1e-4, 2e-4, 3e-4])
    assert wake_s(made_up_profile, one.shape, one.n_threads)(1.0) == 0.0
