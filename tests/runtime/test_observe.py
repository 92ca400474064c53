"""What `workload` measures on models whose first layers hold no experts, and the plans made of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specmoeoff.estimate.speculation import expected_tokens
from specmoeoff.runtime.observe import LONGEST_DRAFT, AcceptanceCounter, observe, observing_experts
from specmoeoff.runtime.pack import pack_model
from specmoeoff.runtime.sequence import Request, Sequence
from specmoeoff.specs.plan import Plan, PlanThreads
from specmoeoff.specs.record import RunRecord
from specmoeoff.tuner.space import Choice, place


@pytest.mark.parametrize("n_resident", [5, 16])
def test_popularity_of_a_model_with_dense_first_layers_is_that_of_its_expert_layers(
    save_model: Callable[..., Path], n_resident: int
) -> None:
    target = pack_model(save_model("deepseek_v2"))
    spec, threads = target.spec, PlanThreads(compute=1, disk_readers=1, disk_chunk_bytes=1 << 20)
    requests = [Request(f"r{i}", (3 + i, 4, 5), 12) for i in range(4)]
    workload = observe(target, {"ngram": None}, requests, threads, 4, n_resident, "tiny")
    sums = np.asarray(workload.popularity).sum(axis=1)
    assert sums == pytest.approx([0.0, spec.n_active, spec.n_active])
    for n_slots in (5, 16):
        for threshold in (0.0, 0.5):
            choice = Choice("ngram", 3, 4, 1, 0 if n_slots == 16 else 4, threshold, 1)
            experts = place(spec, workload, choice, n_slots)
            assert experts.n_resident == n_slots - choice.stream_slots
            assert (experts.resident[0], experts.prefetch[0]) == ((), ())


def test_rounds_of_short_drafts_are_foreseen_from_long_ones() -> None:
    rng, n_tokens, n_texts = np.random.default_rng(3), 200, 400
    # Stretches of text easy to draft, and hard ones.
    easy = np.repeat(rng.random((n_texts, n_tokens // 20)) < 0.5, 20, axis=1)
    hits = rng.random((n_texts, n_tokens)) < np.where(easy, 0.97, 0.7)

    def decode(k: int, see: Callable[[list[Sequence]], None]) -> float:
        rounds = 0
        texts = [Sequence(Request(str(i), (1,), n_tokens)) for i in range(n_texts)]
        for s in texts:
            s.tokens = [1, 1]
        see(texts)
        while going := [(s, h) for s, h in zip(texts, hits, strict=True) if s.n_remaining]:
            for s, h in going:
                offered = h[s.n_output : s.n_output + min(k, s.n_remaining - 1)]
                s.tokens = [1] * (len(s.tokens) + int(np.cumprod(offered).sum()) + 1)
            rounds += len(going)
            see(texts)
        return n_texts * (n_tokens - 1) / rounds

    counter = AcceptanceCounter(of_text=True)
    decode(LONGEST_DRAFT, counter.see)
    found = counter.acceptance("made up")
    for k in (1, 3, 6, 12):
        # Of a whole text a little less: a draft is no longer than what is left of it.
        assert expected_tokens(found.conditional, k, found.of_text) == pytest.approx(
            decode(k, lambda s: None), rel=0.04
        )
    assert 1 + np.cumprod(found.conditional[:6]).sum() < 0.93 * decode(6, lambda s: None)


def test_what_is_held_while_observing_lies_in_layers_with_experts(save_model: Callable[..., Path]) -> None:
    spec = pack_model(save_model("deepseek_v3")).spec
    for n in range(spec.n_all_experts + 1):
        experts = observing_experts(spec, n)
        assert experts.n_resident == n
        assert all(len(held) <= spec.n_experts_of(layer) for layer, held in enumerate(experts.resident))


@pytest.mark.slow
@pytest.mark.long
def test_a_model_with_a_dense_first_layer_goes_from_profile_to_validation(
    speaking_latent_model: Path, tmp_path: Path
) -> None:
    asked = [{"custom_id": f"r{i}", "body": {"prompt": "once upon a", "max_tokens": 24}} for i in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, asked)))
    model, made = ("--model", speaking_latent_model), ("--profile", "profile.json", "--workload", "workload.json")
    for words in (
        ("profile", *model, "--budget", 5),
        ("workload", *model, "--prompts", "in.jsonl", "--ignore-eos", "--output-tokens", 48),
        ("tune", *model, *made, "--batch", 4, "--context", 128, "--disk-limit-gb-per-s", 0.05),
        ("run", "plan.toml", "--input", "in.jsonl", "--output", "out.jsonl", "--ignore-eos"),
        ("validate", "plan.toml", "--prompts", "in.jsonl", "-o", "record.json", "--pairs", 2, "--windows", 2),
    ):
        command = [sys.executable, "-m", "specmoeoff", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
        # So tiny a model's windows need not take the time predicted: validation may say no to that.
        assert done.returncode in ((0, 1) if words[0] == "validate" else (0,)), done.stderr
        assert "Traceback" not in done.stderr
    record = RunRecord.load(tmp_path / "record.json")
    assert record.lossless
    assert all(check.passed for check in record.checks if check.name in ("experts intact", "lossless"))
    assert Plan.load(tmp_path / "plan.toml").experts.resident[0] == ()
