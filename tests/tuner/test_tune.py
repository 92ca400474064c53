"""Plans from a made-up machine: sensible, feasible, repeatable, and honest about what does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from specmoeoff.errors import AnswerIsNo, BadInput
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.tune import TuneRequest, tune

GIB = 1 << 30


@pytest.fixture(scope="module")
def request_(
    made_up_profile: HardwareProfile, made_up_workload: Workload, target_spec: ModelSpec, draft_spec: ModelSpec
) -> TuneRequest:
    return TuneRequest(
        profile=made_up_profile,
        model=target_spec,
        workload=made_up_workload,
        model_source="nowhere",
        host_memory_bytes=8 * GIB,
        draft=draft_spec,
        draft_source="nowhere-draft",
    )


@pytest.fixture(scope="module")
def plan(request_: TuneRequest) -> Plan:
    return tune(request_)


def test_a_slow_disk_makes_long_drafts_pay(plan: Plan) -> None:
    assert plan.decode.drafter == "model"
    assert plan.decode.draft_length >= 4
    assert plan.predicted.tokens_per_s > 3 * plan.plain.predicted.tokens_per_s


def test_experts_stay_within_a_quarter(plan: Plan, target_spec: ModelSpec) -> None:
    assert sum(plan.memory.fast.values()) <= target_spec.n_all_experts * target_spec.expert_bytes / 4
    assert plan.plain.experts.n_resident + plan.plain.experts.stream_slots <= 60


def test_the_plan_survives_its_file(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan


def test_the_same_request_gives_the_same_plan(plan: Plan, request_: TuneRequest) -> None:
    assert tune(request_) == plan


def test_optuna_comes_within_two_percent_of_exhaustive_search(plan: Plan, request_: TuneRequest) -> None:
    found = tune(replace(request_, search="optuna", trials=120))
    assert found.predicted.tokens_per_s >= 0.98 * plan.predicted.tokens_per_s


def test_a_fast_disk_and_useless_drafts_give_plain_decoding(request_: TuneRequest) -> None:
    profile = request_.profile
    assert profile.disk is not None
    rate = profile.disk.read_gb_per_s.model_copy(update={"value": 1000.0})
    profile = profile.model_copy(update={"disk": profile.disk.model_copy(update={"read_gb_per_s": rate})})
    bad = {n: a.model_copy(update={"conditional": (0.01, 0.01)}) for n, a in request_.workload.acceptance.items()}
    found = tune(replace(request_, profile=profile, workload=request_.workload.model_copy(update={"acceptance": bad})))
    assert found.decode.draft_length == 0


def test_measured_trials_overrule_the_estimate(request_: TuneRequest) -> None:
    found = tune(replace(request_, measure_top=3, measure=lambda p: 100.0 if p.decode.draft_length == 0 else 1.0))
    assert found.decode.draft_length == 0


def test_too_little_fast_memory_names_the_tier_the_bytes_and_the_remedy(request_: TuneRequest) -> None:
    with pytest.raises(AnswerIsNo, match=r"fast memory: .* lack .* bytes .* --fast-memory 16MiB"):
        tune(replace(request_, fast_memory_bytes=1 << 20))


def test_too_little_host_memory_names_the_tier_the_bytes_and_the_remedy(request_: TuneRequest) -> None:
    with pytest.raises(AnswerIsNo, match=r"host memory: .* more than the limit .* --host-memory \d+MiB"):
        tune(replace(request_, host_memory_bytes=100 << 20))
    needed = 0
    try:
        tune(replace(request_, host_memory_bytes=100 << 20))
    except AnswerIsNo as error:
        needed = int(str(error).split("--host-memory ")[1].split("MiB")[0].replace(",", "")) << 20
    assert tune(replace(request_, host_memory_bytes=needed)).decode.drafter in (
        "none",
        "ngram",
    )  # no room for a draft model


def test_a_workload_of_another_model_is_refused(request_: TuneRequest) -> None:
    other = request_.model.model_copy(update={"fingerprint": "another"})
    with pytest.raises(BadInput, match="was measured on model"):
        tune(replace(request_, model=other))
