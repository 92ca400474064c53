"""A plan that was edited, or made for something else, is refused in a sentence before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from specmoeoff.errors import BadInput, MissingCapability
from specmoeoff.runtime import loading
from specmoeoff.runtime.loading import check_part, open_plan
from specmoeoff.specs.model import ModelSpec
from specmoeoff.specs.plan import Plan


def changed(plan: Plan, part: str, **fields: Any) -> Plan:
    return plan.model_copy(update={part: getattr(plan, part).model_copy(update=fields)})


def layers(plan: Plan, layer: int, experts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return (*plan.experts.prefetch[:layer], experts, *plan.experts.prefetch[layer + 1 :])


def test_a_tuned_plan_can_run(plan: Plan, target_spec: ModelSpec) -> None:
    check_part("the plan", plan, target_spec)
    check_part("its plain part", plan.plain, target_spec)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: changed(p, "decode", context_tokens=9000), "context_tokens exceeds 8192"),
        (lambda p: changed(p, "decode", drafter="none"), "drafter and draft_length disagree"),
        (lambda p: changed(p, "experts", prefetch=p.experts.prefetch[:-1]), "prefetch must name 10 layers"),
        (lambda p: changed(p, "experts", prefetch=layers(p, 3, (1, 8))), "layer 3 names one it does not have"),
        (lambda p: changed(p, "experts", prefetch=layers(p, 3, (-1,))), "layer 3 names one it does not have"),
        (lambda p: changed(p, "experts", prefetch=layers(p, 4, (7, 7))), "layer 4 names an expert twice"),
        (lambda p: changed(p, "experts", stream_slots=2), "stream_slots must be at least 3"),
    ],
)
def test_an_edited_plan_names_what_cannot_run(plan: Plan, target_spec: ModelSpec, change: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        check_part("the plan", change(plan), target_spec)


@pytest.mark.parametrize(
    "edit",
    [
        ("batch = 16", "batch = 0"),
        ("compute = 2", "compute = 0"),
        ("disk_readers = 2", "disk_readers = 0"),
        ("prefill_chunk_tokens = 256", "prefill_chunk_tokens = -1"),
        ("batch = 16", "batch = inf"),
    ],
)
def test_absurd_numbers_are_refused_when_read(plan: Plan, edit: tuple[str, str], tmp_path: Path) -> None:
    text = plan.text(".toml")
    assert edit[0] in text
    (tmp_path / "plan.toml").write_text(text.replace(*edit))
    with pytest.raises(BadInput, match=edit[1].split(" =")[0]):
        Plan.load(tmp_path / "plan.toml")


def test_a_plan_larger_than_free_memory_is_refused(setting_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_bytes", lambda: 1 << 20)
    with pytest.raises(MissingCapability, match="more than are free"):
        open_plan(setting_plan)


@pytest.fixture
def setting_plan(plan: Plan, mixtral: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan's form for a real tiny model, which has no tokenizer."""
    from specmoeoff.runtime.checkpoint import read_model_spec

    monkeypatch.setattr(loading, "Tokenizer", lambda folder: None)
    target, draft = read_model_spec(mixtral), read_model_spec(llama)
    everything = (tuple(range(target.n_experts)),) * target.n_layers
    experts = plan.experts.model_copy(
        update={"resident": everything, "prefetch": ((),) * target.n_layers, "stream_slots": 0}
    )
    decode = plan.decode.model_copy(update={"context_tokens": 128})
    plain = plan.plain.decode.model_copy(update={"context_tokens": 128})
    return plan.model_copy(
        update={
            "model": plan.model.model_copy(update={"source": str(mixtral), "fingerprint": target.fingerprint}),
            "draft": plan.model.model_copy(update={"source": str(llama), "fingerprint": draft.fingerprint}),
            "experts": experts,
            "decode": decode,
            "plain": plan.plain.model_copy(update={"experts": experts, "decode": plain}),
        }
    )


def test_a_draft_must_be_dense_and_speak_the_same_tokens(setting_plan: Plan) -> None:
    opened = open_plan(setting_plan)
    assert opened.draft is not None
    wrong = setting_plan.model_copy(update={"draft": setting_plan.model})
    with pytest.raises(BadInput, match="a draft must be dense"):
        open_plan(wrong)
    with pytest.raises(BadInput, match="names no draft model"):
        open_plan(setting_plan.model_copy(update={"draft": None}))
