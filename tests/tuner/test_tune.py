"""Plans from a made-up machine: sensible, feasible, repeatable, and honest about what does not fit."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from specmoeoff.errors import AnswerIsNo, BadInput
from specmoeoff.estimate.tables import OutOfRange
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan
from specmoeoff.tuner.search import TIE, exhaustive
from specmoeoff.tuner.space import Space, make_space
from specmoeoff.tuner.tune import Tuner, TuneRequest, tune

GIB = 1 << 30


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


def test_the_same_request_gives_the_same_plan(plan: Plan, made_up_request: TuneRequest) -> None:
    assert tune(made_up_request) == plan


def test_a_plan_tells_the_draft_length_of_every_context_and_number_of_live_requests(
    plan: Plan, made_up_request: TuneRequest
) -> None:
    assert plan.outlook
    table = {(at.context_tokens, at.live): at.draft_length for at in plan.outlook.draft_lengths}
    assert {live for _, live in table} == {int(plan.decode.batch * share) for share in (0.125, 0.25, 0.5, 1.0)}
    assert max(context for context, _ in table) == plan.decode.context_tokens
    assert max(table.values()) == plan.decode.draft_length
    assert any("acceptance of model" in sentence for sentence in plan.outlook.assumptions)
    nobody = made_up_request.workload.model_copy(update={"acceptance": {}})
    plainly = tune(replace(made_up_request, workload=nobody))
    assert plainly.outlook
    assert plainly.outlook.draft_lengths == ()


@pytest.fixture(scope="module")
def small(made_up_request: TuneRequest) -> tuple[Tuner, Space]:
    """All axes, few points."""
    r = replace(made_up_request, batch=None)
    tuner = Tuner(r)
    space = make_space(r.profile, r.model, r.draft, r.workload, tuner.n_slots, None)
    few = {"none": (0,), "model": (2, 5, 9), "ngram": (2,)}
    return tuner, replace(space, draft_lengths=few, batches=(1, 8, 32), stream_slots=space.stream_slots[::3])


def test_the_bound_is_never_below_the_price(small: tuple[Tuner, Space]) -> None:
    tuner, space = small
    for choice in random.Random(0).sample(list(space.choices()), 60):
        found = tuner.price(choice)
        assert found is not None
        assert tuner.bound(choice) >= found.tokens_per_s * (1 - 1e-9)


def test_exhaustive_search_misses_nothing(small: tuple[Tuner, Space]) -> None:
    tuner, space = small
    everything = {c: found.tokens_per_s for c in space.choices() if (found := tuner.price(c))}
    before = tuner.n_evaluated
    ranked = exhaustive(space, tuner.price, tuner.bound)
    assert tuner.n_evaluated - before < len(everything) / 2
    best = max(everything.values())
    assert max(everything[c] for c in ranked) == best
    assert everything[ranked[0]] >= TIE * best
    for key in {(c.drafter, c.draft_length) for c in everything}:
        same = [c for c in everything if (c.drafter, c.draft_length) == key and c.batch == ranked[0].batch]
        found = max(everything[c] for c in ranked if c in same)
        assert found >= TIE * max(everything[c] for c in same)


def test_the_batch_is_chosen_where_none_is_given(plan: Plan, made_up_request: TuneRequest) -> None:
    found = tune(replace(made_up_request, batch=None))
    assert found.predicted.tokens_per_s > plan.predicted.tokens_per_s
    assert found.plain.decode.batch == found.decode.batch
    tight = replace(made_up_request, batch=None, host_memory_bytes=sum(plan.memory.host.values()))
    assert sum(tune(tight).memory.host.values()) <= tight.host_memory_bytes


def test_choices_that_tie_draft_and_read_least(plan: Plan, made_up_request: TuneRequest) -> None:
    tuner = Tuner(made_up_request)
    space = make_space(
        made_up_request.profile,
        made_up_request.model,
        made_up_request.draft,
        made_up_request.workload,
        tuner.n_slots,
        16,
    )
    lengths = {plan.decode.drafter: (plan.decode.draft_length,)}
    found = [p for c in replace(space, draft_lengths=lengths).choices() if (p := tuner.price(c))]
    ties = [p for p in found if p.tokens_per_s >= plan.predicted.tokens_per_s]
    assert plan.predicted.disk_bytes <= min(p.disk_bytes for p in ties) * 1.001


def test_optuna_comes_within_two_percent_of_exhaustive_search(plan: Plan, made_up_request: TuneRequest) -> None:
    found = tune(replace(made_up_request, search="optuna", trials=120))
    assert found.predicted.tokens_per_s >= 0.98 * plan.predicted.tokens_per_s


def test_a_resumed_study_is_the_uninterrupted_one_and_knows_its_problem(
    made_up_request: TuneRequest, tmp_path: Path
) -> None:
    r = replace(made_up_request, search="optuna")
    whole = tune(replace(r, trials=24, storage=str(tmp_path / "whole")))
    tune(replace(r, trials=10, storage=str(tmp_path / "parts")))
    resumed = tune(replace(r, trials=24, storage=str(tmp_path / "parts")))
    assert resumed.decode == whole.decode
    assert resumed.experts == whole.experts
    less = replace(r, trials=4, storage=str(tmp_path / "whole"), host_memory_bytes=700 << 20)
    assert sum(tune(less).memory.host.values()) <= less.host_memory_bytes


@pytest.mark.parametrize("storage", ["nonsense://x", "sqlite:////no/such/folder/x.db"])
def test_a_storage_that_cannot_be_opened_is_named(made_up_request: TuneRequest, storage: str) -> None:
    with pytest.raises(BadInput, match="--storage"):
        tune(replace(made_up_request, search="optuna", trials=2, storage=storage))


def test_a_profile_without_this_models_operators_says_how_to_get_them(made_up_request: TuneRequest) -> None:
    with pytest.raises(BadInput, match="profile --model"):
        tune(replace(made_up_request, profile=made_up_request.profile.model_copy(update={"operators": ()})))


def test_sizes_that_were_not_measured_are_no_candidates(made_up_request: TuneRequest) -> None:
    found = tune(replace(made_up_request, batch=64))  # 64 requests of 9 tokens would be beyond the 512 rows measured
    assert found.decode.batch * (found.decode.draft_length + 1) <= 512
    with pytest.raises(OutOfRange, match="outside the measured"):
        tune(replace(made_up_request, batch=1000))


def test_a_fast_disk_and_useless_drafts_give_plain_decoding(made_up_request: TuneRequest) -> None:
    profile = made_up_request.profile
    assert profile.disk is not None
    rate = profile.disk.read_gb_per_s.model_copy(update={"value": 1000.0})
    profile = profile.model_copy(update={"disk": profile.disk.model_copy(update={"read_gb_per_s": rate})})
    bad = {
        n: a.model_copy(update={"conditional": (0.01, 0.01)}) for n, a in made_up_request.workload.acceptance.items()
    }
    found = tune(
        replace(
            made_up_request, profile=profile, workload=made_up_request.workload.model_copy(update={"acceptance": bad})
        )
    )
    assert found.decode.draft_length == 0


def test_measured_trials_overrule_the_estimate(made_up_request: TuneRequest) -> None:
    found = tune(
        replace(made_up_request, measure_top=3, measure=lambda p: 100.0 if p.decode.draft_length == 0 else 1.0)
    )
    assert found.decode.draft_length == 0


def test_too_little_fast_memory_names_the_tier_the_bytes_and_the_remedy(made_up_request: TuneRequest) -> None:
    with pytest.raises(AnswerIsNo, match=r"fast memory: .* lack .* bytes .* --fast-memory 16MiB"):
        tune(replace(made_up_request, fast_memory_bytes=1 << 20))


def test_too_little_host_memory_names_the_tier_the_bytes_and_the_remedy(made_up_request: TuneRequest) -> None:
    with pytest.raises(AnswerIsNo, match=r"host memory: .* more than the limit .* --host-memory \d+MiB"):
        tune(replace(made_up_request, host_memory_bytes=100 << 20))
    needed = 0
    try:
        tune(replace(made_up_request, host_memory_bytes=100 << 20))
    except AnswerIsNo as error:
        needed = int(str(error).split("--host-memory ")[1].split("MiB")[0].replace(",", "")) << 20
    assert tune(replace(made_up_request, host_memory_bytes=needed)).decode.drafter in (
        "none",
        "ngram",
    )  # no room for a draft model


def test_a_workload_of_another_model_is_refused(made_up_request: TuneRequest) -> None:
    other = made_up_request.model.model_copy(update={"fingerprint": "another"})
    with pytest.raises(BadInput, match="was measured on model"):
        tune(replace(made_up_request, model=other))


def test_a_workload_of_another_draft_is_refused(made_up_request: TuneRequest) -> None:
    other = made_up_request.workload.model_copy(update={"draft_fingerprint": "another"})
    with pytest.raises(BadInput, match=r"another draft than draft .* --drafter model:"):
        tune(replace(made_up_request, workload=other))


def test_a_workload_whose_popularity_is_not_this_models_is_refused(made_up_request: TuneRequest) -> None:
    edited = made_up_request.workload.model_copy(update={"popularity": made_up_request.workload.popularity[1:]})
    with pytest.raises(BadInput, match=r"popularity of 9 layers x 8 experts, but .* has 10 x 8"):
        tune(replace(made_up_request, workload=edited))
