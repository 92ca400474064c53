"""`specmoeoff run` as its own process on a tiny model: interrupted, refused, and out of disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime import batch_files
from specmoeoff.runtime.batch_run import BatchRun
from specmoeoff.runtime.checkpoint import read_model_spec
from specmoeoff.specs.plan import (
    PlainPlan,
    Plan,
    PlanDecode,
    PlanExperts,
    PlanInputs,
    PlanLimits,
    PlanMemory,
    PlanModel,
    PlanThreads,
    Prediction,
)

N_REQUESTS, N_TOKENS = 8, 150
SLOW_GB_PER_S = "0.01"  # two hundred experts a second


def write_tokenizer(folder: Path) -> None:
    """Words w0 to w95."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def plan_of(checkpoint: Path) -> Plan:
    """Drafts of three tokens by n-gram, no expert resident, everything read on demand."""
    spec = read_model_spec(checkpoint)
    nothing = ((),) * spec.n_layers
    part = PlainPlan(
        decode=PlanDecode(
            drafter="ngram", draft_length=3, batch=2, micro_batches=1, context_tokens=192, prefill_chunk_tokens=16
        ),
        experts=PlanExperts(resident=nothing, prefetch=nothing, stream_slots=4),
        threads=PlanThreads(compute=1, disk_readers=1, disk_chunk_bytes=1 << 20),
        memory=PlanMemory(fast={}, host={"all": 1 << 20}, disk={}),
        predicted=Prediction(
            window_s=1.0,
            tokens_per_round=1.0,
            tokens_per_s=1.0,
            busy_s={},
            phases_s={},
            disk_bytes=1.0,
            bound="disk",
            context_tokens=192,
        ),
    )
    return Plan(
        model=PlanModel(source=str(checkpoint), name=spec.name, fingerprint=spec.fingerprint),
        **dict(part),
        limits=PlanLimits(fast_memory_bytes=1 << 30, host_memory_bytes=1 << 30),
        inputs=PlanInputs(
            profile_name="none",
            machine_fingerprint="none",
            workload_name="none",
            profile_sha256="",
            workload_sha256="",
            search="by hand",
            seed=0,
            n_evaluated=0,
            tool_version="0",
            command="",
        ),
        plain=part,
    )


@pytest.fixture
def checkpoint(save_model: Callable[..., Path]) -> Path:
    """A sharded Mixtral that can be asked."""
    folder = save_model("mixtral", max_shard_size="200KB")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path) -> list[str]:
    """The words of a `run` over eight requests."""
    plan_of(checkpoint).save(tmp_path / "plan.toml")
    prompts = [" ".join(f"w{(7 * i + j * j) % 90 + 3}" for j in range(4 + i)) for i in range(N_REQUESTS)]
    lines = [{"custom_id": f"r{i}", "body": {"prompt": p, "max_tokens": N_TOKENS - i}} for i, p in enumerate(prompts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ("plan.toml", "--input", "in.jsonl", "--output", "out.jsonl")
    return ["run", *(n if n.startswith("--") else str(tmp_path / n) for n in names), "--ignore-eos"]


def start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "specmoeoff", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell, SIGINT is ignored and that would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert "Traceback" not in said
    return " ".join(said.split())


def wait_for_lines(journal: Path, n: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < n:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_answers_as_if_it_had_not_been(job: list[str], tmp_path: Path) -> None:
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    whole = [*job[:-2], str(tmp_path / "whole.jsonl"), "--ignore-eos"]
    finish(start(whole), 0)

    slow = [*job, "--disk-limit-gb-per-s", SLOW_GB_PER_S]
    process = start(slow)
    wait_for_lines(journal, 2, process)
    refusal = finish(start(job), 2)
    assert "another run is writing it" in refusal
    process.send_signal(signal.SIGINT)
    assert "interrupted; nothing finished is lost" in finish(process, 130)
    assert not output.exists()
    kept = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert 0 < len(kept) < N_REQUESTS

    assert "begun with another --ignore-eos" in finish(start(job[:-1]), 2)
    finish(start([*job, "--record", str(tmp_path / "run.json")]), 0)
    assert json.loads((tmp_path / "run.json").read_text())["n_requests"] == N_REQUESTS - len(kept)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"r{i}" for i in range(N_REQUESTS)]
    assert all(len(a["response"]["body"]["choices"][0]["token_ids"]) == N_TOKENS - i for i, a in enumerate(answers))
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_one_sentence_and_nothing_is_written(
    job: list[str], checkpoint: Path, tmp_path: Path, damage: str
) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 1000)
    else:
        shard.unlink()
    before = sorted(tmp_path.iterdir())
    said = finish(start([*job, "--record", str(tmp_path / "run.json"), "--trace", str(tmp_path / "t.json")]), 2)
    wanted = "the shard is cut short" if damage == "truncated" else "this shard is missing"
    assert said.startswith("warning: the plan was made from a profile of another machine")
    assert f"specmoeoff: {shard}: {wanted}" in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_during_a_run_is_one_sentence(
    job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> BatchRun:
        plan, output = Plan.load(job[1]), tmp_path / "out.jsonl"
        return BatchRun(plan, tmp_path / "in.jsonl", output, None, True, lambda *_: None)

    batch_run, fsync, calls = begin(), os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(batch_files.os, "fsync", full)
    with pytest.raises(BadInput, match=r"out\.jsonl\.partial: cannot write: the disk is full"):
        batch_run.run(lambda *_: None, None)
    monkeypatch.undo()
    monkeypatch.setenv("SPECMOEOFF_CACHE", str(tmp_path / "cache"))
    assert not (tmp_path / "out.jsonl").exists()
    begin().run(lambda *_: None, None)
    names = [json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert names == [f"r{i}" for i in range(N_REQUESTS)]
