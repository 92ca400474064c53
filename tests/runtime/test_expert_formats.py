"""Experts in int8, int4 and MXFP4 from the checkpoint to the answers: sizes, losslessness, plans, and what they cost."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.errors import BadInput
from specmoeoff.estimate.memory import plan_memory
from specmoeoff.precision import ExpertFormat, Precision
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.loading import open_plan
from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.perplexity import Perplexities, perplexity
from specmoeoff.runtime.process import disk_bytes_read
from specmoeoff.runtime.sequence import Request
from specmoeoff.specs.plan import Plan, PlanDecode, PlanExperts, PlanThreads
from specmoeoff.specs.record import RunRecord

FORMATS: list[ExpertFormat] = ["int8", "int4", "mxfp4"]
BITS = {"bf16": 16.0, "int8": 8.25, "int4": 4.25, "mxfp4": 4.5}
THREADS = PlanThreads(compute=2, disk_readers=1, disk_chunk_bytes=1 << 20)


def test_packed_experts_shrink_with_their_bits(mixtral: Path) -> None:
    packed = {name: pack_model(mixtral, experts=name) for name in BITS}  # type: ignore[arg-type]
    assert len({one.folder for one in packed.values()}) == len(BITS)
    for name, one in packed.items():
        assert one.expert_bytes == packed["bf16"].expert_bytes * BITS[name] / 16
        assert one.expert_bytes - one.spec.expert_bytes == (one.spec.expert_params // 32 if name == "mxfp4" else 0)
        assert one.spec.fingerprint == packed["bf16"].spec.fingerprint
        assert one.damaged_experts() == []
    assert len({one.spec.shape_key for one in packed.values()}) == len(BITS)


@pytest.mark.parametrize("experts", FORMATS)
def test_memory_and_disk_bytes_are_those_predicted(mixtral: Path, experts: ExpertFormat) -> None:
    packed = pack_model(mixtral, experts=experts)
    spec, n_layers = packed.spec, packed.spec.n_layers
    decode = PlanDecode(
        drafter="none", draft_length=0, batch=1, micro_batches=1, context_tokens=64, prefill_chunk_tokens=64
    )
    placement = PlanExperts(resident=((0, 1),) * n_layers, prefetch=((2, 3, 4),) * n_layers, stream_slots=9)
    memory = plan_memory(spec, None, decode, placement.n_resident, 9, THREADS.compute, 0)
    assert memory.disk["experts_file"] == packed.expert_path.stat().st_size
    before = disk_bytes_read() + packed.dense_bytes
    with Engine(packed, None, decode, placement, THREADS) as engine:
        engine.submit([Request("one", tuple(range(3, 43)), 4)])
        for _ in engine.run():
            pass
        assert engine.store.bytes_planned >= (2 + 3) * n_layers * packed.expert_stride
        engine.pause()
        assert disk_bytes_read() - before == pytest.approx(engine.store.bytes_planned, rel=0.01)
        assert sum(memory.fast.values()) == engine.store.n_slots * packed.expert_stride


def outputs(
    packed: PackedModel, draft: PackedModel, drafter: str, k: int, requests: list[Request]
) -> dict[str, list[int]]:
    decode = PlanDecode(
        drafter=drafter,  # type: ignore[arg-type]
        draft_length=k,
        batch=5,
        micro_batches=2,
        context_tokens=96,
        prefill_chunk_tokens=24,
    )
    nothing = ((),) * packed.spec.n_layers
    with Engine(
        packed, draft, decode, PlanExperts(resident=nothing, prefetch=nothing, stream_slots=8), THREADS
    ) as engine:
        engine.submit(requests)
        for _ in engine.run():
            pass
        return {s.request.request_id: s.output for s in engine.finished}


@pytest.mark.parametrize("experts", FORMATS)
def test_speculative_output_is_plain_output(save_model: Callable[..., Path], experts: ExpertFormat) -> None:
    target = pack_model(save_model("mixtral", initializer_range=0.1), experts=experts)
    draft = pack_model(save_model("llama", initializer_range=0.1))
    rng = np.random.default_rng(0)
    asked = [Request(f"r{i}", tuple(rng.integers(3, 9, int(rng.integers(1, 40))).tolist()), 24) for i in range(20)]
    plain = outputs(target, draft, "none", 0, asked)
    assert len({*map(tuple, plain.values())}) > 10
    for drafter, k in (("ngram", 4), ("model", 1), ("model", 6)):
        assert outputs(target, draft, drafter, k, asked) == plain


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.01)])
def test_perplexity_is_that_of_transformers(
    save_model: Callable[..., Path], precision: Precision, tolerance: float
) -> None:
    """bf16: its rounding moves the mean log-likelihood by far less than a percent."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = save_model("mixtral", "float32" if precision == "fp32" else "bfloat16", initializer_range=0.15)
    tokens = np.random.default_rng(1).integers(3, 96, 600).tolist()
    found, n = perplexity(pack_model(folder, precision=precision), tokens, 2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parts = [torch.tensor(tokens[first : first + 256])[None] for first in (0, 256, 512)]  # the model has 256 positions
    with torch.no_grad():
        losses = [(float(model(part, labels=part).loss), part.shape[1] - 1) for part in parts]
    assert n == 597
    assert found == pytest.approx(np.exp(sum(loss * n for loss, n in losses) / n), rel=tolerance)


def test_what_cannot_be_run_in_a_format_is_refused_with_a_sentence(mixtral: Path, llama: Path) -> None:
    with pytest.raises(BadInput, match="int8: are multiplied with bf16, not fp32"):
        pack_model(mixtral, precision="fp32", experts="int8")
    with pytest.raises(BadInput, match="tiny-llama is dense"):
        pack_model(llama, experts="int4")


ASKED = [{"custom_id": f"r{i}", "body": {"prompt": "once upon a", "max_tokens": 24}} for i in range(20)]


def run(folder: Path, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "specmoeoff", *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=300)
    assert found.returncode == code, found.stderr
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_a_format_goes_from_profile_to_validation(speaking_model: Path, tmp_path: Path, experts: str) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, ASKED)))
    what, made = ("--model", speaking_model), ("--profile", "profile.json", "--workload", "workload.json")
    told = run(tmp_path, "profile", *what, "--experts", experts, "--budget", 5).stderr
    assert "with experts in bf16" in told
    assert f"in {experts} (" in told
    observe = ("workload", *what, "--prompts", "in.jsonl", "--ignore-eos", "--output-tokens", 48)
    run(tmp_path, *observe, "--experts", experts)
    tune = ("tune", *what, *made, "--batch", 4, "--context", 128, "--disk-limit-gb-per-s", 0.05)
    assert "no operator was measured" in run(tmp_path, *tune, code=2).stderr  # of bf16: nobody timed them
    run(tmp_path, *tune, "--experts", experts)
    plan = Plan.load(tmp_path / "plan.toml")
    assert plan.model.expert_format == experts
    target = open_plan(plan).target
    assert target.spec.expert_format == experts
    assert plan.memory.disk["experts_file"] == target.expert_path.stat().st_size
    run(tmp_path, "run", "plan.toml", "--input", "in.jsonl", "--output", "out.jsonl", "--ignore-eos")
    wanted = perplexities(tmp_path, speaking_model, experts)
    assert wanted.by_format.keys() == {"bf16", experts}
    # So tiny a model's windows need not take the time predicted: validation may say no to that.
    words = ("validate", "plan.toml", "--prompts", "in.jsonl", "-o", "record.json", "--pairs", 2, "--windows", 2)
    command = [sys.executable, "-m", "specmoeoff", *map(str, words)]
    subprocess.run(command, capture_output=True, check=False, cwd=tmp_path, timeout=300)
    record = RunRecord.load(tmp_path / "record.json")
    assert record.lossless
    passed = {check.name for check in record.checks if check.passed}
    assert passed >= {"experts intact", "lossless", "disk bytes", "memory"}


def perplexities(folder: Path, model: Path, experts: str) -> Perplexities:
    told = run(folder, "perplexity", "--model", model, "--experts", experts, "--json").stdout
    return Perplexities.parse(told, Path("told.json"))
