"""The engine on a GPU played by a CPU says what the engine on the CPU says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specmoeoff.errors import BadInput, MissingCapability
from specmoeoff.runtime import loading
from specmoeoff.runtime.drafters.eagle import EagleDrafter, load_eagle_head, read_eagle_spec
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.gpu.device import Device
from specmoeoff.runtime.gpu.weights import CheckpointWeights, EagleWeights
from specmoeoff.runtime.loading import load_runnable, open_plan
from specmoeoff.runtime.pack import pack_model
from specmoeoff.runtime.sampling import GREEDY, Sampling
from specmoeoff.runtime.sequence import Request
from specmoeoff.specs.plan import Plan, PlanExperts, PlanGpu, PlanModel

NOTHING: tuple[tuple[int, ...], ...] = ((),) * 3
AHEAD = PlanExperts(
    resident=((0,), (), (2,)),
    prefetch=((1, 2, 3), (0, 1, 2, 3, 4), (0, 1, 3, 4)),
    stream_slots=10,
    on_host=((4,), (), ()),
)
ON_DEMAND = PlanExperts(resident=NOTHING, prefetch=NOTHING, stream_slots=5, on_host=NOTHING)


def requests() -> list[Request]:
    """Prompts that repeat themselves, so that n-grams are found; one samples."""
    prompts = [[3, 9, 27, 81, 3, 9], [5, 6, 7, 5, 6, 7, 5], [11, 12], [40, 41, 42, 40]]
    warm = Sampling(temperature=0.8, seed=5)
    return [Request(str(i), tuple(p), 6, sampling=warm if i == 2 else GREEDY) for i, p in enumerate(prompts)]


def outputs(engine: Engine) -> dict[str, list[int]]:
    engine.submit(requests())
    for _ in engine.run():
        pass
    return {s.request.request_id: s.output for s in engine.finished}


@pytest.mark.parametrize(
    ("k", "micro_batches", "kv_share", "experts"),
    [(0, 1, 0.0, AHEAD), (3, 2, 0.5, AHEAD), (3, 3, 1.0, AHEAD), (2, 2, 0.0, ON_DEMAND), (0, 2, 0.5, ON_DEMAND)],
)
def test_a_gpus_engine_emits_what_the_cpus_does(
    mixtral_for_gpu: Path,
    plan_for: Callable[..., Plan],
    make_device: Callable[[int], Device],
    k: int,
    micro_batches: int,
    kv_share: float,
    experts: PlanExperts,
) -> None:
    drafter = "ngram" if k else "none"
    plan = plan_for(
        mixtral_for_gpu, drafter=drafter, draft_length=k, micro_batches=micro_batches, prefill_chunk_tokens=5
    )
    with Engine(pack_model(mixtral_for_gpu), None, plan.decode, plan.experts, plan.threads) as engine:
        expected = outputs(engine)
    device = make_device(k)
    gpu = PlanGpu(kv_share=kv_share, draft_kv_share=0.0)
    with (
        CheckpointWeights(mixtral_for_gpu) as weights,
        Engine(weights, None, plan.decode, experts, plan.threads, gpu=gpu, device=device) as engine,
    ):
        assert outputs(engine) == expected
        with pytest.raises(BadInput, match="anew"):
            engine.configure(plan.decode, plan.experts)


def test_a_draft_model_drafts_the_same_with_its_kv_on_both_sides(
    mixtral_for_gpu: Path,
    llama_for_gpu: Path,
    plan_for: Callable[..., Plan],
    make_device: Callable[[int], Device],
) -> None:
    """Output is the CPU engine's with the same draft, greedy and sampled, with more requests than places: one or two of them with
    their draft KV in GPU memory, the other beside the CPU."""
    changes = {"drafter": "model", "draft_length": 3, "micro_batches": 2, "batch": 3, "prefill_chunk_tokens": 5}
    plan = plan_for(mixtral_for_gpu, **changes)
    with Engine(
        pack_model(mixtral_for_gpu), pack_model(llama_for_gpu), plan.decode, plan.experts, plan.threads
    ) as engine:
        expected = outputs(engine)
    gpu = PlanGpu(kv_share=0.4, draft_kv_share=0.6)
    with (
        CheckpointWeights(mixtral_for_gpu) as weights,
        CheckpointWeights(llama_for_gpu) as draft,
        Engine(weights, draft, plan.decode, AHEAD, plan.threads, gpu=gpu, device=make_device(2)) as engine,
    ):
        assert outputs(engine) == expected


@pytest.mark.long
@pytest.mark.parametrize(
    ("k", "draft_kv_share", "left_out"),
    [(3, 0.6, ("layers.0.input_layernorm.weight",)), (4, 0.0, ("fc.bias",)), (2, 1.0, ())],
)
def test_an_eagle_head_drafts_the_same_with_its_kv_on_both_sides(
    mixtral_for_gpu: Path,
    head_for_gpu: Callable[..., Path],
    plan_for: Callable[..., Plan],
    make_device: Callable[[int], Device],
    monkeypatch: pytest.MonkeyPatch,
    k: int,
    draft_kv_share: float,
    left_out: tuple[str, ...],
) -> None:
    """Proposals and output are the CPU engine's with the same head, and output is that of plain decoding; prompts of two chunks, and
    more requests than places."""
    proposed: list[list[list[int]]] = []
    propose = EagleDrafter.propose

    def recorded(*arguments: Any) -> Any:
        found = propose(*arguments)
        proposed.append([p.tokens for p in found])
        return found

    monkeypatch.setattr(EagleDrafter, "propose", recorded)
    changes = {"drafter": "eagle", "draft_length": k, "micro_batches": 2, "batch": 3, "prefill_chunk_tokens": 5}
    plan, packed, folder = plan_for(mixtral_for_gpu, **changes), pack_model(mixtral_for_gpu), head_for_gpu(*left_out)
    with Engine(packed, load_eagle_head(folder, packed.spec), plan.decode, plan.experts, plan.threads) as engine:
        expected = outputs(engine)
    on_cpu, proposed = proposed, []
    plainly = plan.decode.model_copy(update={"drafter": "none", "draft_length": 0})
    gpu = PlanGpu(kv_share=0.4, draft_kv_share=draft_kv_share)
    with (
        CheckpointWeights(mixtral_for_gpu) as weights,
        EagleWeights(folder) as head,
    ):
        with Engine(weights, head, plan.decode, AHEAD, plan.threads, gpu=gpu, device=make_device(k)) as engine:
            assert outputs(engine) == expected
        assert max(map(len, (p for window in proposed for p in window))) == k
        assert proposed == on_cpu
        with Engine(weights, None, plainly, AHEAD, plan.threads, gpu=gpu, device=make_device(k)) as engine:
            plain = outputs(engine)
    greedy = [r.request_id for r in requests() if r.sampling.greedy]
    assert {r: plain[r] for r in greedy} == {r: expected[r] for r in greedy}


def test_a_head_that_knows_the_target_is_always_accepted(
    idle_mixtral_for_gpu: Path,
    head_for_gpu: Callable[..., Path],
    plan_for: Callable[..., Plan],
    make_device: Callable[[int], Device],
) -> None:
    plan = plan_for(idle_mixtral_for_gpu, drafter="eagle", draft_length=4, batch=2, micro_batches=2)
    gpu = PlanGpu(kv_share=0.5, draft_kv_share=0.5)
    with (
        CheckpointWeights(idle_mixtral_for_gpu) as weights,
        EagleWeights(head_for_gpu(idle=True)) as head,
        Engine(weights, head, plan.decode, AHEAD, plan.threads, gpu=gpu, device=make_device(0)) as engine,
    ):
        engine.submit([Request("a", (5, 6, 7), 21), Request("b", (9,) * 30, 21)])
        # the prompts give one token each, then four windows of five each
        assert [w.tokens for w in engine.run()] == [2, 10, 10, 10, 10]


def test_a_plan_for_a_gpu_says_what_this_machine_lacks(
    mixtral_for_gpu: Path, plan_for: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_for(mixtral_for_gpu).model_copy(update={"gpu": PlanGpu(kv_share=0, draft_kv_share=0)})
    (tmp_path / "plan.json").write_text(plan.text())
    with pytest.raises(MissingCapability, match=r"plan\.json.*no CUDA GPU answers here.*pip install"):
        load_runnable(tmp_path / "plan.json")


def test_what_the_lanes_cannot_compute_is_refused(
    save_model: Callable[..., Path], mixtral_for_gpu: Path, plan_for: Callable[..., Plan]
) -> None:
    with pytest.raises(MissingCapability, match="heads of 32"):
        CheckpointWeights(save_model("mixtral"))
    with pytest.raises(MissingCapability, match="gpt_oss models"):
        CheckpointWeights(save_model("gpt_oss"))


def test_a_plan_opens_the_head_it_names_and_says_how_to_name_one(
    mixtral_for_gpu: Path,
    head_for_gpu: Callable[..., Path],
    plan_for: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "Tokenizer", lambda folder: None)
    head = head_for_gpu()
    spec = read_eagle_spec(head)
    named = PlanModel(source=str(head), name=spec.name, fingerprint=spec.fingerprint)
    changes = {"gpu": PlanGpu(kv_share=0, draft_kv_share=0), "draft": named}
    plan = plan_for(mixtral_for_gpu, drafter="eagle").model_copy(update=changes)
    assert isinstance(open_plan(plan).draft, EagleWeights)
    assumed = named.model_copy(update={"source": "", "name": "EAGLE head of mixtral"})
    with pytest.raises(BadInput, match=r"EAGLE head of mixtral that is only assumed.*`tune --draft eagle:HEAD`"):
        open_plan(plan.model_copy(update={"draft": assumed}))
