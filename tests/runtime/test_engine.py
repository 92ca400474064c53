"""Speculative output equals plain output, whatever the drafter, placement, batch and chunking."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from specmoeoff.errors import BadInput
from specmoeoff.kernels.cpu import PAGE_TOKENS
from specmoeoff.runtime import expert_store
from specmoeoff.runtime.engine import Engine
from specmoeoff.runtime.expert_store import TokenBucket
from specmoeoff.runtime.pack import PackedModel, pack_model
from specmoeoff.runtime.process import disk_bytes_read
from specmoeoff.runtime.sampling import Sampling, distribution
from specmoeoff.runtime.sequence import Request
from specmoeoff.runtime.verify import accept
from specmoeoff.specs.plan import LengthAt, PlanDecode, PlanExperts, PlanThreads

PLACEMENTS = {
    "resident": ((0, 1, 2, 3, 4), (), 0),
    "prefetched": ((0,), (1, 2, 3, 4), 4),
    "on demand": ((), (), 3),
    "mixed": ((2,), (0, 4), 5),
}


@pytest.fixture
def pair(mixtral: Path, llama: Path) -> tuple[PackedModel, PackedModel]:
    return pack_model(mixtral), pack_model(llama)


def requests(n: int, vocab: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            f"r{i}", tuple(int(t) for t in rng.integers(3, vocab, int(rng.integers(1, 70)))), int(rng.integers(1, 30))
        )
        for i in range(n)
    ]


def generate(
    pair: tuple[PackedModel, PackedModel],
    drafter: str = "none",
    k: int = 0,
    placement: str = "resident",
    batch: int = 3,
    micro_batches: int = 1,
    chunk: int = 64,
    threads: int = 2,
    accept_: Callable[[list[int], list[int]], int] = accept,
    todo: list[Request] | None = None,
    kv_tokens: int | None = None,
    context_tokens: int = 128,
    expect: Callable[[Engine], None] = lambda engine: None,
) -> dict[str, list[int]]:
    target, draft = pair
    resident, prefetch, slots = PLACEMENTS[placement]
    layers = target.spec.n_layers
    decode = PlanDecode(
        drafter=drafter,  # type: ignore[arg-type]
        draft_length=k,
        batch=batch,
        micro_batches=micro_batches,
        context_tokens=context_tokens,
        prefill_chunk_tokens=chunk,
        kv_tokens=kv_tokens,
    )
    experts = PlanExperts(resident=(resident,) * layers, prefetch=(prefetch,) * layers, stream_slots=slots)
    reading = PlanThreads(compute=threads, disk_readers=2, disk_chunk_bytes=16384)
    with Engine(target, draft, decode, experts, reading) as engine:
        engine.accept = accept_
        engine.submit(todo or requests(7, target.spec.vocab))
        for window in engine.run():
            assert window.live <= batch
        expect(engine)
        return {s.request.request_id: s.output for s in engine.finished}


@pytest.fixture
def plain(pair: tuple[PackedModel, PackedModel]) -> dict[str, list[int]]:
    output = generate(pair)
    assert {i: len(o) for i, o in output.items()} == {
        r.request_id: r.max_tokens for r in requests(7, pair[0].spec.vocab)
    }
    return output


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_every_drafter_gives_the_plain_output(
    pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]], drafter: str, k: int
) -> None:
    assert generate(pair, drafter, k) == plain


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize(("drafter", "k"), [("none", 0), ("model", 4)])
def test_every_placement_gives_the_plain_output(
    pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]], placement: str, drafter: str, k: int
) -> None:
    assert generate(pair, drafter, k, placement, micro_batches=2) == plain


@pytest.mark.parametrize(("batch", "chunk", "threads"), [(1, 1, 1), (2, 7, 3), (7, 200, 1), (4, 5, 2)])
def test_batching_chunking_and_threads_change_nothing(
    pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]], batch: int, chunk: int, threads: int
) -> None:
    assert generate(pair, "model", 3, "mixed", batch, 2, chunk, threads) == plain


@pytest.mark.parametrize("drafter", ["none", "model", "ngram"])
def test_rewound_requests_go_the_same_way_again(pair: tuple[PackedModel, PackedModel], drafter: str) -> None:
    target, draft = pair
    k = 0 if drafter == "none" else 3
    decode = PlanDecode(
        drafter=drafter,  # type: ignore[arg-type]
        draft_length=k,
        batch=3,
        micro_batches=1,
        context_tokens=128,
        prefill_chunk_tokens=64,
    )
    experts = PlanExperts(resident=((0,),) * 3, prefetch=((1, 2, 3, 4),) * 3, stream_slots=4)
    with Engine(
        target, draft, decode, experts, PlanThreads(compute=2, disk_readers=2, disk_chunk_bytes=8192)
    ) as engine:
        engine.submit(replace(r, max_tokens=50) for r in requests(3, target.spec.vocab))
        while not engine.live or any(s.prefilling for s in engine.live):
            engine.step()
            engine.rewind()
        ways = []
        for _ in range(3):
            engine.rewind()
            assert all(s.n_output == 1 for s in engine.live)
            for _ in range(4):
                engine.step()
            engine.pause()
            ways.append([list(s.tokens) for s in engine.live])
        assert ways[0] == ways[1] == ways[2]
        assert all(s.n_output >= 5 for s in engine.live)


def test_a_draft_equal_to_the_target_is_always_accepted(llama: Path) -> None:
    packed = pack_model(llama)
    decode = PlanDecode(
        drafter="model", draft_length=4, batch=1, micro_batches=1, context_tokens=64, prefill_chunk_tokens=64
    )
    experts = PlanExperts(resident=((0,),) * 3, prefetch=((),) * 3, stream_slots=0)
    with Engine(
        packed, packed, decode, experts, PlanThreads(compute=1, disk_readers=1, disk_chunk_bytes=4096)
    ) as engine:
        engine.submit([Request("r", (5, 6, 7), 21)])
        windows = list(engine.run())
    # the prompt gives one token, then four windows of five
    assert [w.tokens for w in windows] == [1, 5, 5, 5, 5]


def test_accepting_everything_is_seen_in_the_output(
    pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]]
) -> None:
    assert generate(pair, "model", 3, accept_=lambda drafted, chosen: len(drafted)) != plain


def test_a_stop_token_ends_a_request(pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]]) -> None:
    longest = max(plain, key=lambda i: len(plain[i]))
    stop = plain[longest][len(plain[longest]) // 2]
    first = plain[longest].index(stop)
    target, draft = pair
    decode = PlanDecode(
        drafter="model", draft_length=4, batch=2, micro_batches=1, context_tokens=128, prefill_chunk_tokens=64
    )
    experts = PlanExperts(resident=(tuple(range(5)),) * 3, prefetch=((),) * 3, stream_slots=0)
    with Engine(
        target, draft, decode, experts, PlanThreads(compute=1, disk_readers=1, disk_chunk_bytes=4096)
    ) as engine:
        request = next(r for r in requests(7, target.spec.vocab) if r.request_id == longest)
        engine.submit([Request("r", request.prompt, request.max_tokens, (stop,))])
        list(engine.run())
        assert engine.finished[0].output == plain[longest][: first + 1]
        assert engine.finished[0].finish_reason == "stop"


def test_the_kernel_counts_the_bytes_the_run_asked_for(pair: tuple[PackedModel, PackedModel]) -> None:
    target, _ = pair
    decode = PlanDecode(
        drafter="none", draft_length=0, batch=2, micro_batches=1, context_tokens=128, prefill_chunk_tokens=64
    )
    experts = PlanExperts(resident=((0,),) * 3, prefetch=((1, 2),) * 3, stream_slots=5)
    with Engine(target, None, decode, experts, PlanThreads(compute=1, disk_readers=2, disk_chunk_bytes=8192)) as engine:
        before, planned = disk_bytes_read(), engine.store.bytes_planned
        engine.submit(requests(4, target.spec.vocab))
        list(engine.run())
        asked, read = engine.store.bytes_planned - planned, disk_bytes_read() - before
    if read == 0:
        pytest.skip("this file system does not count reads")
    assert read == pytest.approx(asked, rel=0.02)


def test_a_request_longer_than_the_context_is_refused(pair: tuple[PackedModel, PackedModel]) -> None:
    with pytest.raises(BadInput, match="exceed the plan's context of 128"):
        Engine.check_fits(Request("long", (3,) * 120, 9), 128)
    with pytest.raises(BadInput, match="the prompt is empty"):
        Engine.check_fits(Request("none", (), 9), 128)


def test_the_token_bucket_holds_its_rate() -> None:
    bucket = TokenBucket(0.5)
    begun = time.perf_counter()
    for _ in range(100):
        bucket.take(1_000_000)
    seconds = time.perf_counter() - begun
    assert 0.19 <= seconds < 0.5  # 0.2 s at 0.5 GB/s; a busy machine may wake late


MIXED = [Sampling(), Sampling(1.0, seed=5), Sampling(0.7, top_k=9, seed=1), Sampling(1.2, top_p=0.9, min_p=0.02)]


def mixed(vocab: int, n: int = 8) -> list[Request]:
    """Long requests, every fourth greedy."""
    return [
        replace(r, max_tokens=45 + i, sampling=MIXED[i % 4], top_logprobs=2 if i % 3 == 0 else None)
        for i, r in enumerate(requests(n, vocab))
    ]


@pytest.mark.parametrize(("drafter", "k"), [("none", 0), ("ngram", 3), ("model", 3)])
def test_a_sampled_request_gives_the_same_answer_whatever_runs_beside_it(
    pair: tuple[PackedModel, PackedModel], drafter: str, k: int
) -> None:
    todo = mixed(pair[0].spec.vocab)
    alone = generate(pair, drafter, k, batch=1, todo=todo)
    assert len({tuple(o) for o in alone.values()}) == len(todo)
    assert generate(pair, drafter, k, "mixed", batch=5, micro_batches=2, chunk=9, todo=todo[::-1]) == alone
    other = [replace(r, sampling=replace(r.sampling, seed=99)) for r in todo]
    different = {i for i, o in generate(pair, drafter, k, batch=4, todo=other).items() if o != alone[i]}
    assert different == {r.request_id for r in todo if not r.sampling.greedy}


@pytest.mark.parametrize(("drafter", "k"), [("none", 0), ("ngram", 3), ("model", 4)])
def test_preempted_requests_give_the_same_answer(pair: tuple[PackedModel, PackedModel], drafter: str, k: int) -> None:
    todo = [replace(r, max_tokens=r.max_tokens + 75) for r in mixed(pair[0].spec.vocab)]
    free = generate(pair, drafter, k, batch=4, todo=todo, context_tokens=256)

    def preempted(engine: Engine) -> None:
        assert engine.n_preempted >= 2
        assert sorted(engine._pages._free_far) == list(range(1, engine._pages.n_pages))
        assert {s.request.request_id for s in engine.finished} == {r.request_id for r in todo}
        assert all(len(s.logprobs) == s.n_output for s in engine.finished if s.request.top_logprobs is not None)

    tight = {"kv_tokens": 3 * PAGE_TOKENS, "context_tokens": 256, "chunk": 16}
    assert generate(pair, drafter, k, batch=4, todo=todo, expect=preempted, **tight) == free


def test_a_kv_budget_below_one_context_is_refused(pair: tuple[PackedModel, PackedModel]) -> None:
    with pytest.raises(BadInput, match=r"decode\.kv_tokens of 128 cannot hold one context of 256"):
        generate(pair, kv_tokens=128, context_tokens=256)


def test_drafts_follow_the_plans_table(pair: tuple[PackedModel, PackedModel], plain: dict[str, list[int]]) -> None:
    """Full batches draft one token, the last requests five: more than the plan's, in no more rows."""
    target, draft = pair
    decode = PlanDecode(
        drafter="model", draft_length=2, batch=3, micro_batches=1, context_tokens=128, prefill_chunk_tokens=64
    )
    experts = PlanExperts(resident=(tuple(range(5)),) * 3, prefetch=((),) * 3, stream_slots=0)
    table = [LengthAt(context_tokens=60, live=live, draft_length=k, tokens_per_s=1.0) for live, k in ((1, 5), (3, 1))]
    threads = PlanThreads(compute=2, disk_readers=1, disk_chunk_bytes=4096)
    seen: dict[int, set[int]] = {}
    with Engine(target, draft, decode, experts, threads, draft_lengths=table) as engine:
        engine.submit(requests(7, target.spec.vocab))
        for window in engine.run():
            if not window.prefill_rows:
                seen.setdefault(window.live, set()).update(engine.last_counts)
        assert {s.request.request_id: s.output for s in engine.finished} == plain
    assert max(seen[3]) == 2
    assert max(seen[1]) == 6


def test_log_probabilities_are_those_of_the_logits(pair: tuple[PackedModel, PackedModel]) -> None:
    """Told for every token, drafted or not, and the likeliest is the greedy choice."""
    todo = [replace(r, max_tokens=20, top_logprobs=3) for r in requests(3, pair[0].spec.vocab)]
    told = {}

    def keep(engine: Engine) -> None:
        told.update({s.request.request_id: list(s.logprobs) for s in engine.finished})

    output = generate(pair, todo=todo, expect=keep)
    one_by_one = dict(told)
    assert generate(pair, "model", 4, todo=todo, expect=keep) == output
    assert told == one_by_one
    for name, logprobs in told.items():
        assert [one.token for one in logprobs] == output[name] == [one.top[0][0] for one in logprobs]
        assert all(one.logprob == one.top[0][1] > one.top[1][1] > one.top[2][1] for one in logprobs)
        assert all(sum(np.exp(logprob) for _, logprob in one.top) < 1 for one in logprobs)


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_the_engine_leaves_the_distribution(save_model: Callable[..., Path], drafter: str) -> None:
    """Chi-square of 2,000 requests' first three tokens, the later two drafted, against plain decoding's probabilities."""
    vocab, n = 16, 2000
    shape = {"vocab_size": vocab, "num_hidden_layers": 2}
    # larger weights: a distribution that is not flat, and a draft that is sometimes right
    target, draft = (pack_model(save_model(kind, initializer_range=0.15, **shape)) for kind in ("mixtral", "llama"))
    sampling = Sampling(temperature=1.5, top_k=4)
    # whatever comes first was seen after a 6 before, so prompt lookup drafts too
    prompt = (*(t for first in range(vocab) for t in (6, first, 3 * first % vocab)), 6)
    decode = PlanDecode(
        drafter=drafter,  # type: ignore[arg-type]
        draft_length=2,
        batch=64,
        micro_batches=1,
        context_tokens=64,
        prefill_chunk_tokens=512,
    )
    experts = PlanExperts(resident=(tuple(range(target.spec.n_experts)),) * 2, prefetch=((),) * 2, stream_slots=0)
    with Engine(
        target, draft, decode, experts, PlanThreads(compute=2, disk_readers=1, disk_chunk_bytes=4096)
    ) as engine:
        engine.submit(Request(str(i), prompt, 4, sampling=replace(sampling, seed=i)) for i in range(n))
        drafted = sum(sum(rows - 1 for rows in engine.last_counts if rows <= 3) for _ in engine.run())
        seen = Counter(tuple(s.output[:3]) for s in engine.finished)
        assert drafted > n / 2
        engine.finished.clear()
        engine.configure(decode.model_copy(update={"drafter": "none", "draft_length": 0}), experts)

        def following(texts: list[tuple[int, ...]]) -> list[dict[int, float]]:
            """Probabilities after each text, by way of the log-probabilities told."""
            engine.submit(Request(str(i), text, 1, top_logprobs=vocab) for i, text in enumerate(texts))
            list(engine.run())
            done = sorted(engine.finished, key=lambda s: int(s.request.request_id))
            engine.finished.clear()
            logits = np.full((len(done), vocab), -np.inf, np.float32)
            for row, s in zip(logits, done, strict=True):
                for token, logprob in s.logprobs[0].top:
                    row[token] = logprob
            return [dict(enumerate(row)) for row in distribution(logits, sampling)]

        expected = {(): 1.0}
        for _ in range(3):
            texts = list(expected)
            after = following([prompt + text for text in texts])
            expected = {
                (*text, t): expected[text] * p
                for text, each in zip(texts, after, strict=True)
                for t, p in each.items()
                if p
            }
    assert set(seen) <= set(expected)
    large = [t for t in expected if expected[t] * n >= 5]
    counts = [seen[t] for t in large] + [n - sum(seen[t] for t in large)]
    wanted = [expected[t] * n for t in large] + [n - sum(expected[t] * n for t in large)]
    kept = [i for i, w in enumerate(wanted) if w > 1e-6]
    assert chisquare([counts[i] for i in kept], [wanted[i] for i in kept]).pvalue > 0.001


def test_an_expert_that_cannot_be_read_fails_only_the_requests_that_need_it(
    pair: tuple[PackedModel, PackedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_store, "RETRY_S", ())
    target, _ = pair
    failed: dict[str, Exception] = {}

    def keep(engine: Engine) -> None:
        failed.update({s.request.request_id: s.error for s in engine.finished if s.error})

    short = [replace(r, prompt=r.prompt[:1], max_tokens=1) for r in requests(7, target.spec.vocab)]
    intact = generate(pair, placement="on demand", batch=7, todo=short)
    with target.expert_path.open("r+b") as stream:
        stream.seek(target.expert_offset(1, 3) + 77)
        (byte,) = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 16]))
    output = generate(pair, placement="on demand", batch=7, todo=short, expect=keep)
    assert 0 < len(failed) < 7
    assert all("expert 3 of layer 1 differs from what was packed" in str(error) for error in failed.values())
    assert {i: o for i, o in output.items() if i not in failed} == {i: o for i, o in intact.items() if i not in failed}
