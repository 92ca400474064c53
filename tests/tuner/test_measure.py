"""Measured trials: what ran fastest is planned, and a run that fails rules out its choice alone."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from specmoeoff.errors import AnswerIsNo, TrialFailed
from specmoeoff.specs.plan import Plan
from specmoeoff.tuner.search import optuna_trials
from specmoeoff.tuner.tune import TuneRequest, tune


@pytest.fixture(scope="module")
def request_(made_up_request: TuneRequest) -> TuneRequest:
    """Short drafts only, so that tuning is quick."""
    acceptance = made_up_request.workload.acceptance["model"].model_copy(update={"conditional": (0.8,) * 4})
    workload = made_up_request.workload.model_copy(update={"acceptance": {"model": acceptance}})
    return replace(made_up_request, workload=workload)


def length(plan: Plan) -> int:
    return plan.decode.draft_length


def best_at(longest: int) -> object:
    """A machine on which throughput rises to this draft length, then falls."""
    return lambda plan: 100.0 - abs(length(plan) - longest)


def test_what_ran_fastest_beats_what_was_predicted(request_: TuneRequest) -> None:
    found = tune(replace(request_, measure_top=3, measure=best_at(0)))
    assert length(found) == 0
    assert length(found.plain) == 0


def test_the_best_of_different_lengths_and_plain_decoding_take_turns(request_: TuneRequest) -> None:
    order: list[int] = []

    def measure(plan: Plan) -> float:
        order.append(length(plan))
        return 1.0

    found = tune(replace(request_, measure_top=3, measure=measure))
    assert order == order[:4] * 3
    assert len(set(order)) == 4
    assert order[3] == 0
    assert [t.draft_length for t in found.measured] == order[:4]
    assert all(t.tokens_per_s == (1.0, 1.0, 1.0) for t in found.measured)


@pytest.mark.parametrize("search", ["exhaustive", "optuna"])
def test_a_run_that_fails_ends_itself_only(request_: TuneRequest, search: str) -> None:
    predicted = length(tune(request_))

    def measure(plan: Plan) -> float:
        if length(plan) == predicted:
            raise TrialFailed("out_of_memory", "killed")
        return float(length(plan) + 1)

    found = tune(replace(request_, search=search, trials=30, measure_top=6, measure=measure))  # type: ignore[arg-type]
    assert length(found) not in (0, predicted)
    if search == "exhaustive":
        failed = [t for t in found.measured if t.failure]
        assert [(t.draft_length, t.failure, t.tokens_per_s) for t in failed] == [
            (predicted, "out_of_memory: killed", ())
        ]


def test_where_every_run_fails_the_first_failure_is_told(request_: TuneRequest) -> None:
    def measure(plan: Plan) -> float:
        raise TrialFailed("timeout", "not done after 600 s.")

    with pytest.raises(AnswerIsNo, match="timeout: not done after 600 s"):
        tune(replace(request_, measure_top=2, measure=measure))


def test_measured_trials_of_optuna_walk_from_the_prediction_to_what_is_faster(request_: TuneRequest) -> None:
    """What no prediction knows decides here: more stream slots are faster."""
    predicted = tune(request_)
    r = replace(request_, search="optuna", trials=20, measure_top=12, measure=lambda p: p.experts.stream_slots)
    found = tune(r)
    assert found.experts.stream_slots > predicted.experts.stream_slots
    assert len(found.measured) <= 12
    finalists = [t for t in found.measured if len(t.tokens_per_s) > 1]
    assert {len(t.tokens_per_s) for t in finalists} == {4}
    assert 0 in {t.draft_length for t in finalists}


def test_a_failed_trial_is_finished_in_its_study_and_not_tried_again(tmp_path: Path) -> None:
    sizes, tried = {"draft": 3, "batch": 3}, Counter[tuple[int, ...]]()

    def evaluate(index: dict[str, int]) -> float | None:
        tried[tuple(index.values())] += 1
        return None if index["draft"] == 1 else 1.0 + index["batch"]

    for n in (3, 8):  # the second sitting goes on
        found = optuna_trials(sizes, evaluate, [{"draft": 1, "batch": 0}], n, 0, "p", str(tmp_path / "journal"))
    assert len(found) == 8 == tried.total()
    assert {value for index, value in found if index["draft"] == 1} == {None}
    assert max(value or 0.0 for _, value in found) == 3.0
