"""`validate` can say no, and says why. On a tiny random model, whose windows are far too short to time: only the
questions that do not depend on timing are asked for their answers here."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.files import sha256_text
from specmoeoff.roofline.profile import measure_profile
from specmoeoff.runtime.loading import Opened, open_plan
from specmoeoff.runtime.observe import observe
from specmoeoff.runtime.pack import pack_model
from specmoeoff.runtime.process import peak_rss_bytes
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.validate import Options, Validator, disk_off_by
from specmoeoff.specs.plan import Plan, PlanThreads
from specmoeoff.specs.profile import HardwareProfile, Measurement
from specmoeoff.specs.record import Check, RunRecord
from specmoeoff.specs.workload import Workload
from specmoeoff.tuner.tune import TuneRequest, tune

FEW = Options(n_pairs=2, block_windows=2, uncapped_block_windows=2, resident_block_windows=2, sweep_windows=1)


@dataclass(frozen=True)
class Setting:
    """Everything a validation needs."""

    plan: Plan
    opened: Opened
    profile: HardwareProfile
    workload: Workload
    requests: list[Request]

    def validate(self, **changes: object) -> RunRecord:
        s = replace(self, **changes)  # type: ignore[arg-type]
        return Validator(s.plan, s.opened, s.profile, s.workload, s.requests, FEW).run()


def check(record: RunRecord, name: str) -> Check:
    return next(c for c in record.checks if c.name == name)


@pytest.fixture(scope="module")
def setting(_saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECMOEOFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield _measured_setting(_saved)


def _measured_setting(save_model: Callable[..., Path]) -> Setting:
    target_folder = save_model("mixtral", vocab_size=96, max_position_embeddings=2048)
    draft_folder = save_model("llama", vocab_size=96, max_position_embeddings=2048)
    target, draft = pack_model(target_folder), pack_model(draft_folder)
    n_cores = len(os.sched_getaffinity(0))
    profile = measure_profile([target.spec, draft.spec], 3.0, target.expert_path)
    requests = [Request(f"r{i}", (3 + i, 4, 5, 6), 24) for i in range(6)]
    threads = PlanThreads(compute=n_cores, disk_readers=2, disk_chunk_bytes=16384)
    workload = observe(
        target, {"model": draft, "ngram": None}, requests * 4, threads, 4, target.spec.n_all_experts, "tiny"
    )
    # A random draft model is never right; pretend it is, so that the plan drafts.
    acceptance = {"model": workload.acceptance["model"].model_copy(update={"conditional": (0.99,) * 4})}
    workload = workload.model_copy(update={"acceptance": acceptance})
    plan = tune(
        TuneRequest(
            profile=profile,
            model=target.spec,
            workload=workload,
            model_source=str(target_folder),
            host_memory_bytes=8 << 30,
            draft=draft.spec,
            draft_source=str(draft_folder),
            batch=4,
            context_tokens=128,
            disk_limit_gb_per_s=0.05,
        )
    )
    assert plan.decode.draft_length > 0
    opened = Opened(target, draft, None)  # type: ignore[arg-type]
    return Setting(plan, opened, profile, workload, requests)


def test_a_true_plan_is_lossless_and_reads_what_it_planned(setting: Setting) -> None:
    record = setting.validate()
    for name in ("experts intact", "lossless"):
        assert check(record, name).passed, check(record, name).detail
    assert record.lossless
    assert len(record.speed_ups[0].pairs) == 2
    assert [s.disk_limit_gb_per_s for s in record.speed_ups] == [0.05, None]
    assert record.timeline_measured
    assert record.timeline_predicted
    assert RunRecord.parse(record.text(), Path("r.json")) == record


def test_a_drafter_that_has_every_token_accepted_is_found(setting: Setting) -> None:
    options = replace(FEW, accept=lambda drafted, chosen: len(drafted))
    s = setting
    record = Validator(s.plan, s.opened, s.profile, s.workload, s.requests, options).run()
    assert not record.lossless
    assert "accepts tokens the target did not choose" in check(record, "lossless").cause


def test_a_flipped_byte_in_an_expert_is_found(setting: Setting) -> None:
    path, offset = setting.opened.target.expert_path, setting.opened.target.expert_offset(1, 3) + 100

    def flip() -> None:
        with path.open("r+b") as stream:
            stream.seek(offset)
            byte = stream.read(1)
            stream.seek(offset)
            stream.write(bytes([byte[0] ^ 0x40]))

    flip()
    try:
        answer = check(setting.validate(), "experts intact")
    finally:
        flip()
    assert not answer.passed
    assert "layer 1 expert 3" in answer.cause


def test_a_profile_whose_disk_is_too_fast_is_found(setting: Setting) -> None:
    disk = setting.profile.disk
    assert disk is not None
    # The value alone, as an editor would change it: three times, since a test's file is too small for a steady rate.
    fast = disk.read_gb_per_s.model_copy(update={"value": 3 * disk.read_gb_per_s.value})
    profile = setting.profile.model_copy(update={"disk": disk.model_copy(update={"read_gb_per_s": fast})})
    answer = check(setting.validate(profile=profile), "profile's disk")
    assert not answer.passed
    assert "too fast" in answer.cause


def test_a_disk_that_flips_is_not_another_disk_and_one_off_by_a_third_is() -> None:
    rng = np.random.default_rng(0)

    def disk(share_fast: float, n: int) -> np.ndarray:
        return np.where(rng.random(n) < share_fast, 3.1, 2.0) * (1 + 0.03 * rng.standard_normal(n))

    def stored(samples: np.ndarray, value: float) -> Measurement:
        return Measurement(value=value, unit="GB/s", statistic="median", samples=tuple(samples))

    for then, now in ((0.5, 0.5), (0.8, 0.3), (0.3, 0.8), (1.0, 0.4)):
        before, seen = disk(then, 30), disk(now, 30)
        middle = float(np.median(before))
        assert 1 / 1.15 <= disk_off_by(stored(before, middle), seen)[0] <= 1.15
    before, seen = disk(0.6, 30), disk(0.6, 30)
    middle = float(np.median(before))
    for factor in (1.3, 1 / 1.3):
        for tampered in (stored(before * factor, middle * factor), stored(before, middle * factor)):
            off, _ = disk_off_by(tampered, seen)
            assert (off > 1.15) if factor > 1 else (off < 1 / 1.15)


def test_a_plan_that_understates_memory_is_found(setting: Setting) -> None:
    # This process holds transformers and more: the plan is told what it really needs, and then a fifth less.
    setting.validate()
    needs = peak_rss_bytes()
    for share, passes in ((1.0, True), (0.8, False)):
        rest = setting.plan.memory.rss_bytes - setting.plan.memory.host["process"]
        host = {**setting.plan.memory.host, "process": int(needs * share) - rest}
        plan = setting.plan.model_copy(update={"memory": setting.plan.memory.model_copy(update={"host": host})})
        answer = check(setting.validate(plan=plan), "memory")
        assert answer.passed is passes
        if not passes:
            assert "understates memory by 20%" in answer.cause


def test_a_plan_of_another_model_is_refused(setting: Setting) -> None:
    model = setting.plan.model.model_copy(update={"fingerprint": "another"})
    with pytest.raises(BadInput, match="made for another model"):
        open_plan(setting.plan.model_copy(update={"model": model}))


def test_the_plan_names_its_inputs_by_hash(setting: Setting) -> None:
    assert setting.plan.inputs.profile_sha256 == sha256_text(setting.profile.text())
