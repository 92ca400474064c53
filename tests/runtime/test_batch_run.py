"""`specmoeoff run` as its own process on a tiny model: interrupted, refused, and out of disk."""

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specmoeoff.errors import BadInput
from specmoeoff.runtime import batch_files, ray_run
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
LONG = bool(os.environ.get("SPECMOEOFF_LONG_RUNS"))
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


def answers_of(path: Path) -> dict[str, dict[str, Any]]:
    return {answer["custom_id"]: answer for answer in map(json.loads, path.read_text().splitlines())}


def write_lines(path: Path, bodies: list[dict[str, Any]], **line: Any) -> None:
    lines = [{"custom_id": f"r{i}", **line, "body": body} for i, body in enumerate(bodies)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_here(
    job: list[str], tmp_path: Path, ignore_eos: bool = True, say: Callable[[str], None] | None = None
) -> dict[str, dict[str, Any]]:
    plan, output = Plan.load(job[1]), tmp_path / "out.jsonl"
    BatchRun(plan, tmp_path / "in.jsonl", output, None, ignore_eos, lambda *_: None).run(lambda *_: None, say)
    return answers_of(output)


def test_a_request_that_cannot_be_answered_has_a_line_that_says_why(job: list[str], tmp_path: Path) -> None:
    good = {"prompt": "w5 w6", "max_tokens": 3}
    bad = [{"prompt": "w5", "tools": [1]}, {"prompt": "w5 " * 500}, {"prompt": ""}, {"prompt": "w5", "n": 2}]
    chat = {"messages": [{"role": "user", "content": "w5"}]}
    write_lines(tmp_path / "in.jsonl", [good, *bad, chat, good])
    answers = run_here(job, tmp_path)
    assert list(answers) == [f"r{i}" for i in range(7)]
    for name, words in (
        ("r1", "line 2: body: tools is not supported"),
        ("r2", "exceed the plan's context of 192"),
        ("r3", "the prompt is empty"),
        ("r4", "body.n is 2"),
        ("r5", "no chat template"),
    ):
        assert words in answers[name]["error"]["message"]
        assert answers[name]["response"]["status_code"] == 400
        assert answers[name]["response"]["body"]["error"]["message"] == answers[name]["error"]["message"]
    for name in ("r0", "r6"):
        assert answers[name]["error"] is None
        assert len(answers[name]["response"]["body"]["choices"][0]["token_ids"]) == 3


def test_a_prompt_sent_to_the_other_shapes_url_is_refused_and_without_a_url_tells_its_own(
    job: list[str], tmp_path: Path
) -> None:
    prompt, chat = {"prompt": "w5", "max_tokens": 1}, {"messages": [{"role": "user", "content": "w5"}]}
    lines = [
        {"url": "/v1/chat/completions", "body": prompt},
        {"url": "/v1/completions", "body": chat},
        {"body": prompt},
    ]
    texts = [json.dumps({"custom_id": f"r{i}", **line}) for i, line in enumerate(lines)]
    (tmp_path / "in.jsonl").write_text("\n".join(texts))
    chat_answer, completion_answer, good = run_here(job, tmp_path).values()
    assert "url /v1/chat/completions takes `messages`" in chat_answer["error"]["message"]
    assert "url /v1/completions takes `prompt`" in completion_answer["error"]["message"]
    assert good["response"]["body"]["object"] == "text_completion"


def test_a_stop_string_over_several_tokens_cuts_the_answer(job: list[str], tmp_path: Path) -> None:
    asked = {"prompt": "w5 w6 w7", "max_tokens": 40, "temperature": 1, "seed": 3}
    write_lines(tmp_path / "in.jsonl", [asked], url="/v1/completions")
    whole = run_here(job, tmp_path)["r0"]["response"]["body"]["choices"][0]
    words = whole["text"].split()
    assert len(words) == 40
    assert whole["finish_reason"] == "length"
    at = next(i for i in range(10, 39) if " ".join(words).find(f"{words[i]} {words[i + 1]}") > 20)
    stop = f"{words[at][1:]} {words[at + 1]}"  # begins inside one token, ends with the next
    write_lines(
        tmp_path / "in.jsonl",
        [{**asked, "stop": ["never", stop], "logprobs": 2}, {**asked, "stop": "w"}],
        url="/v1/completions",
    )
    first, second = (a["response"]["body"] for a in run_here(job, tmp_path).values())
    choice = first["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == whole["text"][: whole["text"].index(stop)]
    assert stop not in choice["text"]
    assert choice["token_ids"] == whole["token_ids"][: first["usage"]["completion_tokens"]]
    said: list[str] = []
    run_here(job, tmp_path, say=said.append)
    assert f"r0: {choice['text']}" in said
    assert choice["logprobs"]["tokens"] == [*choice["text"].split()[:-1], words[at]]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [2] * len(choice["logprobs"]["tokens"])
    assert second["choices"][0]["text"] == ""
    assert second["usage"]["completion_tokens"] == 1


def test_chats_tell_log_probabilities_in_their_own_shape(job: list[str], checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    asked = {"messages": [{"role": "user", "content": "w5 w9"}], "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    write_lines(tmp_path / "in.jsonl", [asked, {k: v for k, v in asked.items() if k != "top_logprobs"}])
    first, second = (a["response"]["body"]["choices"][0] for a in run_here(job, tmp_path).values())
    content = first["logprobs"]["content"]
    assert " ".join(one["token"] for one in content) == first["message"]["content"]
    for one in content:
        assert one["token"] == one["top_logprobs"][0]["token"]
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] < 0
        assert bytes(one["bytes"]).decode() == one["token"]
    assert [len(one["top_logprobs"]) for one in content] == [2] * 4
    assert [len(one["top_logprobs"]) for one in second["logprobs"]["content"]] == [0] * 4


def test_the_end_token_ends_an_answer_and_is_not_in_its_text(job: list[str], tmp_path: Path) -> None:
    bodies = [{"prompt": "w5", "max_tokens": 150, "temperature": 2, "seed": i} for i in range(8)]
    write_lines(tmp_path / "in.jsonl", bodies, url="/v1/completions")
    choices = [a["response"]["body"]["choices"][0] for a in run_here(job, tmp_path, ignore_eos=False).values()]
    ended = [c for c in choices if c["finish_reason"] == "stop"]
    assert ended
    for choice in ended:
        assert choice["token_ids"].index(2) == len(choice["token_ids"]) - 1
        assert "w2" not in choice["text"].split()
    assert all(2 not in c["token_ids"] for c in choices if c not in ended)


def test_a_damaged_expert_file_answers_what_it_can(
    job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit flips after packing: the requests that need that expert say so, the others are answered as ever."""
    write_lines(tmp_path / "in.jsonl", [{"prompt": f"w{i}", "max_tokens": 1} for i in range(3, 13)])
    intact = run_here(job, tmp_path)
    (path,) = (tmp_path / "cache" / "packed").glob("*/experts.bin")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    answers = run_here(job, tmp_path)
    failed = {name for name, answer in answers.items() if answer["error"]}
    assert 0 < len(failed) < 10
    assert all("differs from what was packed; check the disk" in answers[name]["error"]["message"] for name in failed)
    assert {n: a for n, a in answers.items() if n not in failed} == {n: a for n, a in intact.items() if n not in failed}

    monkeypatch.setattr(ray_run, "plan_here", lambda plan, _: plan)

    async def by_a_node() -> list[dict[str, Any]]:
        node = ray_run.NodeEngine(Plan.load(job[1]).text(), "", None, True)
        return [await node.answer(json.loads(line)) for line in (tmp_path / "in.jsonl").read_text().splitlines()]

    assert asyncio.run(by_a_node()) == list(answers.values())


def small_requests(n: int, path: Path) -> None:
    rng = random.Random(0)
    bodies = [
        {
            "prompt": " ".join(f"w{rng.randrange(3, 96)}" for _ in range(rng.randrange(1, 9))),
            "max_tokens": rng.randrange(1, 7),
            "temperature": i % 2,
        }
        for i in range(n)
    ]
    write_lines(path, bodies)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "n_kills"), [(60, 4), pytest.param(10_000, 20, marks=pytest.mark.long)])
@pytest.mark.timeout(3600)
def test_killed_again_and_again_every_request_is_answered_once_and_as_if_it_had_not_been(
    job: list[str], tmp_path: Path, n: int, n_kills: int
) -> None:
    small_requests(n, tmp_path / "in.jsonl")
    whole = [*job[:-2], str(tmp_path / "whole.jsonl"), "--ignore-eos"]
    finish(start(whole), 0)
    output, journal, rng = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial", random.Random(1)
    kills = 0
    while kills < n_kills:
        process = start(job)
        # the first kills come before and while the journal is opened, the last near the end
        wait_for_lines(journal, min(n, kills * n // n_kills), process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        kills += 1
    finish(start(job), 0)
    names = [json.loads(line)["custom_id"] for line in output.read_text().splitlines()]
    assert names == [f"r{i}" for i in range(n)]
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_the_second_half(job: list[str], tmp_path: Path) -> None:
    n = 10_000 if LONG else 1000
    small_requests(n, tmp_path / "in.jsonl")
    plan, rss_bytes = Plan.load(job[1]), []

    def sample(done: int, total: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        rss_bytes.append((done / total, pages * os.sysconf("SC_PAGESIZE")))

    run = BatchRun(plan, tmp_path / "in.jsonl", tmp_path / "out.jsonl", None, True, lambda *_: None)
    run.run(sample, None)
    half = [b for share, b in rss_bytes if share >= 0.5]
    assert max(half) / min(half) <= 1.05
