"""Validation of a plan for a machine with a GPU: what holds, what does not, and prices refitted to what was measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.estimate.accuracy import report
from specmoeoff.estimate.gpu_refit import recorded_scales
from specmoeoff.profiles import find
from specmoeoff.roofline.profile import machine
from specmoeoff.runtime.gpu.device import Device
from specmoeoff.runtime.gpu.validate import GpuValidator
from specmoeoff.runtime.gpu.weights import CheckpointWeights, EagleWeights
from specmoeoff.runtime.loading import Opened
from specmoeoff.runtime.sequence import Request
from specmoeoff.specs.plan import DrafterName, Plan
from specmoeoff.specs.profile import HardwareProfile
from specmoeoff.specs.record import RunRecord
from specmoeoff.specs.workload import Acceptance, Workload
from specmoeoff.tuner.tune import TuneRequest, tune


@pytest.fixture
def request_of(mixtral_for_gpu: Path) -> TuneRequest:
    """Four requests; n-grams of three tokens are said to be accepted nearly always, so that the plan drafts."""
    base = Workload.load(find("workloads", "mt-bench")).with_output_tokens(24)
    often = Acceptance(conditional=(0.95,) * 3, n_rounds=0, provenance="said")
    profile = HardwareProfile.load(find("machines", "h100"))
    with CheckpointWeights(mixtral_for_gpu) as weights:
        return TuneRequest(
            profile.model_copy(
                update={"machine": machine().model_copy(update={"gpu": "played", "n_cores": profile.machine.n_cores})}
            ),
            weights.spec,
            base.model_copy(update={"acceptance": {"ngram": often}}),
            str(mixtral_for_gpu),
            64 << 30,
            fast_memory_bytes=8 << 30,
            batch=4,
            context_tokens=64,
        )


def validated(plan: Plan, request: TuneRequest, device: Device, draft: CheckpointWeights | None = None) -> RunRecord:
    prompts = [[3, 9, 27, 81, 3, 9], [5, 6, 7, 5, 6, 7, 5], [11, 12, 11, 12], [40, 41, 42, 40]]
    requests = [Request(str(i), tuple(p), 14) for i, p in enumerate(prompts)]
    with CheckpointWeights(plan.model.source) as weights:
        opened = Opened(weights, draft, None)  # type: ignore[arg-type]
        return GpuValidator(plan, opened, request.profile, request.workload, requests, device=device).run()


def test_output_and_memory_hold_and_what_was_measured_refits_the_prices(
    request_of: TuneRequest, make_device: Callable[[int], Device], tmp_path: Path
) -> None:
    plan = tune(request_of)
    assert plan.decode.draft_length > 0
    record = validated(plan, request_of, make_device(1))
    assert record.lossless
    passed = {check.name: check.passed for check in record.checks}
    assert passed["lossless"]
    assert passed["GPU memory"]
    assert {"prediction: tuned window", "prediction: plain window", "tuned is faster"} <= set(passed)
    assert "tuned over plain" in {c.name for c in record.comparisons}
    assert {"pre_attention", "experts"} <= {n.kind for n in record.nodes}
    assert any(row.name == "experts" for row in report(record).rows)
    for window in record.windows:
        assert set(window.busy_s) == {"gpu", "cpu", "h2d", "d2h", "disk"}
    record.save(tmp_path / "record.json")
    again = RunRecord.load(tmp_path / "record.json")
    scales = recorded_scales(request_of.profile, again)
    for node in record.nodes:
        at = scales[node.kind].n_tokens.index(node.draft_length + 1.0)
        assert scales[node.kind].factor[at] == pytest.approx(node.measured_s / node.predicted_s)
    assert tune(replace(request_of, scales=scales)).predicted.window_s != plan.predicted.window_s


@pytest.mark.long
@pytest.mark.parametrize("drafter", ["model", "eagle"])
def test_a_plan_with_a_draft_is_validated(
    request_of: TuneRequest,
    llama_for_gpu: Path,
    head_for_gpu: Callable[..., Path],
    make_device: Callable[[int], Device],
    drafter: DrafterName,
) -> None:
    often = Acceptance(conditional=(0.95,) * 2, n_rounds=0, provenance="said")
    behaviour = request_of.workload.model_copy(update={"acceptance": {drafter: often}})
    folder = llama_for_gpu if drafter == "model" else head_for_gpu()
    with (EagleWeights if drafter == "eagle" else CheckpointWeights)(folder) as draft:
        asked = replace(request_of, workload=behaviour, draft=draft.spec, draft_source=str(folder), drafter=drafter)
        plan = tune(asked)
        assert plan.decode.drafter == drafter
        assert plan.draft
        assert plan.draft.source == str(folder)
        record = validated(plan, asked, make_device(0), draft)
    assert record.lossless
    assert {n.draft_length for n in record.nodes} == {0, plan.decode.draft_length}


def test_a_verification_that_accepts_everything_is_found(
    request_of: TuneRequest, make_device: Callable[[int], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmoeoff.runtime.engine.accept", lambda drafted, answers: len(drafted))
    record = validated(tune(request_of), request_of, make_device(0))
    assert record.lossless is False
    (cause,) = [check.cause for check in record.checks if check.name == "lossless"]
    assert "accepts tokens the target did not choose" in cause


def test_records_that_cannot_refit_are_refused(request_of: TuneRequest) -> None:
    empty = RunRecord.model_construct(nodes=(), machine_fingerprint="")
    with pytest.raises(BadInput, match="no times of a GPU's nodes"):
        recorded_scales(request_of.profile, empty)
    elsewhere = RunRecord.model_construct(nodes=(1,), machine_fingerprint="another")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="another machine"):
        recorded_scales(request_of.profile, elsewhere)
