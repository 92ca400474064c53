"""A validation's speeds go back into the profile: what was wrong is found and prices come out right."""

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.estimate.calibrate import refit, rescaled, typical
from specmoeoff.estimate.costs import Calibration, Prices
from specmoeoff.estimate.planned import planned_schedule
from specmoeoff.estimate.predict import forecast
from specmoeoff.estimate.trace import predicted_spans
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord, Slice, TimelineEvent
from specmoeoff.specs.workload import Workload

SPEED = Slice(disk_gb_per_s=0.8, memory_scale=1.1, compute_scale=1.3)
ATTENTION, DRAFT = 1.25, 0.9


def events(spans: list) -> tuple[TimelineEvent, ...]:
    return tuple(
        TimelineEvent(
            name=s.node.name, kind=s.node.kind, lane=s.node.lane, layer=s.node.layer, start_s=s.start_s, end_s=s.end_s
        )
        for s in spans
    )


@pytest.fixture(scope="module")
def truth(made_up_profile: HardwareProfile, target_spec: ModelSpec, draft_spec: ModelSpec) -> HardwareProfile:
    """A machine off in everything, and in attention and drafting by more than its slices tell."""
    own = {(name, target_spec.shape_key): ATTENTION for name in ("attention", "attention_block")}
    own |= {(t.operator, t.shape): DRAFT for t in made_up_profile.operators if t.shape == draft_spec.shape_key}
    return rescaled(made_up_profile, SPEED.disk_gb_per_s, SPEED.memory_scale, SPEED.compute_scale, own)


@pytest.fixture(scope="module")
def record(
    run_record: RunRecord,
    truth: HardwareProfile,
    plan: Plan,
    made_up_profile: HardwareProfile,
    made_up_workload: Workload,
    target_spec: ModelSpec,
    draft_spec: ModelSpec,
) -> RunRecord:
    measured = planned_schedule(plan, truth, made_up_workload, target_spec, draft_spec)
    recalibrated = Prices(made_up_profile, target_spec, draft_spec, 2, None, Calibration(*SPEED.model_dump().values()))
    contexts = [plan.predicted.context_tokens] * plan.decode.batch
    told = forecast(target_spec, made_up_workload, plan.decode, plan.experts, recalibrated, contexts)
    timelines = {"measured": measured, "predicted": told.schedule}
    update = {f"timeline_{name}": events(predicted_spans(schedule)) for name, schedule in timelines.items()}
    return run_record.model_copy(update={**update, "recalibration": (SPEED,)})


def test_what_was_wrong_is_found_and_the_window_comes_out_right(
    truth: HardwareProfile,
    record: RunRecord,
    plan: Plan,
    made_up_profile: HardwareProfile,
    made_up_workload: Workload,
    target_spec: ModelSpec,
    draft_spec: ModelSpec,
) -> None:
    fitted, factors = refit(made_up_profile, record, target_spec, draft_spec)
    assert factors["disk rate"] == pytest.approx(0.8)
    # Not exact: a slice's speeds are interpolated over a node's rows when priced, over a table's own axis when refitted.
    assert (factors["attention times"], factors["draft times"]) == pytest.approx((ATTENTION, DRAFT), rel=0.02)
    assert factors["experts times"] == pytest.approx(1.0, abs=0.02)
    assert "refitted: disk rate x0.800" in fitted.name
    window_s = {
        name: planned_schedule(plan, profile, made_up_workload, target_spec, draft_spec).period_s
        for name, profile in (("stored", made_up_profile), ("fitted", fitted), ("true", truth))
    }
    assert window_s["fitted"] == pytest.approx(window_s["true"], rel=0.01)
    assert abs(window_s["stored"] / window_s["true"] - 1) > 0.1
    assert {t.provenance for t in fitted.operators} == {"fitted"}


def test_a_record_that_measured_no_speeds_or_another_machine_is_refused(
    record: RunRecord, run_record: RunRecord, made_up_profile: HardwareProfile, target_spec: ModelSpec
) -> None:
    with pytest.raises(BadInput, match="validate -o"):
        refit(made_up_profile, run_record, target_spec, None)
    other = record.model_copy(update={"machine_fingerprint": "another"})
    with pytest.raises(BadInput, match="another machine"):
        refit(made_up_profile, other, target_spec, None)


def test_the_typical_speed_is_the_mean_without_a_tenth_at_either_end() -> None:
    slices = [SPEED.model_copy(update={"memory_scale": scale}) for scale in (9.0, *[1.0] * 4, *[2.0] * 4, 0.01)]
    assert typical(slices).memory_scale == pytest.approx(1.5)
    assert typical(slices).draft_scale is None


def test_a_draft_is_refitted_by_its_own_slices(
    record: RunRecord, made_up_profile: HardwareProfile, target_spec: ModelSpec, draft_spec: ModelSpec
) -> None:
    own = record.model_copy(
        update={
            "recalibration": (SPEED.model_copy(update={"draft_scale": 0.5}),),
            "timeline_measured": (),
            "timeline_predicted": (),
        }
    )
    fitted, factors = refit(made_up_profile, own, target_spec, draft_spec)
    assert factors["draft operator times"] == 0.5
    pairs = [
        (old, new)
        for old, new in zip(made_up_profile.operators, fitted.operators, strict=True)
        if old.operator != "wake"
    ]
    for old, new in pairs:
        if old.shape == draft_spec.shape_key:
            assert new.seconds == pytest.approx([0.5 * s for s in old.seconds])
        else:
            assert new.seconds[0] > old.seconds[0]
